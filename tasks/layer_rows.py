"""Rows of a layer file, taken for the merged dataset a row group at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from tasks.dataset.vectors import READ_BYTES, VectorFormat, as_matrix, rows_per_group, scratch, vector_array
from tasks.plan import MergedColumn, MergeOptions
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file

HELD_BYTES = 64 << 20
"""Vectors of a shard that are held in memory if its rows are in another order; more lie in a file below TMPDIR."""

BATCH_BYTES = 1 << 20
"""Vectors that are decoded at a time on their way there."""


def column_type(column: MergedColumn, form: VectorFormat) -> pa.DataType:
    """Return the Arrow type of a layer's column in the merged dataset."""
    if not column.shape:
        return pa.from_numpy_dtype(column.dtype)
    return form.arrow_type(column.dimensions, column.dtype)


def vector_columns(options: MergeOptions) -> list[str]:
    """Return the columns of vectors of floats: they do not compress. Integers do, as all other columns."""
    return [column.name for column in options.columns if column.shape and np.dtype(column.dtype).kind == "f"]


def row_bytes(options: MergeOptions) -> int:
    """Return the bytes that the layers' columns take in a merged row."""
    return sum(np.dtype(column.dtype).itemsize * max(column.dimensions, 1) for column in options.columns)


def group_rows(options: MergeOptions) -> int:
    """Return the rows of a row group of the merged dataset."""
    return rows_per_group(row_bytes(options))


class LayerFile:
    """An open layer file of a shard."""

    def __init__(self, file: Any, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=READ_BYTES, pre_buffer=False)
        known = set(self._parquet.schema_arrow.names)
        self._columns = [column for column in columns if column.name in known]
        self._form = form

    @classmethod
    @contextlib.contextmanager
    def open(cls, shard: Shard, layer: str, options: MergeOptions) -> Iterator[Self]:
        """Open a shard's file of a layer, for the columns that the merged dataset has of it."""
        columns = [column for column in options.columns if column.layer == layer]
        with arrow_file(shard.target, shard.layer_file(layer)) as file:
            yield cls(file, columns, options.form)

    def ids(self) -> pa.ChunkedArray:
        """Return the ids of all rows, as text."""
        return self._parquet.read(["id"], use_threads=False).column(0)

    def values(self, places: np.ndarray) -> LayerValues:
        """Return the values for the rows of a shard.

        Args:
            places: (rows of the metadata,) int64: the layer's row for each, or -1.
        """
        found = places[places >= 0]
        in_order = bool((found[1:] > found[:-1]).all())
        kind = OrderedValues if in_order else ShuffledValues
        return kind(self._parquet, self._columns, self._form)


class LayerValues(Protocol):
    """The values of a layer by the numbers of its rows."""

    def take(self, places: np.ndarray) -> dict[str, pa.ChunkedArray]:
        """Return some rows by column; they hold until the next ones are taken.

        Args:
            places: (n,) int64, the numbers of the rows; -1 for a row of nulls.

        Returns:
            n values of each column; nothing if there are only nulls.

        Raises:
            MalformedShard: A vector is null or has other dimensions than the record says.
        """
        ...


