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
READ_BYTES = 1 << 16
PAGE_BYTES = 1 << 18
"""Bytes of a page: its checksum is made and checked while it lies in the processor's cache."""
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
        """Return it as plain JSON, for the key."""
        return asdict(self)

    def arrow_type(self, dimensions: int, dtype: str = "float32") -> pa.DataType:
        """Return the Arrow type of a column of vectors.

        Args:
            dimensions: The length of its vectors.
            dtype: What numpy calls their values in the layer; only float32 is narrowed to float16.
        """
        narrow = self.dtype == "float16" and dtype == "float32"
        value = pa.field("element", pa.from_numpy_dtype("float16" if narrow else dtype), nullable=False)
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
    """Return a matrix as an Arrow array, over the same memory where the type allows.

    Args:
        vectors: (n, dimensions), any numbers.
        valid: (rows,) bool with n true values: where vectors stand among nulls; by default there are no nulls.
        form: How they are held.

    Raises:
        MalformedShard: A value does not fit float16.
    """
    kind = form.arrow_type(vectors.shape[1], str(vectors.dtype))
    if kind.value_type == pa.float16() and vectors.dtype != np.float16:
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


def as_matrix(vectors: pa.Array, name: str, dimensions: int) -> np.ndarray:
    """Return a column's vectors as (rows, dimensions), over the same memory.

    Args:
        vectors: Lists of numbers.
        name: How messages call the column.
        dimensions: The length that each vector must have.

    Raises:
        MalformedShard: A vector is null, or they have other dimensions.
    """
    values = vectors.flatten()
    if vectors.null_count or len(values) != len(vectors) * dimensions:
        raise MalformedShard(f"vectors of {name!r} are not all of {dimensions} dimensions")
    return values.to_numpy(zero_copy_only=False).reshape(len(vectors), dimensions)


def scratch(name: str, shape: tuple[int, int], dtype: np.dtype[Any]) -> np.ndarray:
    """Return a matrix in memory of this thread that is used again: fresh pages cost more than what is copied there.

    It holds until the thread asks for the same name.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    kept: np.ndarray | None = getattr(_kept, name, None)
    if kept is None or len(kept) < size:
        setattr(_kept, name, None)  # not both at once
        kept = np.empty(size, np.uint8)
        setattr(_kept, name, kept)
    return kept[:size].view(dtype).reshape(shape)


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
            writer.write_table(in_small_chunks(table, vectors), row_group_size=rows)


def in_small_chunks(table: pa.Table, columns: Collection[str]) -> pa.Table:
    """Return a table with some columns in chunks of a page, over the same memory.

    Parquet's writer makes two numbers of each value, a chunk at a time: 8 % faster, and half the memory, if they stay
    in the processor's cache.
    """
    for number, name in enumerate(table.schema.names):
        column = table.column(number)
        if name not in columns or column.nbytes <= PAGE_BYTES:
            continue
        size = max(1, PAGE_BYTES * len(column) // column.nbytes)
        chunks = [chunk.slice(at, size) for chunk in column.chunks for at in range(0, len(chunk), size)]
        table = table.set_column(number, table.schema.field(number), pa.chunked_array(chunks, column.type))
    return table


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
        "data_page_size": PAGE_BYTES,
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
