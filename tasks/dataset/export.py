"""A merged dataset in the layouts of other tools, streamed a row group at a time; no image is read again.

A folder takes its name in one step, when all of it is there: an export that was stopped leaves the old one, or none.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.description import DESCRIPTION
from tasks.dataset.schema import read_schema
from tasks.dataset.vectors import VectorFormat, vector_array
from tasks.manifest import MANIFEST
from tasks.relocation import find_places, missing_dataset
from tasks.storage.arrow_file import arrow_file
from tasks.storage.durable import publish
from tasks.storage.folder import Folder
from tasks.storage.temporary_space import scratch

MARK = "export.json"
"""Says what an export was made of; its folder may be replaced by the next one."""
FLAT_BYTES = 4 << 30
"""Vectors that an index may hold in memory; more go to inverted lists on disk."""
BLOCK_BYTES = 512 << 20
"""Vectors that are in memory while such an index is made: those of a block, or those that centres are learnt from."""
TRAINED_ON = 64
"""Vectors that a list's centre is learnt from."""

Dtype = Literal["float32", "float16"]


@dataclass(frozen=True)
class Batch:
    """Rows of the dataset: their columns without the vectors, and (rows, dimensions) float32."""

    metadata: pa.Table
    vectors: np.ndarray


@dataclass(frozen=True)
class Exported:
    """A merged dataset that is to be exported."""

    folder: Folder
    files: tuple[str, ...]
    rows: int
    column: str
    dimensions: int

    @classmethod
    def open(cls, output: str, dataset: str | None = None, column: str | None = None) -> Exported:
        """Find the dataset of an output, from the footers of its files.

        :param dataset: where the tars are, if they are not where the manifest says.
        :param column: the column of vectors, by default that of the last run.
        :raises InputError: there is none, it has no row, or no such column.
        """
        column = column or _stored(output).get("column")
        folder = Folder(_dataset_folder(output, dataset))
        files = tuple(file.name for file in folder.list(".parquet"))
        rows, described = 0, None
        for name in files:
            with arrow_file(folder, name) as file:
                footer = pq.read_metadata(file)
            told = _described(footer, column)
            if told is None:
                raise InputError(f"{folder.url}/{name}: has no embeddings by shard-embed; run flows.embed first")
            rows += footer.num_rows
            described = told if described is None or told["dimensions"] > described["dimensions"] else described
        if described is None or not rows:
            raise InputError(f"{output}: no merged dataset; give the --output of a run of flows.embed")
        return cls(folder, files, rows, described["column"], described["dimensions"])

    @cached_property
    def schema(self) -> pa.Schema:
        """Of the columns beside the vectors, for all files."""
        schema = read_schema(self.folder.url.rstrip("/").removesuffix("/metadata"))
        if schema is None:
            with arrow_file(self.folder, self.files[0]) as file:
                schema = pq.read_schema(file)
        schema = schema.remove_metadata()
        return pa.schema([field for field in schema if field.name != self.column])

    def batches(self) -> Iterator[Batch]:
        """Every row that has a vector, a row group at a time.

        :raises InputError: a file has another schema than the dataset.
        """
        for name in self.files:
            with arrow_file(self.folder, name) as file:
                parquet = pq.ParquetFile(file, page_checksum_verification=True, pre_buffer=False)
                for group in range(parquet.num_row_groups):
                    yield self._batch(name, self._read(name, parquet, group))

    def _read(self, name: str, parquet: pq.ParquetFile, group: int) -> pa.Table:
        try:
            return parquet.read_row_group(group)
        except (OSError, pa.ArrowException) as error:
            way = "run flows.embed with --verify, which makes damaged files again"
            raise InputError(f"{self.folder.url}/{name}: cannot be read ({error}); {way}") from error

    def _batch(self, name: str, table: pa.Table) -> Batch:
        column = table.column(self.column)
        if column.null_count:
            table = table.filter(column.is_valid())
        values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in table.column(self.column).chunks]
        vectors = np.concatenate([np.zeros(0, np.float32), *values]).astype(np.float32, copy=False)
        metadata = table.drop_columns([self.column]).replace_schema_metadata(None)
        try:
            metadata = metadata.cast(self.schema)
        except (pa.ArrowException, ValueError) as error:
            raise InputError(f"{self.folder.url}/{name}: its columns are not those of the other files") from error
        return Batch(metadata, vectors.reshape(len(table), self.dimensions))


def _described(footer: pq.FileMetaData, column: str | None) -> dict[str, Any] | None:
    """What a footer says of a column of vectors, by default the first."""
    described = json.loads((footer.metadata or {}).get(DESCRIPTION, b"[]"))
    vectors = (it for it in described if it["dimensions"] and column in (None, it["column"]))
    return next(vectors, None) or next((it for it in described if column in (None, it["column"])), None)


def _stored(output: str) -> dict[str, Any]:
    """What the manifest of an output says, as it is; nothing if there is none."""
    text = Folder(output).read_text(MANIFEST)
    with contextlib.suppress(ValueError):
        stored = json.loads(text) if text else {}
        return stored if isinstance(stored, dict) else {}
    return {}


