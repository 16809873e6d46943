"""Which shards of a dataset an output still lacks, by listing both."""

from __future__ import annotations

from collections.abc import Sequence

from tasks.storage.folder import FileInfo, Folder


def new_shards(dataset: str, output: str, merged: bool = True) -> Sequence[FileInfo]:
    """Return the tars of a dataset that an output lacks a file of: of some layer, or of the merged dataset.

    Args:
        dataset: Folder or fsspec URL with the .tar shards.
        output: Folder or fsspec URL of the output.
        merged: Look for the merged files too. Where the dataset is merged in place, their names tell nothing.

    Raises:
        InputError: The dataset cannot be listed.
    """
    layers: dict[str, set[str]] = {}
    for name in _names(output, "layers"):
        layer, _, shard = name.partition("/")
        layers.setdefault(layer, set()).add(shard)
    done = set.intersection(*layers.values()) if layers else set()
    if done and merged:
        done &= _names(output, "merged") or _names(output, "metadata")  # with --rows-per-file, or without
    return [tar for tar in Folder(dataset).list(".tar") if tar.name.removesuffix(".tar") not in done]


def _names(output: str, kind: str) -> set[str]:
    """Return the names of the Parquet files in a folder of an output, without their ending."""
    return {file.name.removesuffix(".parquet") for file in Folder(Folder(output).place(kind)).list(".parquet")}
