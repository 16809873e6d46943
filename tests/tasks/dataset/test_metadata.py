"""Metadata that cannot be joined is refused beforehand, ids are text a column at a time, and schemas become one."""

from __future__ import annotations

import datetime
import decimal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedders.errors import InputError
from embedders.ids import canonical_id
from tasks.dataset.ids import canonical_ids, repeated
from tasks.dataset.metadata import check_metadata, conform, unified_schema
from tasks.merge_options import MergeOptions
from tasks.plan import plan_in_one_schema
from tasks.shards import Shard
from tests.layers import recipe_named

from ..conftest import MakeShard


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"id": ["a"], "text": ["x"]}, "no id column 'key'; give --id-col one of: id, text"),
        ({"key": ["a", "b", "a"]}, "id 'a' is there twice, again in row 2"),
        ({"key": [1.0, 2.0, 1.0]}, r"id 1\.0 is there twice"),
        ({"key": ["x", "y"]}, "none of its ids is a sample's: column 'key' has 'x', the tar has 'a'"),
        ({"key": ["a", *(f"x{n}" for n in range(300))]}, "only 1 of its 301 ids are a sample's"),
        ({"key": pa.array([], pa.string())}, r"00000\.parquet: no rows"),
    ],
)
def test_metadata_that_cannot_be_joined_is_refused(
    make_shard: MakeShard, metadata: dict[str, list[Any]], message: str
) -> None:
    shard = make_shard(metadata=metadata)
    ids = ("a", "b", "c", *(f"y{n}" for n in range(300))) if len(metadata.get("key", ())) > 300 else ("a", "b", "c")
    with pytest.raises(InputError, match=message):
        check_metadata(shard, "key", ids)


@pytest.mark.parametrize("content", [b"", b"key,text\n", b"PAR1" * 9])
def test_metadata_that_is_no_parquet_is_refused(make_shard: MakeShard, tmp_path: Path, content: bytes) -> None:
    shard = make_shard(metadata={"key": ["a"]})
    (tmp_path / "data/00000.parquet").write_bytes(content)
    with pytest.raises(InputError, match=r"00000\.parquet: not readable as Parquet"):
        check_metadata(shard, "key")


def test_metadata_that_goes_away_is_an_error_of_the_disk(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard(metadata={"key": ["a"]})
    (tmp_path / "data/00000.parquet").unlink()
    with pytest.raises(FileNotFoundError):
        check_metadata(shard, "key")


def test_metadata_that_fits_or_is_not_there_passes(make_shard: MakeShard) -> None:
    check_metadata(make_shard(), "key", ("a",))
    check_metadata(make_shard(metadata={"key": ["z", "a"]}), "key", ("a", "b"))
    check_metadata(make_shard(metadata={"key": pa.array([], pa.string())}), "key", ())
    check_metadata(make_shard(metadata={"key": [1, 2]}), "key", ("1",))
    check_metadata(make_shard(metadata={"key": ["a", "b", "a"]}), "key", ("a", "b"), unique=False)
    many = tuple(f"x{n}" for n in range(1000))
    check_metadata(make_shard(metadata={"key": [*many, "a"]}), "key", ("a",))  # a crawl that fetched one image


# --- ids --------------------------------------------------------------------------------------------------------------

VALUES: dict[Any, st.SearchStrategy[Any]] = {
    pa.int8(): st.integers(-(2**7), 2**7 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float32(): st.floats(width=32) | st.integers(-(2**24), 2**24).map(float),
    pa.float64(): st.floats() | st.integers(-(2**62), 2**62).map(float) | st.just(-0.0),
    pa.string(): st.text(st.characters(exclude_categories=["Cs"])) | st.integers().map(lambda n: f"{n:09}"),
    pa.large_string(): st.text(st.characters(exclude_categories=["Cs"])),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(),
    pa.date32(): st.dates(),
    pa.decimal128(9, 2): st.decimals(-1000, 1000, places=2),
}


@given(st.data())
def test_a_column_of_ids_is_each_id_by_itself(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(list(VALUES)))
    chunks = data.draw(st.lists(st.lists(st.none() | VALUES[kind], max_size=5), max_size=3))
    column = pa.chunked_array(chunks, kind)
    expected = [None if value is None else canonical_id(value) for value in column.to_pylist()]
    assert canonical_ids(column).to_pylist() == expected
    assert canonical_ids(column.dictionary_encode()).to_pylist() == expected
    again = [i for i, text in enumerate(expected) if text is not None and text in expected[:i]]
    assert repeated(canonical_ids(column)).tolist() == again


def test_ids_of_different_types_are_one_text() -> None:
    columns: list[list[Any]] = [[12], [12.0, None], ["12"], [decimal.Decimal(12)]]
    assert {canonical_ids(pa.chunked_array([values]))[0].as_py() for values in columns} == {"12"}
    assert canonical_ids(pa.chunked_array([["012"]]))[0].as_py() == "012"


# --- one schema -------------------------------------------------------------------------------------------------------


def described(make_shard: MakeShard, *tables: dict[str, Any]) -> list[Shard]:
    return [make_shard(f"{n}", metadata=pa.table(table)) for n, table in enumerate(tables)]


def test_columns_that_some_shards_lack_and_numbers_of_two_kinds_become_one_schema(make_shard: MakeShard) -> None:
    shards = described(
        make_shard,
        {"key": ["a"], "n": [1], "tags": [["x"]], "nothing": pa.nulls(1), "box": [{"x": 1}]},
        {"key": ["b"], "n": [1.5], "late": [datetime.date(2024, 1, 2)], "box": [{"x": 2, "y": "z"}]},
        {"nothing": [True], "key": ["c"], "n": pa.array([3], pa.int8())},
    )
    schema = unified_schema([*shards, make_shard("3")], "key", ["image_embedding"])
    assert {field.name: str(field.type) for field in schema} == {
        "key": "string",
        "n": "double",
        "tags": "list<element: string>",
        "nothing": "bool",
        "box": "struct<x: int64, y: string>",
        "late": "date32[day]",
    }
    read = [pq.read_table(shard.source.path(f"{shard.name}.parquet")) for shard in shards]
    rows = pa.concat_tables([conform(table, schema, "key") for table in read]).to_pylist()
    assert [row["n"] for row in rows] == [1.0, 1.5, 3.0]
    assert [row["box"] for row in rows] == [{"x": 1, "y": None}, {"x": 2, "y": "z"}, None]
    assert [row["late"] for row in rows] == [None, datetime.date(2024, 1, 2), None]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["key", "x", "x"], r"0\.parquet: 2 columns are called 'x'; rename all but one"),
        (["key", "x", "image_embedding"], r"0\.parquet: has a column 'image_embedding' that shard-embed did not write"),
    ],
)
def test_columns_that_would_be_lost_are_refused(make_shard: MakeShard, names: list[str], message: str) -> None:
    table = pa.table([pa.array(["a"])] * 3, names=names)
    shard = make_shard("0", metadata=table)
    with pytest.raises(InputError, match=message):
        unified_schema([shard], "key", ["image_embedding"])
    in_place = MergeOptions("key", in_place=True)
    with pytest.raises(InputError, match=message):
        plan_in_one_schema([shard], [recipe_named("e")], in_place, lambda columns: None)


