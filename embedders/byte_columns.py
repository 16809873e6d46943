"""Columns of byte strings in Arrow's memory: a name in a tar need not be UTF-8, and as an object it takes 60 bytes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedders.ids import printable

BLOCK_ROWS = 1 << 13
"""Rows that are worked on at once: what is needed on the way fits in a core's cache, whatever the column's length."""


def blocks(rows: int) -> Iterator[slice]:
    """Yield the slices that cover so many rows; at least one, which may be empty."""
    for start in range(0, max(rows, 1), BLOCK_ROWS):
        yield slice(start, min(start + BLOCK_ROWS, rows))


def byte_column(data: bytes | np.ndarray, offsets: np.ndarray) -> pa.LargeBinaryArray:
    """Return a column of n byte strings without a copy.

    Args:
        data: All strings, one after the other, as bytes or (b,) uint8.
        offsets: (n + 1,) int64, where each string begins, and the end of the last.
    """
    buffers = [None, pa.py_buffer(np.ascontiguousarray(offsets, np.int64)), pa.py_buffer(data)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(offsets) - 1, buffers)


def bytes_and_offsets(column: pa.LargeBinaryArray, rows: slice) -> tuple[np.ndarray, np.ndarray]:
    """Return the bytes of n rows, (b,) uint8, and where in them each row begins and the last ends, (n + 1,) int64."""
    count = rows.stop - rows.start
    if not count:
        return np.zeros(0, np.uint8), np.zeros(1, np.int64)
    _, places, data = column.buffers()
    offsets = np.frombuffer(places, np.int64, count + 1, 8 * (column.offset + rows.start))
    start, size = int(offsets[0]), int(offsets[-1] - offsets[0])
    return np.frombuffer(data, np.uint8, size, start) if size else np.zeros(0, np.uint8), offsets - start


def cut_out(data: np.ndarray, starts: np.ndarray, stops: np.ndarray) -> pa.LargeBinaryArray:
    """Return the column of the strings data[starts[i]:stops[i]].

    Args:
        data: (b,) uint8.
        starts: (n,) int64.
        stops: (n,) int64, none before its start.
    """
    lengths = stops - starts
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    return byte_column(data[np.arange(offsets[-1]) + np.repeat(starts - offsets[:-1], lengths)], offsets)


def joined(columns: Sequence[pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    """Return several columns as one."""
    return pa.concat_arrays(columns) if len(columns) != 1 else columns[0]


def coded(column: pa.LargeBinaryArray) -> tuple[np.ndarray, pa.LargeBinaryArray]:
    """Return which of its distinct strings each row is, and these in the order of their first rows.

    Rows that come in ascending order, as most tars have their keys, are told apart by comparing neighbours: a table of
    hashes takes 100 bytes a row.
    """
    if not len(column):
        return np.zeros(0, np.int64), column
    fresh = np.append(True, pc.not_equal(column[1:], column[:-1]).to_numpy(zero_copy_only=False))
    distinct = column.filter(pa.array(fresh))
    if pc.all(pc.less(distinct[:-1], distinct[1:]), min_count=0).as_py():
        return np.cumsum(fresh) - 1, distinct
    encoded = column.dictionary_encode()
    return encoded.indices.to_numpy(), encoded.dictionary


def text(raw: bytes) -> str:
    """Return a name as Python does: bytes that are no UTF-8 become surrogates."""
    return raw.decode("utf-8", "surrogateescape")


def printable_column(column: pa.LargeBinaryArray) -> pa.LargeStringArray:
    """Return names as UTF-8, `printable` where they are not that."""
    try:
        return column.cast(pa.large_string())
    except pa.ArrowInvalid:
        return pa.array([printable(text(raw)) for raw in column.to_pylist()], pa.large_string())
