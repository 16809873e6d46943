"""Turn columns of ids into the text that the join compares."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedders.ids import canonical_id

EXACT = float(1 << 62)
"""Whole floats below it fit in 64-bit integers."""


def canonical_ids(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return `embedders.ids.canonical_id` of every value.

    Arrow converts integers, text and whole floats; all other values are converted one by one.

    Args:
        column: A column of any type.

    Returns:
        A column of strings. Nulls stay null.
    """
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_integer(column.type) or _is_text(column.type):
        return column.cast(pa.string())
    if pa.types.is_floating(column.type) and _all_whole(column):
        return column.cast(pa.int64()).cast(pa.string())
    texts = [[None if v is None else canonical_id(v) for v in chunk.to_pylist()] for chunk in column.chunks]
    return pa.chunked_array(texts, pa.string())


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))


def _all_whole(column: pa.ChunkedArray) -> bool:
    values = column.drop_null().cast(pa.float64()).to_numpy()
    return bool((np.abs(values) < EXACT).all() and (np.floor(values) == values).all())


def repeated(ids: pa.ChunkedArray) -> np.ndarray:
    """Find the rows that repeat the id of an earlier row.

    Args:
        ids: A column of ids. Nulls do not count.

    Returns:
        Row numbers in ascending order, (n,) int64.
    """
    if len(ids) - ids.null_count == pc.count_distinct(ids, mode="only_valid").as_py():
        return np.zeros(0, np.int64)
    codes = ids.combine_chunks().dictionary_encode().indices
    known = np.flatnonzero(codes.is_valid().to_numpy(zero_copy_only=False))
    _, first = np.unique(codes.drop_null().to_numpy(), return_index=True)
    return np.delete(known, first)
