"""Vectors as a Parquet column: one matrix's memory under a type that readers know, without dictionary or statistics."""

from __future__ import annotations

import threading
from collections.abc import Collection, Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import MalformedShard

GROUP_BYTES = 8 << 20
"""Bytes of vectors in a row group: what a reader and a writer hold at once, large enough for a request to a store."""
LARGEST_GROUP_BYTES = 64 << 20
"""A row group may take this much before it gets fewer rows than `SMALLEST_GROUP`."""
READ_BYTES = 1 << 20
SMALLEST_GROUP, LARGEST_GROUP = 1024, 1 << 17
"""Rows of a row group, whatever the dimensions; DuckDB scans groups of 122,880 best."""


@dataclass(frozen=True)
class VectorFormat:
    """How the merged dataset holds its vectors.

    `list<float32>` is what every reader opens: dask-cudf refuses a fixed-size list, and cuDF reads float16 as text.
    """

    type: Literal["list", "fixed_size_list"] = "list"
    dtype: Literal["float32", "float16"] = "float32"
    encoding: Literal["plain", "byte_stream_split"] = "plain"

    def as_dict(self) -> dict[str, str]:
        """Plain JSON, for the key."""
        return asdict(self)

    def arrow_type(self, dimensions: int) -> pa.DataType:
        """The Arrow type of a column of vectors."""
        value = pa.field("element", pa.float16() if self.dtype == "float16" else pa.float32(), nullable=False)
        if self.type == "list":
            return pa.list_(value)
        return pa.list_(value, max(dimensions, 1))  # Arrow divides by the size


PLAIN = VectorFormat()
"""What layer files hold."""