def _dataset_folder(output: str, dataset: str | None) -> str:
    """Where the merged dataset of an output lies now: beside the tars if the run was in place.

    :raises InputError: it was, and the tars are not where they were.
    """
    text = Folder(output).read_text(MANIFEST)
    stored: Any = {}
    with contextlib.suppress(ValueError):
        stored = json.loads(text) if text else {}
    places = find_places(output, stored if isinstance(stored, dict) else {}, dataset)
    if places.metadata == places.dataset and (missing := missing_dataset(places.dataset)):
        raise InputError(f"{output}: made with --in-place, and {missing}")
    return places.metadata


@contextlib.contextmanager
def whole_folder(target: Folder, made_of: dict[str, Any]) -> Iterator[Path]:
    """A local folder to write to: the target gets what is in it when the block ends well, and nothing when it does not.

    On a disk the folder takes the target's name in one step. In a store, `MARK` says from the first file to the last
    that the export is unfinished.

    :raises InputError: something else is there already.
    :raises OSError: the target cannot be written to.
    """
    if not target.has(MARK) and _is_taken(target):
        raise InputError(f"{target.url}: holds something that is no export; give another --to")
    if target.is_local:
        with _renamed_folder(Path(target.path("")), made_of) as folder:
            yield folder
        return
    target.check_writable()
    with scratch() as folder:
        local = Path(folder, "export")
        local.mkdir()
        yield local
        _upload(local, target, made_of)


def _is_taken(target: Folder) -> bool:
    """Whether there is a file of the name, or anything in the folder."""
    if not target.is_local:
        return bool(target.list(""))
    path = Path(target.path(""))
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _upload(local: Path, target: Folder, made_of: dict[str, Any]) -> None:
    """Put the files of a folder in the place of an earlier export in a store."""
    former = {file.name for file in target.list("")}
    target.write_text(MARK, json.dumps(made_of | {"unfinished": True}, indent=2) + "\n")
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in names:
        target.write(name, lambda path, name=name: os.replace(local / name, path))  # type: ignore[misc]
    for name in former - {MARK, *names}:
        target.remove(name)
    target.write_text(MARK, json.dumps(made_of, indent=2) + "\n")


