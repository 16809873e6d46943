"""MergeOptions: which layers are joined with the metadata, and how the result is written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from embedders.fingerprint import digest
from tasks.dataset.vectors import PLAIN, VectorFormat
from tasks.shards import Shard
from tasks.storage.folder import Folder


@dataclass(frozen=True)
class MergedColumn:
    """A column of the merged dataset that comes from a layer; `shape` is () for a number, (512,) for a vector."""

    name: str
    layer: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def dimensions(self) -> int:
        """Return the length of its vectors; 0 for numbers, and until there is one."""
        return self.shape[0] if self.shape else 0


@dataclass(frozen=True)
class MergeOptions:
    """How layers and metadata are joined, and how the result is written.

    Attributes:
        id_col: The column with the ids in the metadata.
        layers: The layers that are joined, sorted by name.
        columns: Their columns, as far as they are known; those of tensors and of several rows per sample stay in their
            layer.
        null_rows: Whether rows without any value stay, with nulls.
        strict: Whether metadata that repeats an id fails its shard.
        form: How vectors are held.
        in_place: Whether the columns are added to the Parquets beside the tars.
        rows_per_file: Rows of each file of the dataset, None for a file per shard.
        schema: What the metadata of all shards has in common, None where each file keeps its own.
        made_of: The fingerprint of each layer, for the files' footers.
    """

    id_col: str
    layers: tuple[str, ...] = ()
    columns: tuple[MergedColumn, ...] = ()
    null_rows: bool = False
    strict: bool = False
    form: VectorFormat = PLAIN
    in_place: bool = False
    rows_per_file: int | None = None
    schema: pa.Schema | None = None
    made_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, compare=False)

    @property
    def keep_rows(self) -> bool:
        """Whether rows without a value stay: always in the user's own files."""
        return self.null_rows or self.in_place

    @property
    def names(self) -> tuple[str, ...]:
        """Return the names that the dataset's new columns have, or will have: known columns, and layers without any."""
        known = {column.layer for column in self.columns}
        return tuple(dict.fromkeys([*(c.name for c in self.columns), *(it for it in self.layers if it not in known)]))

    def as_dict(self) -> dict[str, Any]:
        """Return what changes a merged file as plain JSON, for its key."""
        parts = {"id_col": self.id_col, "null_rows": self.keep_rows, **self.form.as_dict()}
        columns = [[c.name, c.layer, c.dtype, self._size(c)] for c in self.columns]
        return parts | {"columns": columns, "schema": self._schema_digest, "in_place": self.in_place}

    def _size(self, column: MergedColumn) -> int | None:
        """Return what the type of a column in the file depends on."""
        if not column.shape:
            return None
        return column.dimensions if self.form.type == "fixed_size_list" else 0

    @cached_property
    def _schema_digest(self) -> str | None:
        return None if self.schema is None else digest(str(self.schema.remove_metadata()))

    def place(self, shard: Shard) -> tuple[Folder, str]:
        """Where a shard's merged file lies: a folder, and the file's name in it."""
        return self.folder(shard), f"{shard.name}.parquet"

    def folder(self, shard: Shard) -> Folder:
        """The folder of merged files: beside the tars, in the output, or where files of many shards are made from."""
        if self.in_place:
            return shard.source
        return Folder(f"{shard.output.rstrip('/')}/{'metadata' if self.rows_per_file is None else 'merged'}")
