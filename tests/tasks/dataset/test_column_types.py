"""Every type that pyarrow can write passes from file to file, or is refused by name before anything is embedded."""

from __future__ import annotations

import datetime
import decimal
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders.errors import InputError
from tasks import merge as merge_stage
from tasks.dataset.column_types import plain_schema, plain_table, refused_by_arrow, same_tables
from tasks.dataset.metadata import usable_schema

from ..conftest import MakeShard
from ..test_merge import embedded, merge_here

NAN = float("nan")
KEYS = ("a", "b", "c")


def extension(kind: Any, values: list[Any]) -> pa.Array:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


def leaves() -> dict[str, pa.Array]:
    """Three values, or two and a null, of every type that is not made of others."""
    text, raw, day = ["x", None, "z"], [b"x", None, b"z"], datetime.date(2024, 1, 2)
    number, price = [1, None, 2], [decimal.Decimal("1.5"), None, decimal.Decimal("2.5")]
    numbers = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
    times = [pa.time32("s"), pa.time32("ms"), pa.time64("us"), pa.time64("ns")]
    for unit in ("s", "ms", "us", "ns"):
        times += [pa.timestamp(unit), pa.timestamp(unit, "Europe/Paris"), pa.duration(unit)]
    prices = [pa.decimal32(5, 2), pa.decimal64(15, 2), pa.decimal128(30, 2), pa.decimal256(60, 2)]
    arrays = [
        pa.nulls(3),
        pa.array([True, None, False]),
        *(pa.array(number, kind) for kind in (*numbers, *times)),
        *(pa.array([0.5, None, NAN], kind) for kind in (pa.float16(), pa.float32(), pa.float64())),
        *(pa.array(text, kind) for kind in (pa.string(), pa.large_string(), pa.string_view())),
        *(pa.array(raw, kind) for kind in (pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(1))),
        *(pa.array([day, None, day], kind) for kind in (pa.date32(), pa.date64())),
        *(pa.array(price, kind) for kind in prices),
        *(pa.array(values).dictionary_encode() for values in (text, number, raw)),
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1], pa.int8()), pa.array(["x", "y"]), ordered=True),
        extension(pa.uuid(), [uuid.UUID(int=1).bytes, None, uuid.UUID(int=2).bytes]),
        extension(pa.json_(pa.string()), ["{}", None, "1"]),
        extension(pa.bool8(), [1, None, 0]),
        extension(pa.opaque(pa.binary(), "geometry", "somebody"), raw),
    ]
    return {str(array.type): array for array in arrays}


def nested(name: str, leaf: pa.Array) -> dict[str, pa.Array]:
    """The same in everything that types can be made of."""
    field = pa.field("item", leaf.type)
    fixed = pa.FixedSizeListArray.from_arrays(leaf, 1)
    made = [
        pa.ListArray.from_arrays([0, 1, 1, 3], leaf),
        pa.LargeListArray.from_arrays([0, 1, 1, 3], leaf),
        pa.ListViewArray.from_arrays([1, 0, 0], [2, 1, 0], leaf),
        pa.LargeListViewArray.from_arrays([1, 0, 0], [2, 1, 0], leaf),
        fixed,
        pa.StructArray.from_arrays([leaf], fields=[field]),
        pa.ListArray.from_arrays([0, 1, 1, 3], pa.StructArray.from_arrays([leaf, fixed], ["x", "y"])),
        pa.MapArray.from_arrays([0, 1, 1, 3], pa.array(["k", "l", "m"]), leaf),
    ]
    return {f"{name} in {array.type}": array for array in made}


def every_type() -> dict[str, pa.Array]:
    found = leaves()
    for name, leaf in leaves().items():
        found |= nested(name, leaf)
    tensor = pa.fixed_shape_tensor(pa.float32(), [2])
    found["tensor"] = extension(tensor, [[1.0, 2.0], [NAN, 4.0], [5.0, 6.0]])
    return found


def write(path: Path, columns: dict[str, pa.Array], groups: int) -> None:
    """Metadata with some columns, in one row group or more."""
    table = pa.table({"key": list(KEYS), **columns})
    with pq.ParquetWriter(path, table.schema) as writer:
        for _ in range(groups):
            writer.write_table(table)


def can_be_written(column: pa.Array) -> bool:
    try:
        pq.write_table(pa.table({"x": column}), pa.BufferOutputStream())
    except pa.ArrowException:
        return False
    return True


