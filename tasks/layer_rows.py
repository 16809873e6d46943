"""Rows of a layer file, taken for the merged dataset a row group at a time."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import MalformedShard, one_line
from tasks.dataset.vectors import READ_BYTES, VectorFormat, as_matrix, rows_per_group, scratch, vector_array
from tasks.layers import ID
from tasks.merge_options import MergedColumn, MergeOptions
from tasks.records import PART, LayerRecord
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file

HELD_BYTES = 64 << 20
"""Vectors of a shard that are held in memory if its rows are in another order; more lie in a file below TMPDIR."""

BATCH_BYTES = 1 << 18
"""Values that are decoded at a time: what stays in the processor's cache."""


def column_type(column: MergedColumn, form: VectorFormat) -> pa.DataType:
    """Return the Arrow type of a layer's column in the merged dataset."""
    if not column.shape:
        return pa.from_numpy_dtype(column.dtype)
    return form.arrow_type(column.dimensions, column.dtype)


def vector_columns(options: MergeOptions) -> list[str]:
    """Return the columns of vectors of floats: they do not compress. Integers do, as all other columns."""
    return [column.name for column in options.columns if column.shape and np.dtype(column.dtype).kind == "f"]


def bytes_of(column: MergedColumn) -> int:
    """Return the bytes of a layer's value."""
    return np.dtype(column.dtype).itemsize * max(column.dimensions, 1)


def group_rows(options: MergeOptions) -> int:
    """Return the rows of a row group of the merged dataset."""
    return rows_per_group(sum(bytes_of(column) for column in options.columns))


def check_column_types(shard: Shard, record: LayerRecord, options: MergeOptions) -> None:
    """Prove that a layer's columns are what other shards have of it.

    Raises:
        MalformedShard: One has another type or shape.
    """
    for column in options.columns:
        here = record.columns.get(column.name) if column.layer == record.layer and record.embedded else None
        if here is not None and (here.dtype, here.shape) != (column.dtype, column.shape):
            of = f"{here.dtype} of shape {here.shape}, and in another shard {column.dtype} of shape {column.shape}"
            where = f"{shard.layer_file(record.layer)}: column {column.name!r}"
            raise MalformedShard(f"{where} has {of}; delete the wrong file, and have the model give one type")


@contextlib.contextmanager
def _naming(where: str) -> Iterator[None]:
    """Say which file it is that Arrow cannot read.

    Raises:
        MalformedShard: Its content is damaged.
    """
    try:
        yield
    except (OSError, pa.ArrowException) as error:
        if getattr(error, "errno", None) is not None:
            raise  # the disk's error; what Arrow says of a file's content has no number
        what = one_line(error, limit=120)
        raise MalformedShard(f"{where}: damaged ({what}); delete it, and run the command that made it again") from error


class _Source(NamedTuple):
    """An open layer file, and how messages name it."""

    parquet: pq.ParquetFile
    where: str