def rows_per_group(row_bytes: int) -> int:
    """Return the rows of a Parquet row group, for rows of `row_bytes` bytes of vectors."""
    row_bytes = max(row_bytes, 1)
    smallest = int(np.clip(LARGEST_GROUP_BYTES // row_bytes, 1, SMALLEST_GROUP))
    return int(np.clip(GROUP_BYTES // row_bytes, smallest, LARGEST_GROUP))


def vector_array(vectors: np.ndarray, valid: np.ndarray | None = None, form: VectorFormat = PLAIN) -> pa.Array:
    """A matrix as an Arrow array, over the same memory where the type allows.

    :param vectors: (n, dimensions) float32.
    :param valid: (rows,) bool with n true values: where vectors stand among nulls; by default there are no nulls.
    :raises MalformedShard: a value does not fit float16.
    """
    kind = form.arrow_type(vectors.shape[1])
    if form.dtype == "float16":
        with np.errstate(over="ignore"):
            narrow = vectors.astype(np.float16)
        if not np.isfinite(narrow).all() and np.isfinite(vectors).all():
            raise MalformedShard("a value is beyond float16's 65504; take --embedding-dtype float32")
        vectors = narrow
    valid = np.ones(len(vectors), bool) if valid is None else valid
    mask = None if valid.all() else pa.array(~valid)
    if form.type == "fixed_size_list":
        if mask is not None:
            spread = np.zeros((len(valid), vectors.shape[1]), vectors.dtype)
            spread[valid] = vectors
            vectors = spread
        return pa.FixedSizeListArray.from_arrays(_flat(vectors), type=kind, mask=mask)
    ends = np.cumsum(np.where(valid, vectors.shape[1], 0))
    offsets = pa.array(np.concatenate([[0], ends]), pa.int32())  # refuses what does not fit
    return pa.ListArray.from_arrays(offsets, _flat(vectors), type=kind, mask=mask)


def _flat(vectors: np.ndarray) -> pa.Array:
    return pa.array(np.ascontiguousarray(vectors).reshape(-1))


def read_vectors(file: Any, column: str, dimensions: int) -> np.ndarray:
    """A column of vectors of an open Parquet file, (rows, dimensions) float32; page checksums are verified.

    Batch by batch into one matrix: read as a whole, the column takes several times its size while it is decoded. The
    matrix is this thread's, and holds until it reads the next one.

    :raises MalformedShard: a vector is null or has other dimensions.
    """
    parquet = pq.ParquetFile(file, page_checksum_verification=True, buffer_size=READ_BYTES, pre_buffer=False)
    matrix = _scratch("read", parquet.metadata.num_rows, dimensions)
    batch_rows, at = max(1, READ_BYTES // (4 * max(dimensions, 1))), 0
    for batch in parquet.iter_batches(batch_rows, columns=[column], use_threads=False):
        vectors = batch.column(0)
        values = vectors.flatten()
        if vectors.null_count or len(values) != len(vectors) * dimensions:
            raise MalformedShard(f"vectors are not all of {dimensions} dimensions")
        matrix[at : at + len(vectors)] = values.to_numpy(zero_copy_only=False).reshape(-1, dimensions)
        at += len(vectors)
    return matrix


def take_rows(matrix: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Some rows of a matrix in any order: a view where they adjoin, else this thread's until it takes the next."""
    if len(places) and (np.diff(places) == 1).all():
        return matrix[places[0] : places[0] + len(places)]
    return np.take(matrix, places, axis=0, out=_scratch("take", len(places), matrix.shape[1]), mode="clip")


def _scratch(name: str, rows: int, dimensions: int) -> np.ndarray:
    """A matrix in memory of this thread that is used again: fresh pages cost more than what is copied into them."""
    size = rows * dimensions
    kept: np.ndarray | None = getattr(_kept, name, None)
    if kept is None or len(kept) < size:
        setattr(_kept, name, None)  # not both at once
        kept = np.empty(size, np.float32)
        setattr(_kept, name, kept)
    return kept[:size].reshape(rows, dimensions)


_kept = threading.local()


def write_vectors(table: pa.Table, path: str, column: str, encoding: str = "plain") -> None:
    """Write a table whose `column` holds vectors."""
    write_groups(table.schema, [table], path, [column], rows_per_group(4 * _dimensions(table, column)), encoding)


def write_groups(
    schema: pa.Schema,
    tables: Iterable[pa.Table],
    path: str,
    vectors: Collection[str],
    rows: int,
    encoding: str = "plain",
) -> None:
    """Write tables one after the other, each as row groups of at most `rows`; see `parquet_options`."""
    with pq.ParquetWriter(path, schema, **parquet_options(schema, vectors, encoding)) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=rows)


def parquet_options(schema: pa.Schema, vectors: Collection[str], encoding: str = "plain") -> dict[str, Any]:
    """Return how a ParquetWriter writes a schema.

    Floats do not compress and need no dictionary or statistics, unless their bytes are split into streams; the other
    columns are compressed with zstd. Pages carry checksums.

    Args:
        schema: Of what is written.
        vectors: The names of the columns that hold vectors.
        encoding: Of their values, "plain" or "byte_stream_split".
    """
    leaves = [(field.name, leaf) for field in schema for leaf in _leaves(pa.schema([field]))]
    ours = [leaf for name, leaf in leaves if name in vectors]
    others = [leaf for name, leaf in leaves if name not in vectors]
    split = encoding == "byte_stream_split"
    return {
        "compression": {**dict.fromkeys(ours, "zstd" if split else "none"), **dict.fromkeys(others, "zstd")},
        "compression_level": dict.fromkeys(ours, 1) if split else None,
        "column_encoding": dict.fromkeys(ours, "BYTE_STREAM_SPLIT") if split else None,
        "use_dictionary": others or False,
        "write_statistics": others or False,
        "write_page_checksum": True,
    }


def _leaves(schema: pa.Schema) -> list[str]:
    """The Parquet column paths of a schema."""
    if not schema.names:
        return []
    sink = pa.BufferOutputStream()
    pq.ParquetWriter(sink, schema).close()
    parquet = pq.ParquetFile(pa.BufferReader(sink.getvalue())).schema
    return [parquet.column(i).path for i in range(len(parquet))]


def _dimensions(table: pa.Table, column: str) -> int:
    kind = table.schema.field(column).type
    if pa.types.is_fixed_size_list(kind):
        return int(kind.list_size)
    for chunk in table.column(column).chunks:
        rows = len(chunk) - chunk.null_count
        if rows:
            return len(chunk.flatten()) // rows
    return 0
