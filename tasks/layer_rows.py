"""Rows of a layer file, taken for the merged dataset a row group at a time."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import MalformedShard
from tasks.dataset.vectors import PLAIN, READ_BYTES, VectorFormat, vector_array
from tasks.plan import MergedColumn, MergeOptions
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file


def column_type(column: MergedColumn, form: VectorFormat) -> pa.DataType:
    """Return the Arrow type of a layer's column in the merged dataset."""
    if not column.shape:
        return pa.from_numpy_dtype(column.dtype)
    if column.dtype == "float32":
        return form.arrow_type(column.dimensions)
    return pa.list_(pa.field("element", pa.from_numpy_dtype(column.dtype), nullable=False))


def row_bytes(options: MergeOptions) -> int:
    """Return the bytes of the vectors in a merged row."""
    return sum(4 * column.dimensions for column in options.columns)


class LayerRows:
    """The rows of a layer file by their numbers. Rows that ascend are read once, a row group at a time."""

    def __init__(self, file: Any, columns: list[MergedColumn], form: VectorFormat) -> None:
        self._parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=READ_BYTES, pre_buffer=False)
        known = set(self._parquet.schema_arrow.names)
        self._columns = [column for column in columns if column.name in known]
        self._form = form
        sizes = [self._parquet.metadata.row_group(i).num_rows for i in range(self._parquet.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._groups: dict[int, pa.Table] = {}

    @classmethod
    @contextlib.contextmanager
    def open(cls, shard: Shard, layer: str, options: MergeOptions) -> Iterator[Self]:
        """Open a shard's file of a layer."""
        columns = [column for column in options.columns if column.layer == layer]
        with arrow_file(shard.target, shard.layer_file(layer)) as file:
            yield cls(file, columns, options.form)

    def take(self, places: np.ndarray) -> dict[str, pa.Array | pa.ChunkedArray]:
        """Return some rows by column.

        Args:
            places: (n,) int64, the numbers of the rows; -1 for a row of nulls.

        Raises:
            MalformedShard: A vector is null or has other dimensions than the record says.
        """
        valid = places >= 0
        wanted = places[valid]
        table, first = self._covering(wanted)
        return {column.name: self._column(column, table, wanted - first, valid) for column in self._columns}

    def _covering(self, wanted: np.ndarray) -> tuple[pa.Table, int]:
        """Return the row groups that hold some rows, one after the other, and the number of their first row."""
        if not len(wanted):
            return self._parquet.schema_arrow.empty_table(), 0
        first, last = (int(np.searchsorted(self._starts, it, "right")) - 1 for it in (wanted.min(), wanted.max()))
        names = [column.name for column in self._columns]
        self._groups = {
            group: self._groups[group]
            if group in self._groups
            else self._parquet.read_row_group(group, columns=names, use_threads=False)
            for group in range(first, last + 1)
        }
        return pa.concat_tables(self._groups.values()), int(self._starts[first])

    def _column(
        self, column: MergedColumn, table: pa.Table, rows: np.ndarray, valid: np.ndarray
    ) -> pa.Array | pa.ChunkedArray:
        values = table.column(column.name)
        adjoining = len(rows) and (np.diff(rows) == 1).all()
        if adjoining and valid.all() and (not column.shape or self._form == PLAIN or column.dtype != "float32"):
            return values.slice(rows[0], len(rows))
        if not column.shape or column.dtype != "float32":
            indices = np.full(len(valid), -1, np.int64)
            indices[valid] = rows
            return values.take(pa.array(indices, mask=~valid))
        parts = [self._matrix(chunk, column) for chunk in values.chunks]
        matrix = parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros((0, 0), np.float32)
        chosen = matrix[rows[0] : rows[0] + len(rows)] if adjoining else matrix[rows]
        if not len(rows):
            chosen = np.zeros((0, column.dimensions), np.float32)
        return vector_array(chosen, valid, self._form)

    @staticmethod
    def _matrix(chunk: pa.Array, column: MergedColumn) -> np.ndarray:
        values = chunk.flatten()
        if chunk.null_count or len(values) != len(chunk) * column.dimensions:
            raise MalformedShard(f"vectors of {column.name!r} are not all of {column.dimensions} dimensions")
        return values.to_numpy(zero_copy_only=False).reshape(-1, column.dimensions)