@pytest.mark.parametrize(
    "notes", [{"embeddings": '[{"column": "v", "layer": "v"}]'}, {"shard_embed_columns": '{"w": "w", "v": "w"}'}]
)
def test_a_column_of_ours_is_known_by_the_footer(make_shard: MakeShard, notes: dict[str, str]) -> None:
    shard = make_shard(metadata=pa.table({"key": ["a"], "v": [[1.0]]}).replace_schema_metadata(notes))
    assert unified_schema([shard], "key", ["v"]).names == ["key"]


@pytest.mark.parametrize("notes", [{}, {"embeddings": "[1]"}, {"embeddings": "no json"}, {"shard_embed_columns": "3"}])
def test_notes_of_somebody_else_are_no_record(make_shard: MakeShard, notes: dict[str, str]) -> None:
    shard = make_shard(metadata=pa.table({"key": ["a"], "v": [[1.0]]}).replace_schema_metadata(notes))
    with pytest.raises(InputError, match="has a column 'v' that shard-embed did not write"):
        unified_schema([shard], "key", ["v"])


def test_each_files_notes_count_though_their_schemas_are_the_same(make_shard: MakeShard) -> None:
    table = pa.table({"key": ["a"], "v": [[1.0]]})
    notes = {"embeddings": '[{"column": "v", "layer": "v"}]'}
    shards = [make_shard("0", metadata=table.replace_schema_metadata(notes)), make_shard("1", metadata=table)]
    with pytest.raises(InputError, match=r"1\.parquet: has a column 'v' that shard-embed did not write"):
        unified_schema(shards, "key", ["v"])


@pytest.mark.parametrize("content", [b"", b"PAR1", b"x" * 99 + b"PAR1"])
def test_a_damaged_file_among_many_is_named(make_shard: MakeShard, content: bytes) -> None:
    shards = [make_shard(f"{n}", metadata={"key": ["a"]}) for n in range(3)]
    Path(shards[1].source.path("1.parquet")).write_bytes(content)
    shards[1] = replace(shards[1], metadata_fingerprint=f"{len(content)}-2")
    with pytest.raises(InputError, match=r"1\.parquet: not readable as Parquet"):
        unified_schema(shards, "key", [])


def test_a_file_that_has_changed_since_the_listing_counts_as_it_is(make_shard: MakeShard) -> None:
    shard = make_shard("0", metadata={"key": ["a"], "x": [1]})
    pq.write_table(pa.table({"key": ["a"], "y": [list(range(5000))]}), shard.source.path("0.parquet"))
    assert unified_schema([shard], "key", []).names == ["key", "y"]


def test_ids_of_two_types_become_text(make_shard: MakeShard) -> None:
    shards = described(make_shard, {"key": [12]}, {"key": ["x"]}, {"key": [7.0]})
    schema = unified_schema(shards, "key", ["image_embedding"])
    assert schema.field("key").type == pa.string()
    assert conform(pa.table({"key": [7.0, None]}), schema, "key")["key"].to_pylist() == ["7", None]


def test_types_that_cannot_be_one_are_refused_by_name(make_shard: MakeShard) -> None:
    shards = described(make_shard, {"key": ["a"], "n": [1]}, {"key": ["b"], "n": ["one"]})
    with pytest.raises(InputError, match=r"1\.parquet: column 'n' is string, and int64 in .*0\.parquet; make it one"):
        unified_schema(shards, "key", ["image_embedding"])


def test_a_value_that_does_not_fit_is_refused_by_name() -> None:
    table = pa.table({"key": ["a"], "n": [2**60 + 1]})
    with pytest.raises(InputError, match="column 'n' does not fit double"):
        conform(table, pa.schema([("key", pa.string()), ("n", pa.float64())]), "key")


def test_one_schema_stays_as_it_is_and_a_held_one_is_widened(make_shard: MakeShard) -> None:
    field = pa.field("key", pa.string(), nullable=False)
    table = pa.table([pa.array(["a"])], schema=pa.schema([field]))
    shard = make_shard(metadata=table)
    assert unified_schema([shard], "key", ["v"]).field("key") == field
    held = pa.schema([("n", pa.int64()), ("key", pa.string())])
    assert unified_schema([shard], "key", ["v"], held).names == ["n", "key"]