class OrderedValues:
    """Values in the order of the layer: each row group is read once and passed on without a copy."""

    def __init__(self, parquet: pq.ParquetFile, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._parquet = parquet
        self._columns = columns
        self._form = form
        sizes = [parquet.metadata.row_group(i).num_rows for i in range(parquet.num_row_groups)]
        self._starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        self._held = -1
        self._group: pa.Table | None = None

    def take(self, places: np.ndarray) -> dict[str, pa.ChunkedArray]:
        """Return some rows by column; see `LayerValues`."""
        wanted = places[places >= 0]
        if not len(wanted):
            return {}
        first, last = np.searchsorted(self._starts, wanted[[0, -1]], "right") - 1
        reached = np.maximum.accumulate(places)  # a row without a value goes with the one before it
        cuts = [0, *np.searchsorted(reached, self._starts[first + 1 : last + 1]), len(places)]
        parts = [
            self._part(group, places[start:stop])
            for group, start, stop in zip(range(first, last + 1), cuts, cuts[1:], strict=False)
            if stop > start
        ]
        return {
            column.name: pa.chunked_array([part[number] for part in parts], column_type(column, self._form))
            for number, column in enumerate(self._columns)
        }

    def _part(self, group: int, places: np.ndarray) -> list[pa.Array]:
        """Return each column's values of rows of one row group."""
        if group != self._held:
            self._group = None  # not both at once
            names = [column.name for column in self._columns]
            self._group = self._parquet.read_row_group(group, columns=names, use_threads=False).combine_chunks()
            self._held = group
        assert self._group is not None
        valid = places >= 0
        rows = places[valid] - self._starts[group]
        return [self._array(column, self._group.column(column.name), rows, valid) for column in self._columns]

    def _array(self, column: MergedColumn, values: pa.ChunkedArray, rows: np.ndarray, valid: np.ndarray) -> pa.Array:
        adjoining = len(rows) == rows[-1] - rows[0] + 1
        matrix = as_matrix(values, column.name, column.dimensions) if column.shape else None
        if adjoining and len(rows) == len(valid) and values.type == column_type(column, self._form):
            return values.chunk(0).slice(rows[0], len(rows))
        if matrix is None:
            return _numbers(values, rows, valid)
        chosen = matrix[rows[0] : rows[-1] + 1] if adjoining else matrix[rows]
        return vector_array(chosen, valid, self._form)


class ShuffledValues:
    """Values in any order: all vectors of a shard are laid out first, in memory or, if they are many, in a file."""

    def __init__(self, parquet: pq.ParquetFile, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._columns = columns
        self._form = form
        self._numbers = {
            column.name: parquet.read([column.name], use_threads=False).column(column.name)
            for column in columns
            if not column.shape
        }
        self._matrices = {column.name: _matrix(parquet, column) for column in columns if column.shape}

    def take(self, places: np.ndarray) -> dict[str, pa.ChunkedArray]:
        """Return some rows by column; see `LayerValues`."""
        valid = places >= 0
        rows = places[valid]
        if not len(rows):
            return {}
        return {column.name: pa.chunked_array([self._array(column, rows, valid)]) for column in self._columns}

    def _array(self, column: MergedColumn, rows: np.ndarray, valid: np.ndarray) -> pa.Array:
        if not column.shape:
            return _numbers(self._numbers[column.name], rows, valid)
        matrix = self._matrices[column.name]
        out = scratch(f"rows of {column.name}", (len(rows), matrix.shape[1]), matrix.dtype)
        return vector_array(np.take(matrix, rows, axis=0, out=out, mode="clip"), valid, self._form)


def _numbers(values: pa.ChunkedArray, rows: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Return some of a column's values among nulls."""
    indices = np.zeros(len(valid), np.int64)
    indices[valid] = rows
    taken = values.take(pa.array(indices, mask=~valid))
    return taken.chunk(0) if taken.num_chunks == 1 else taken.combine_chunks()


def _matrix(parquet: pq.ParquetFile, column: MergedColumn) -> np.ndarray:
    """Return all vectors of a file, (rows, dimensions), in memory of this thread or mapped from a file without a name.

    Batch by batch: read as a whole, the column takes several times its size while it is decoded.
    """
    dtype, shape = np.dtype(column.dtype), (parquet.metadata.num_rows, column.dimensions)
    size = dtype.itemsize * shape[1]
    batches = (
        as_matrix(pa.chunked_array([batch.column(0)]), column.name, column.dimensions)
        for batch in parquet.iter_batches(max(1, BATCH_BYTES // size), columns=[column.name], use_threads=False)
    )
    if size * shape[0] > HELD_BYTES:
        with tempfile.TemporaryFile() as file:
            for batch in batches:
                file.write(np.ascontiguousarray(batch).data)
            file.flush()
            return np.memmap(file, dtype, "r", shape=shape)  # lasts longer than the file's name and handle
    matrix, at = scratch(f"matrix of {column.name}", shape, dtype), 0
    for batch in batches:
        matrix[at : at + len(batch)] = batch
        at += len(batch)
    return matrix
