"""Types of columns: which of them can be copied from file to file, and whether two columns hold the same values."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedders.errors import one_line


def plain_type(kind: pa.DataType, *, nested: bool = False) -> pa.DataType:
    """Return a type that holds the same values, is the same in Parquet, and lets Arrow select rows.

    Arrow can neither select rows of string views and binary views, nor read dictionaries inside lists, structs and maps
    across row groups. In Parquet these are strings, bytes and the dictionary's values; only Arrow's own schema in the
    footer differs.

    Args:
        kind: The type.
        nested: Whether it is part of another type.
    """
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    if pa.types.is_dictionary(kind) and nested:
        return plain_type(kind.value_type, nested=True)
    if pa.types.is_map(kind):
        return pa.map_(_plain_field(kind.key_field), _plain_field(kind.item_field), kind.keys_sorted)
    if pa.types.is_struct(kind):
        return pa.struct([_plain_field(kind.field(i)) for i in range(kind.num_fields)])
    if pa.types.is_fixed_size_list(kind):
        return pa.list_(_plain_field(kind.value_field), kind.list_size)
    for is_kind, make in LISTS:
        if is_kind(kind):
            return make(_plain_field(kind.value_field))
    return kind


LISTS = (
    (pa.types.is_list, pa.list_),
    (pa.types.is_large_list, pa.large_list),
    (pa.types.is_list_view, pa.list_view),
    (pa.types.is_large_list_view, pa.large_list_view),
)


def _plain_field(field: pa.Field) -> pa.Field:
    return field.with_type(plain_type(field.type, nested=True))


def plain_schema(schema: pa.Schema) -> pa.Schema:
    """Return a schema with plain types; see `plain_type`."""
    return pa.schema([field.with_type(plain_type(field.type)) for field in schema], schema.metadata)


def plain_table(table: pa.Table) -> pa.Table:
    """Return the same rows in plain types; see `plain_type`."""
    schema = plain_schema(table.schema)
    columns = [
        column if column.type == field.type else column.cast(field.type)
        for column, field in zip(table.columns, schema, strict=True)
    ]
    return pa.table(columns, schema=schema)


def refused_by_arrow(field: pa.Field) -> str | None:
    """Return why this pyarrow cannot select and write rows of a column; None if it can.

    This tries it with two nulls, because whether Arrow can do it depends on the type and not on the values.
    """
    schema = pa.schema([field.with_nullable(True)])
    try:
        table = plain_table(pa.table([pa.nulls(2, field.type)], schema=schema)).take(pa.array([1]))
        pq.write_table(table, pa.BufferOutputStream())
    except pa.ArrowException as error:
        return one_line(error, limit=120)
    return None


# --- the same values --------------------------------------------------------------------------------------------------


def same_tables(one: pa.Table, other: pa.Table) -> bool:
    """Return whether two tables hold the same values in columns of the same names; NaN equals NaN."""
    if one.equals(other):
        return True
    if one.schema.names != other.schema.names or len(one) != len(other):
        return False
    return all(_same(a.combine_chunks(), b.combine_chunks()) for a, b in zip(one.columns, other.columns, strict=True))


def _same(one: pa.Array, other: pa.Array) -> bool:
    """Return whether two arrays hold the same values. In Arrow's own comparison no NaN equals another."""
    if one.type != other.type or len(one) != len(other):
        return False
    if one.equals(other):
        return True
    kind = one.type
    if isinstance(kind, pa.BaseExtensionType):
        return _same(one.storage, other.storage)
    if not one.is_valid().equals(other.is_valid()):
        return False
    if pa.types.is_floating(kind):
        values, others = (array.drop_null().to_numpy(zero_copy_only=False) for array in (one, other))
        return np.array_equal(values, others, equal_nan=True)
    if pa.types.is_struct(kind):  # `flatten` gives children the nulls of their parents
        return all(_same(a, b) for a, b in zip(one.flatten(), other.flatten(), strict=True))
    if pa.types.is_map(kind):
        pairs = pa.list_(pa.struct([kind.key_field, kind.item_field]))
        return _same(one.cast(pairs), other.cast(pairs))
    if pa.types.is_fixed_size_list(kind) or any(is_kind(kind) for is_kind, _ in LISTS):
        lengths = pc.list_value_length(one).equals(pc.list_value_length(other))
        return lengths and _same(one.flatten(), other.flatten())
    return False