class LayerFile:
    """An open layer file of a shard."""

    def __init__(self, source: _Source, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._source = source
        known = set(source.parquet.schema_arrow.names)
        self._columns = [column for column in columns if column.name in known]
        self._form = form

    @classmethod
    @contextlib.contextmanager
    def open(cls, shard: Shard, layer: str, options: MergeOptions) -> Iterator[Self]:
        """Open a shard's file of a layer, for the columns that the merged dataset has of it."""
        columns = [column for column in options.columns if column.layer == layer]
        name = shard.layer_file(layer)
        where = shard.target.place(name)
        with arrow_file(shard.target, name) as file:
            with _naming(where):
                parquet = pq.ParquetFile(
                    file, page_checksum_verification=True, buffer_size=READ_BYTES, pre_buffer=False
                )
            yield cls(_Source(parquet, where), columns, options.form)

    def ids(self) -> pa.ChunkedArray:
        """Return the ids of its samples as text, each once."""
        with _naming(self._source.where):
            ids = self._source.parquet.read([ID], use_threads=False).column(0)
        several = PART in self._source.parquet.schema_arrow.names
        return pa.chunked_array([ids.unique()]) if several else ids

    def values(self, places: np.ndarray) -> LayerValues:
        """Return the values for the rows of a shard.

        Args:
            places: (rows of the metadata,) int64: the layer's row for each, or -1.
        """
        found = places[places >= 0]
        in_order = bool((found[1:] > found[:-1]).all())
        kind = OrderedValues if in_order else ShuffledValues
        return kind(self._source, self._columns, self._form)


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
    """Values in the order of the layer: read once, a batch at a time, and passed on without a copy."""

    def __init__(self, source: _Source, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._columns = columns
        self._form = form
        self._batches = _batches(source, columns)
        self._batch: pa.RecordBatch | None = None
        self._first = self._stop = 0

    def take(self, places: np.ndarray) -> dict[str, pa.ChunkedArray]:
        """Return some rows by column; see `LayerValues`."""
        if not self._columns or not (places >= 0).any():
            return {}
        reached = np.maximum.accumulate(places)  # a row without a value goes with the one before it
        parts: list[list[pa.Array]] = []
        done = 0
        while done < len(places):
            stop = int(np.searchsorted(reached, self._stop))
            if stop > done:
                parts.append(self._part(places[done:stop]))
                done = stop
            if done < len(places):
                self._batch = next(self._batches)
                self._first, self._stop = self._stop, self._stop + len(self._batch)
        return {
            column.name: pa.chunked_array([part[number] for part in parts], column_type(column, self._form))
            for number, column in enumerate(self._columns)
        }

    def _part(self, places: np.ndarray) -> list[pa.Array]:
        """Return each column's values of rows of one batch."""
        valid = places >= 0
        rows = places[valid] - self._first
        if self._batch is None or not len(rows):
            return [pa.nulls(len(places), column_type(column, self._form)) for column in self._columns]
        return [self._array(column, self._batch.column(column.name), rows, valid) for column in self._columns]

    def _array(self, column: MergedColumn, values: pa.Array, rows: np.ndarray, valid: np.ndarray) -> pa.Array:
        adjoining = len(rows) == rows[-1] - rows[0] + 1
        matrix = as_matrix(values, column.name, column.dimensions) if column.shape else None
        if adjoining and len(rows) == len(valid) and values.type == column_type(column, self._form):
            return values.slice(rows[0], len(rows))
        if matrix is None:
            return _numbers(values, rows, valid)
        chosen = matrix[rows[0] : rows[-1] + 1] if adjoining else matrix[rows]
        return vector_array(chosen, valid, self._form)


class ShuffledValues:
    """Values in any order: all vectors of a shard are laid out first, in memory or, if they are many, in a file."""

    def __init__(self, source: _Source, columns: Sequence[MergedColumn], form: VectorFormat) -> None:
        self._columns = columns
        self._form = form
        self._numbers = {column.name: _read(source, column.name) for column in columns if not column.shape}
        self._matrices = {column.name: _matrix(source, column) for column in columns if column.shape}

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


def _numbers(values: pa.Array, rows: np.ndarray, valid: np.ndarray) -> pa.Array:
    """Return some of a column's values among nulls."""
    indices = np.zeros(len(valid), np.int64)
    indices[valid] = rows
    return values.take(pa.array(indices, mask=~valid))


def _read(source: _Source, name: str) -> pa.Array:
    with _naming(source.where):
        return source.parquet.read([name], use_threads=False).column(name).combine_chunks()


def _batches(source: _Source, columns: Sequence[MergedColumn]) -> Iterator[pa.RecordBatch]:
    """Yield a file's rows a few at a time: decoding a whole column takes several times its size."""
    names = [column.name for column in columns]
    size = max(1, BATCH_BYTES // max(1, sum(bytes_of(column) for column in columns)))
    for group in range(source.parquet.num_row_groups):
        with _naming(source.where):
            yield from source.parquet.iter_batches(size, row_groups=[group], columns=names, use_threads=False)


def _matrix(source: _Source, column: MergedColumn) -> np.ndarray:
    """Return all vectors of a file, (rows, dimensions): in memory, or mapped from a file without a name."""
    dtype, shape = np.dtype(column.dtype), (source.parquet.metadata.num_rows, column.dimensions)
    parts = (as_matrix(it.column(0), column.name, column.dimensions) for it in _batches(source, [column]))
    if bytes_of(column) * shape[0] > HELD_BYTES:
        with tempfile.TemporaryFile() as file:
            for part in parts:
                file.write(np.ascontiguousarray(part).data)
            file.flush()
            return np.memmap(file, dtype, "r", shape=shape)  # lasts longer than the file's name and handle
    matrix, at = scratch(f"matrix of {column.name}", shape, dtype), 0
    for part in parts:
        matrix[at : at + len(part)] = part
        at += len(part)
    return matrix