@contextlib.contextmanager
def _renamed_folder(target: Path, made_of: dict[str, Any]) -> Iterator[Path]:
    """A folder beside the target, which takes its name when the block ends well and goes away when it does not."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        if not Path("/proc", stale.name.split(".")[-2]).exists():
            shutil.rmtree(stale)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    former = target.with_name(f".{target.name}.former.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARK).write_text(json.dumps(made_of, indent=2) + "\n")
        if target.exists():
            target.rename(former)
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)


# --- npy --------------------------------------------------------------------------------------------------------------


class NpyWriter:
    """An .npy file of (rows, dimensions) that grows: numpy leaves room in the header for the number of rows."""

    def __init__(self, path: Path, dimensions: int, dtype: Dtype) -> None:
        self.dimensions, self.dtype, self.rows = dimensions, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.rows, self.dimensions)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, vectors: np.ndarray) -> None:
        """Append rows."""
        self._file.write(np.ascontiguousarray(vectors, self.dtype).data)
        self.rows += len(vectors)

    def close(self) -> None:
        """Say in the header how many rows there are."""
        self._file.seek(0)
        self._write_header()
        self._file.close()


def export_npy(dataset: Exported, folder: Path, dtype: Dtype, rows_per_file: int) -> int:
    """The layout of clip-retrieval and autofaiss: img_emb/img_emb_0.npy, metadata/metadata_0.parquet, row by row.

    :return: how many rows were written: those that have a vector.
    """
    digits = len(str(max(0, -(-dataset.rows // rows_per_file) - 1)))
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    total, number = 0, 0
    batches = _cut(dataset.batches(), rows_per_file)
    for ends in batches:
        vectors = NpyWriter(folder / f"img_emb/img_emb_{number:0{digits}}.npy", dataset.dimensions, dtype)
        path = folder / f"metadata/metadata_{number:0{digits}}.parquet"
        with contextlib.closing(vectors), pq.ParquetWriter(path, dataset.schema, compression="zstd") as metadata:
            for batch in ends:
                vectors.write(batch.vectors)
                metadata.write_table(batch.metadata)
        total, number = total + vectors.rows, number + 1
    return total


def _cut(batches: Iterator[Batch], rows: int) -> Iterator[Iterator[Batch]]:
    """A stream of batches as streams of so many rows each; every one has to be used up before the next."""
    waiting = [batch for batch in [next(batches, None)] if batch is not None]

    def some() -> Iterator[Batch]:
        room = rows
        while room:
            if not waiting:
                following = next(batches, None)
                if following is None:
                    return
                waiting.append(following)
            batch = waiting.pop()
            if len(batch.vectors) > room:
                waiting.append(Batch(batch.metadata.slice(room), batch.vectors[room:]))
                batch = Batch(batch.metadata.slice(0, room), batch.vectors[:room])
            room -= len(batch.vectors)
            yield batch
        if not waiting and (following := next(batches, None)) is not None:
            waiting.append(following)

    while waiting:
        yield some()


# --- faiss ------------------------------------------------------------------------------------------------------------


def export_faiss(dataset: Exported, folder: Path, kind: Literal["auto", "flat", "ivf"]) -> int:
    """vectors.index, by inner product, and ids.parquet: the metadata of each of its vectors, in the index's order.

    A flat index is exact and is held in memory. An IVF index is made block by block, and its lists stay on disk in
    vectors.ivfdata: open it with `faiss.read_index(path, faiss.IO_FLAG_ONDISK_SAME_DIR)`.

    :return: how many vectors it has.
    :raises InputError: faiss is not installed.
    """
    faiss = _imported("faiss", "faiss-cpu")
    size = dataset.rows * dataset.dimensions * 4
    flat = kind == "flat" or (kind == "auto" and size <= FLAT_BYTES)
    with pq.ParquetWriter(folder / "ids.parquet", dataset.schema, compression="zstd") as ids:

        def vectors() -> Iterator[np.ndarray]:
            for batch in dataset.batches():
                ids.write_table(batch.metadata)
                yield batch.vectors

        if flat:
            index = faiss.IndexFlatIP(dataset.dimensions)
            for some in vectors():
                index.add(some)
            _write_index(faiss, index, folder / "vectors.index")
            return int(index.ntotal)
        return _write_lists(faiss, dataset, folder, vectors())


def _write_lists(faiss: Any, dataset: Exported, folder: Path, vectors: Iterator[np.ndarray]) -> int:
    """An IVF index with its lists on disk, from blocks that fit in memory."""
    from faiss.contrib.ondisk import merge_ondisk

    lists = int(np.clip(4 * np.sqrt(dataset.rows), 1, 65_536))
    sample = _sample(dataset, min(dataset.rows, TRAINED_ON * lists, BLOCK_BYTES // (4 * dataset.dimensions)))
    lists = max(1, min(lists, len(sample)))
    trained = faiss.IndexIVFFlat(
        faiss.IndexFlatIP(dataset.dimensions), dataset.dimensions, lists, faiss.METRIC_INNER_PRODUCT
    )
    trained.cp.min_points_per_centroid = 1
    trained.train(sample)
    del sample
    blocks: list[str] = []
    empty, total = str(folder / "empty.index"), 0
    _write_index(faiss, trained, empty)
    block = faiss.read_index(empty)

    def close() -> None:
        blocks.append(str(folder / f"block-{len(blocks)}.index"))
        _write_index(faiss, block, blocks[-1])

    for some in vectors:
        block.add_with_ids(some, np.arange(total, total + len(some)))
        total += len(some)
        if block.ntotal * dataset.dimensions * 4 >= BLOCK_BYTES:
            close()
            block = faiss.read_index(empty)
    if block.ntotal or not blocks:
        close()
    index = faiss.read_index(empty)
    merge_ondisk(index, blocks, str(folder / "vectors.ivfdata"))
    _write_index(faiss, index, folder / "vectors.index")
    for path in (empty, *blocks):
        os.unlink(path)
    return total


def _write_index(faiss: Any, index: Any, path: Path | str) -> None:
    """Write an index.

    :raises OSError: it cannot be; faiss raises RuntimeErrors with lines of its source.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).rpartition("Error: ")[2]) from error


def _sample(dataset: Exported, count: int) -> np.ndarray:
    """About `count` vectors, evenly from the whole dataset."""
    step = -(-dataset.rows // max(count, 1))
    return np.concatenate([batch.vectors[::step] for batch in dataset.batches()])


# --- lance ------------------------------------------------------------------------------------------------------------


def export_lance(dataset: Exported, folder: Path, dtype: Dtype) -> int:
    """A Lance dataset with the vectors as fixed-size lists, as its vector search wants them.

    :return: how many rows it has: those that have a vector.
    :raises InputError: lance is not installed.
    """
    lance = _imported("lance", "pylance")
    form = VectorFormat("fixed_size_list", dtype)
    schema = pa.schema([*dataset.schema, pa.field(dataset.column, form.arrow_type(dataset.dimensions))])

    def batches() -> Iterator[pa.RecordBatch]:
        for batch in dataset.batches():
            columns = [*batch.metadata.columns, vector_array(batch.vectors, None, form)]
            yield from pa.table(columns, schema=schema).to_batches()

    written = lance.write_dataset(batches(), str(folder / "data.lance"), schema=schema)
    return int(written.count_rows())


def _imported(module: str, package: str) -> Any:
    try:
        return __import__(module)
    except ImportError as error:
        raise InputError(f"{package} is missing: pip install {package}") from error


WRITERS: dict[str, Callable[..., int]] = {"npy": export_npy, "faiss": export_faiss, "lance": export_lance}