@pytest.mark.parametrize(("groups", "size"), [(1, 1000), (3, 1000), (1, 2), (3, 2)])
def test_every_type_is_carried_through(
    make_shard: MakeShard, tmp_path: Path, groups: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the merge does: rows read a few at a time, selected, written, and in place read back and compared."""
    monkeypatch.setattr(merge_stage, "group_rows", lambda options: size)
    columns = {name: column for name, column in every_type().items() if can_be_written(column)}
    columns = {name: column for name, column in columns.items() if not refused_by_arrow(pa.field(name, column.type))}
    assert len(columns) > 400
    shard = embedded(make_shard(metadata={"key": list(KEYS)}), without=("b",))
    path = tmp_path / "data/00000.parquet"
    write(path, columns, groups)
    schema = usable_schema(shard, "key", ["image_embedding"])
    file = pq.ParquetFile(path)
    given = plain_table(pa.concat_tables([file.read_row_group(n) for n in range(groups)]))
    several: list[dict[str, Any]] = [{}, {"null_rows": True}, {"schema": schema}, {"in_place": True}]
    for options in several:
        merge_here(shard, **options)
        out = path if "in_place" in options else Path(shard.target.path(shard.merged_file))
        found = pq.read_table(out).drop_columns("image_embedding")
        expected = given if "in_place" in options or "null_rows" in options else given.take([0, 2])
        for name in expected.column_names:
            assert found.schema.field(name).type == expected.schema.field(name).type, (name, options)
            assert same_tables(found.select([name]), expected.select([name])), (name, options)
    assert usable_schema(shard, "key", ["image_embedding"]).names == [*found.column_names, "image_embedding"]


def test_a_type_that_cannot_be_carried_through_is_refused_by_name(make_shard: MakeShard) -> None:
    """Of all types these alone: Arrow reads list views of them and cannot make anything else of those."""
    refused = [
        name
        for name, column in every_type().items()
        if can_be_written(column) and refused_by_arrow(pa.field("x", column.type))
    ]
    outer, inner = ("list_view<", "large_list_view<"), ("string_view", "binary_view", "dictionary<")
    assert refused
    assert all(name.partition(" in ")[2].startswith(outer) and name.startswith(inner) for name in refused), refused
    column = pa.ListViewArray.from_arrays([0, 1, 2], [1, 1, 1], pa.array(list(KEYS), pa.string_view()))
    shard = make_shard(metadata=pa.table({"key": list(KEYS), "words": column}))
    with pytest.raises(InputError, match=r"00000\.parquet: column 'words' is list_view<.*cannot be carried through"):
        usable_schema(shard, "key", ["image_embedding"])


def test_views_and_nested_dictionaries_are_what_parquet_holds() -> None:
    text = pa.array(["x"]).dictionary_encode().type
    schema = pa.schema(
        {
            "a": pa.string_view(),
            "b": pa.list_(pa.binary_view()),
            "c": text,
            "d": pa.struct({"x": text, "y": pa.map_(pa.string_view(), pa.list_(pa.string_view(), 2))}),
        }
    )
    assert plain_schema(schema) == pa.schema(
        {
            "a": pa.string(),
            "b": pa.list_(pa.binary()),
            "c": text,
            "d": pa.struct({"x": pa.string(), "y": pa.map_(pa.string(), pa.list_(pa.string(), 2))}),
        }
    )


def test_what_arrow_cannot_write_is_refused() -> None:
    assert "month_day_nano" in str(refused_by_arrow(pa.field("x", pa.month_day_nano_interval())))
    assert refused_by_arrow(pa.field("x", pa.int8(), nullable=False)) is None


VALUES: list[tuple[Any, Any]] = [
    ([1.0, NAN, None], [1.0, NAN, 2.0]),
    ([[1.0, NAN], None, []], [[1.0, NAN], [], []]),
    ([{"x": NAN, "y": 1}, None], [{"x": NAN, "y": 2}, None]),
    ([{"x": [{"y": [NAN]}]}], [{"x": [{"y": [NAN, NAN]}]}]),
    ([{"x": None}], [None]),
]


@pytest.mark.parametrize(("values", "others"), VALUES)
def test_a_nan_is_the_same_as_a_nan_and_nothing_else_is(values: Any, others: Any) -> None:
    table, other = pa.table({"x": values}), pa.table({"x": pa.array(others, pa.array(values).type)})
    again = pa.table({"x": pa.chunked_array([values, values]).slice(len(values))})
    assert same_tables(table, again)
    assert not same_tables(table, other)
    assert not same_tables(table, table.rename_columns(["y"]))


def test_nan_in_a_map_and_in_half_floats() -> None:
    kind = pa.map_(pa.string(), pa.float16())
    table = pa.table({"x": pa.array([[("k", np.float16(NAN))], None], kind)})
    assert same_tables(table, pa.table({"x": pa.array([[("k", np.float16(NAN))], None], kind)}))
    assert not same_tables(table, pa.table({"x": pa.array([[("l", np.float16(NAN))], None], kind)}))
