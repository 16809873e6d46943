"""The form that users of NeMo Curator 0.9 know: a client, a dataset, an embedder, `save_metadata()`.

A thin face over `flows.embed.embed_dataset`: only the imports of a script change.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, NoReturn, Self

import pyarrow.parquet as pq

from embedders.base import ImageEmbedder
from embedders.errors import InputError
from flows.embed import embed_dataset
from flows.outcome import RunFailed
from tasks.dataset.description import columns_made
from tasks.dataset.vectors import rows_per_group, write_groups
from tasks.hardware import choose_device, count_gpus
from tasks.manifest import Manifest
from tasks.storage.folder import Folder

WORK_FOLDER = ".shard-embed"
"""Where `save_metadata` keeps embeddings and quarantine, inside the folder it writes to; not listed as shards."""


@dataclass(frozen=True)
class ClientSettings:
    """What `get_client` was asked for. Workers start with the run, and end with it."""

    device: Literal["auto", "gpu", "cpu"] = "auto"
    workers: int | None = None
    scheduler: str | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Nothing is left open between runs."""


_client = ClientSettings()


def get_client(
    cluster_type: Literal["gpu", "cpu"] = "cpu",
    n_workers: int | None = None,
    scheduler_address: str | None = None,
    **options: Any,
) -> ClientSettings:
    """Choose where the datasets of this process are embedded.

    Args:
        cluster_type: "gpu": one worker a GPU; "cpu": processes.
        n_workers: Worker processes.
        scheduler_address: A Dask scheduler to use instead.

    Raises:
        InputError: Another cluster type, no GPU for "gpu", or an option that has no meaning here.
    """
    global _client
    if cluster_type not in ("gpu", "cpu"):
        raise InputError(f"cluster_type is {cluster_type!r}; give 'gpu' or 'cpu'")
    if options:
        raise InputError(
            f"get_client does not know {', '.join(sorted(options))}; workers are set up by tasks/own_cluster.py"
        )
    if cluster_type == "gpu" and scheduler_address is None:
        if not count_gpus():
            raise InputError(
                "get_client: no GPU is visible here; give cluster_type='cpu', "
                "or check nvidia-smi and CUDA_VISIBLE_DEVICES"
            )
        choose_device("gpu")
    _client = ClientSettings(cluster_type, n_workers, scheduler_address)
    return _client


INSTEAD = {
    "metadata": "read the files that save_metadata(path) writes: dask.dataframe.read_parquet(path)",
    "tar_files": "list them: sorted(pathlib.Path(dataset.path).glob('*.tar'))",
    "to_webdataset": "filter the files that save_metadata(path) writes by their column, and write tars of the ids that "
    "are left with webdataset.ShardWriter",
}
"""What takes the place of those attributes of NeMo Curator's dataset that are not here."""


@dataclass(frozen=True)
class ImageTextPairDataset:
    """A WebDataset folder, and the embedders its metadata is to be given columns by."""

    path: str
    id_col: str = "key"
    embedders: tuple[ImageEmbedder, ...] = field(default=())

    @classmethod
    def from_webdataset(cls, path: str | os.PathLike[str], id_col: str) -> Self:
        """A dataset of .tar shards with their metadata Parquets beside them; nothing is read yet."""
        return cls(os.fspath(path).rstrip("/"), id_col)

    def __getattr__(self, name: str) -> NoReturn:
        """Name what takes the place of an attribute that NeMo Curator's dataset has."""
        instead = f"; {INSTEAD[name]}" if name in INSTEAD else ""
        raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{instead}", name=name, obj=self)

    def embed_with(self, embedder: ImageEmbedder) -> Self:
        """The same dataset with one more embedding column to come; lazy."""
        return replace(self, embedders=(*self.embedders, embedder))

    def save_metadata(
        self, path: str | os.PathLike[str] | None = None, columns: Sequence[str] | None = None
    ) -> Manifest:
        """Run the flow and write each shard's metadata with its new columns, file by file, each whole or not at all.

        Every row of the metadata is kept; where an image could not be embedded, its vector is null.

        Args:
            path: The folder to write to; by default the Parquets beside the tars are replaced.
            columns: The columns to keep, with a path; by default all.

        Returns:
            The account of the run. Its counts are of the first embedder; `layers` has all.

        Raises:
            InputError: No embedder, an unknown column, or bad input; no metadata is written then.
            RunFailed: Some shards failed; the metadata of the others is written.
        """
        if not self.embedders:
            raise InputError("this dataset has no embedder yet: with_embeddings = embedder(dataset)")
        target = Folder(self.path if path is None else os.fspath(path).rstrip("/"))
        if columns is not None:
            self._check_columns(columns, in_place=path is None)
        work = f"{target.url}/{WORK_FOLDER}"
        manifest = embed_dataset(
            self.path,
            work,
            self.embedders,
            id_col=self.id_col,
            repeated_ids="quarantine",
            on_error="null",  # these files take the place of the user's own: no row may go
            in_place=path is None,
            device=_client.device,
            workers=_client.workers,
            scheduler=_client.scheduler,
        )
        if path is not None:
            _publish(Folder(work), target, columns)
        if manifest.shards_failed:
            raise RunFailed(manifest)
        return manifest

    def _check_columns(self, columns: Sequence[str], *, in_place: bool) -> None:
        if in_place:
            raise InputError("columns without a path would delete the other columns beside the tars; give a path")
        folder = Folder(self.path)
        for found in folder.list(".parquet")[:1]:
            with folder.open(found.name) as file:
                known = [*pq.read_schema(file).names, *(embedder.image_embedding_column for embedder in self.embedders)]
            unknown = [name for name in columns if name not in known]
            if unknown:
                raise InputError(f"{self.path}: no column {', '.join(unknown)}; there are {', '.join(known)}")


def _publish(work: Folder, target: Folder, columns: Sequence[str] | None) -> None:
    """Write the merged files of a run to a folder of the user's."""
    merged = Folder(f"{work.url}/metadata")
    for found in merged.list(".parquet"):
        with merged.open(found.name) as file:
            table = pq.ParquetFile(file).read(None if columns is None else list(columns), use_threads=False)

        vectors = columns_made(table.schema).keys() & set(table.column_names)
        size = table.schema.names and rows_per_group(max(table.nbytes // max(len(table), 1), 1))

        def save(local: str, table: Any = table, vectors: set[str] = vectors, size: int = size) -> None:
            write_groups(table.schema, [table], local, vectors, size)

        target.write(found.name, save)
