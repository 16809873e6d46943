"""Metadata keeps its rows, order and types, and gets each vector by id."""

from __future__ import annotations

import datetime
import importlib.util
import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import Future
from prefect.logging import disable_run_logger

from embedders.errors import InputError
from embedders.quarantine import QuarantinedSample
from embedders.webdataset import open_shard
from tasks import layer_rows
from tasks import merge as merge_stage
from tasks.dataset.column_types import same_tables
from tasks.dataset.description import footer
from tasks.dataset.metadata import check_metadata
from tasks.dataset.vectors import VectorFormat, write_groups
from tasks.keys import layer_key
from tasks.layers import LayerWriter
from tasks.merge import merge_group, merge_shard, merge_shards
from tasks.merge_options import MergeOptions
from tasks.plan import Layer, check_column_names, merged_columns
from tasks.records import Column, LayerRecord, MergeRecord, read_layer_record, read_merge_record, with_record
from tasks.retries import ShardsFailed
from tasks.shards import Shard, find_shards

from .conftest import MakeShard

OPTIONS = MergeOptions("key")
COLUMN = "image_embedding"
VECTOR = {"a": [0.0, 0.5], "b": [1.0, 0.5], "c": [2.0, 0.5]}


def embedded(
    shard: Shard,
    id_col: str = "key",
    without: tuple[str, ...] = (),
    scale: float = 1,
    layer: str = COLUMN,
    columns: Mapping[str, np.ndarray] | None = None,
) -> Shard:
    """The shard with a layer: the n-th sample has the vector (n, 0.5), or row n of `columns`; some are quarantined."""
    opened = open_shard(shard.source.path(shard.tar), id_col)
    ids = opened.ids_at(np.arange(opened.count)).to_pylist()
    bad = opened.samples.unusable
    kept = np.array([i for i, name in enumerate(ids) if i not in bad and name not in without], np.int64)
    gone = [QuarantinedSample(name, "", "corrupt", "") for i, name in enumerate(ids) if i not in kept]
    if columns is None:
        columns = {layer: scale * np.array([[i, 0.5] for i in range(len(ids))], np.float32)}
    with LayerWriter(shard, layer) as writer:
        if len(kept):
            given = {name: values[kept] for name, values in columns.items()}
            writer.add(kept, pa.array([ids[i] for i in kept], pa.string()), given)
        writer.flush()
        reasons = dict(Counter(sample.reason for sample in gone))
        made = writer.columns or {layer: Column("float32", (0,))}
        key = layer_key(shard, layer, "e", id_col)
        record = LayerRecord(key, layer, "e", len(ids), len(kept), reasons, writer.rows, made)
        writer.finish(record, gone)
    return shard


def layers_of(*shards: Shard) -> list[Layer]:
    """What the planner reads of the layers of some shards."""
    names = sorted(path.name for path in Path(shards[0].target.path("layers")).iterdir())
    found = []
    for name in names:
        records = {s.name: read_layer_record(s.target, s.layer_file(name)) for s in shards}
        found.append(Layer(name, "e", {}, False, {shard: it for shard, it in records.items() if it is not None}))
    return found


def options_of(layers: list[Layer], **options: Any) -> MergeOptions:
    names, columns = tuple(layer.name for layer in layers), tuple(merged_columns(layers))
    return replace(OPTIONS, layers=names, columns=columns, **options)


def merge(*shards: Shard, join: Any = "auto", **options: Any) -> list[MergeRecord]:
    layers = layers_of(*shards)
    records = {s.name: {it.name: it.records[s.name] for it in layers if s.name in it.records} for s in shards}
    return merge_group(shards, records, options_of(layers, **options), join)


def merge_here(shard: Shard, **options: Any) -> MergeRecord:
    layers = layers_of(shard)
    return merge_shard(shard, {it.name: it.records[shard.name] for it in layers}, options_of(layers, **options))


def drop_layer(shard: Shard, name: str) -> None:
    """What a user does: delete the folder."""
    shutil.rmtree(shard.target.path(f"layers/{name}"))


def merged(shard: Shard) -> pa.Table:
    return pq.read_table(shard.target.path(shard.merged_file), page_checksum_verification=True)


def test_rows_keep_their_order_and_get_their_own_vector(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["c", "a", "b"], "text": ["C", "A", "B"]}))
    (record,) = merge(shard)
    assert merged(shard).to_pydict() == {
        "key": ["c", "a", "b"],
        "text": ["C", "A", "B"],
        "image_embedding": [VECTOR["c"], VECTOR["a"], VECTOR["b"]],
    }
    assert record == read_merge_record(shard.target, shard.merged_file)
    assert (record.rows, record.rows_without_embedding, record.embeddings_without_row) == (3, 0, 0)


def test_without_a_cluster_threads_join_and_a_failure_stops_no_other(make_shard: MakeShard) -> None:
    """As on Prefect's default task runner."""
    shards = [embedded(make_shard(name, metadata={"key": ["c", "a", "b"]})) for name in ("0", "1", "2")]
    layers, options = layers_of(*shards), options_of(layers_of(*shards))
    records = {shard.name: {it.name: it.records[shard.name] for it in layers} for shard in shards}
    Path(shards[1].target.path(shards[1].layer_file(COLUMN))).write_bytes(b"cut")
    with pytest.raises(ShardsFailed) as failed, disable_run_logger():
        merge_shards.fn(shards, records, options)
    assert [failure.shard for failure in failed.value.failures] == ["1"]
    for shard in (shards[0], shards[2]):
        assert merged(shard)[COLUMN].to_pylist() == [VECTOR["c"], VECTOR["a"], VECTOR["b"]]
    done = merge_shards.fn(shards[::2], records, options)
    assert done == [read_merge_record(shard.target, shard.merged_file) for shard in shards[::2]]


@pytest.mark.skipif(importlib.util.find_spec("cudf") is not None, reason="here cuDF is installed, and needs a GPU")
def test_without_cudf_arrow_joins(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["c", "a", "b"]}))
    (record,) = merge(shard, join="cudf")
    assert record.rows == 3
    assert merged(shard)["image_embedding"].to_pylist() == [VECTOR["c"], VECTOR["a"], VECTOR["b"]]


def test_every_type_of_column_comes_through(make_shard: MakeShard) -> None:
    noon = datetime.datetime(2024, 1, 2, 12, tzinfo=datetime.UTC)
    columns = {
        "key": pa.array(["b", "a", "c"], pa.large_string()),
        "count": pa.array([3, None, 2**62 + 1], pa.int64()),
        "byte": pa.array([1, 2, None], pa.uint8()),
        "half": pa.array([0.5, None, 1.5], pa.float32()),
        "flag": pa.array([True, None, False]),
        "when": pa.array([noon, None, noon], pa.timestamp("us", "UTC")),
        "day": pa.array([noon.date(), None, None], pa.date32()),
        "tags": pa.array([["x", None], [], None], pa.list_(pa.string())),
        "box": pa.array([{"x": 1, "of": [1.5]}, None, {"x": None, "of": []}]),
        "raw": pa.array([b"\x00\xff", b"", None], pa.binary()),
        "kind": pa.array(["jpg", None, "jpg"]).dictionary_encode(),
        "price": pa.array([None, None, 1], pa.decimal128(9, 2)),
        "nothing": pa.array([None] * 3, pa.null()),
        "none": pa.array([None] * 3, pa.string()),
    }
    table = pa.table(columns)
    shard = embedded(make_shard(metadata=table))
    merge(shard)
    found = merged(shard).drop_columns(["image_embedding"])
    assert found.equals(pq.read_table(shard.source.path("00000.parquet"))), (found.schema, table.schema)


@pytest.mark.parametrize(
    ("ids", "column"),
    [
        ([1, 22, 333], pa.array([333, 1, 22])),
        ([1, 22, 333], pa.array([333, 1, 22], pa.uint16())),
        ([1, 22, 333], pa.array([333.0, 1.0, 22.0])),
        ([1, 22, 333], pa.array(["333", "1", "22"])),
        ([1.5, 22, 333], pa.array([333.0, 1.5, 22.0])),
        (["001", "1", "01"], pa.array(["01", "001", "1"])),
        (["x", "y", "z"], pa.array(["z", "x", "y"]).dictionary_encode()),
        ([2**53 + 1, 2**53, 7], pa.array([7, 2**53 + 1, 2**53])),
    ],
    ids=str,
)
def test_ids_join_by_value_and_keep_their_type(make_shard: MakeShard, ids: list[Any], column: pa.Array) -> None:
    samples = {key: {"id": value} for key, value in zip("abc", ids, strict=True)}
    shard = embedded(make_shard(json_of=samples, metadata={"id": column}), "id")
    merge(shard, id_col="id")
    found = merged(shard)
    assert found.column("id").type == column.type
    assert found.column("id").to_pylist() == column.to_pylist()
    assert [vector[0] for vector in found.column("image_embedding").to_pylist()] == [2, 0, 1]


def test_rows_and_embeddings_without_each_other_are_counted(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["z", "b", "a", None]}), without=("b",))
    (record,) = merge(shard)
    assert merged(shard).column("key").to_pylist() == ["a"]
    assert (record.rows, record.rows_without_embedding, record.embeddings_without_row) == (1, 3, 1)


def test_null_rows_stay_with_a_null(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["z", "b", "a", "c"], "n": [1, 2, 3, 4]}), without=("b",))
    (record,) = merge(shard, null_rows=True)
    found = merged(shard).to_pydict()
    assert found == {
        "key": ["z", "b", "a", "c"],
        "n": [1, 2, 3, 4],
        "image_embedding": [None, None, VECTOR["a"], VECTOR["c"]],
    }
    assert (record.rows, record.rows_without_embedding, record.embeddings_without_row) == (4, 2, 0)


def test_a_shard_without_any_embedding_merges(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["a", "b"]}), without=("a", "b", "c"))
    assert merge(shard)[0].rows == 0
    assert merge(shard, null_rows=True)[0].rows == 2
    assert merged(shard).column("image_embedding").to_pylist() == [None, None]


def test_an_older_embedding_column_of_ours_is_replaced(make_shard: MakeShard) -> None:
    made = footer(pa.schema([]), [{"column": COLUMN, "layer": COLUMN}])
    table = pa.table({"key": ["a"], "image_embedding": [[9.0]], "n": [1]}).replace_schema_metadata(made)
    shard = embedded(make_shard(metadata=table))
    merge(shard)
    assert merged(shard).to_pydict() == {"key": ["a"], "n": [1], "image_embedding": [VECTOR["a"]]}
    drop_layer(shard, COLUMN)
    embedded(shard, layer="clip.b32")
    merge(shard)
    assert merged(shard).column_names == ["key", "image_embedding", "n", "clip.b32"]


@pytest.mark.parametrize("in_place", [False, True])
def test_a_column_of_the_users_own_is_never_replaced(make_shard: MakeShard, tmp_path: Path, in_place: bool) -> None:
    shard = embedded(make_shard(metadata={"key": ["a"], "image_embedding": [[9.0]]}))
    before = (tmp_path / "data/00000.parquet").read_bytes()
    with pytest.raises(ShardsFailed, match=r"00000\.parquet: has a column 'image_embedding' that shard-embed did not"):
        merge(shard, in_place=in_place)
    assert (tmp_path / "data/00000.parquet").read_bytes() == before
    assert not shard.target.has(shard.merged_file)


def test_json_members_with_the_embedding_column_are_refused(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(json_of={"a": {"image_embedding": [1.0]}}))
    with pytest.raises(ShardsFailed, match=r"00000\.tar, json members: has a column 'image_embedding'"):
        merge(shard)


def test_in_place_columns_of_several_models_stay_ours(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["a", "b", "c"]}))
    for layer in ("clip", COLUMN, "clip"):  # one at a time, as runs do that know nothing of each other
        merge(shard, in_place=True)
        drop_layer(shard, "clip" if layer == COLUMN else COLUMN)
        embedded(shard, layer=layer)
        merge(shard, in_place=True)
    table = pq.read_table(shard.source.path("00000.parquet"))
    assert sorted(table.column_names) == ["clip", "image_embedding", "key"]
    assert table["clip"].to_pylist() == table["image_embedding"].to_pylist() == list(VECTOR.values())


def test_in_place_metadata_may_hold_nan(make_shard: MakeShard) -> None:
    nan = float("nan")
    table = pa.table(
        {
            "key": ["a", "b", "c"],
            "score": [nan, 1.0, None],
            "half": pa.array([np.float16(nan), None, np.float16(1)], pa.float16()),
            "list": [[nan, 1.0], None, []],
            "box": [{"x": nan, "of": [[nan]]}, None, {"x": None, "of": None}],
            "map": pa.array([[("k", nan)], [], None], pa.map_(pa.string(), pa.float64())),
        }
    )
    shard = embedded(make_shard(metadata=table))
    merge(shard, in_place=True)
    after = pq.read_table(shard.source.path("00000.parquet"))
    assert same_tables(after.drop_columns("image_embedding"), table)
    assert after["image_embedding"].to_pylist() == list(VECTOR.values())


def test_ids_are_read_from_their_column_alone(make_shard: MakeShard) -> None:
    """A column "key.old" matches when Parquet is asked for "key", and comes first here."""
    shard = embedded(make_shard(metadata={"key.old": ["c", "a", "b"], "key": ["a", "b", "c"]}))
    check_metadata(shard, "key", ("a", "b", "c"))
    merge(shard)
    assert merged(shard)["image_embedding"].to_pylist() == list(VECTOR.values())


def test_without_a_parquet_the_json_members_are_the_metadata(make_shard: MakeShard) -> None:
    samples = {
        "a": {"caption": "A", "w": 1, "mixed": 1, "empty": {}, "nothing": None},
        "b": {"caption": "B", "w": 2, "mixed": "two", "late": [1.5], "huge": 2**70, "odd": "\ud800"},
    }
    shard = embedded(make_shard(json_of=samples, d__jpg=b"", c__json=b'{"key": null, "w": 3}'))
    (record,) = merge(shard, null_rows=True)
    names = ["key", "caption", "w", "mixed", "empty", "nothing", "late", "huge", "odd", "image_embedding"]
    rows: list[dict[str, Any]] = [
        {"key": "a", "caption": "A", "w": 1, "mixed": "1", "empty": "{}", "image_embedding": VECTOR["a"]},
        {"key": "b", "caption": "B", "w": 2, "mixed": "two", "late": [1.5], "huge": str(2**70), "odd": "\\ud800"},
        {"key": "c", "w": 3, "image_embedding": VECTOR["c"]},
        {"key": "d"},
    ]
    rows[1]["image_embedding"] = VECTOR["b"]
    assert merged(shard).to_pylist() == [dict.fromkeys(names) | row for row in rows]
    assert (record.rows, record.rows_without_embedding) == (4, 1)


def test_shards_of_one_group_may_differ_in_their_columns(make_shard: MakeShard) -> None:
    made = [
        make_shard("0", json_of={"a": {"w": 1}}),
        make_shard("1", metadata={"key": ["b", "a"], "text": ["B", "A"]}),
        make_shard("2", metadata={"n": [1], "key": ["c"]}),
    ]
    records = merge(*(embedded(shard) for shard in made))
    assert [record.rows for record in records] == [3, 2, 1]
    names = [merged(shard).column_names[:-1] for shard in made]
    assert names == [["key", "w"], ["key", "text"], ["n", "key"]]


@pytest.mark.parametrize("which", [0, 2])
def test_a_damaged_page_is_noticed_and_fails_its_shard_alone(make_shard: MakeShard, which: int) -> None:
    shards = [embedded(make_shard(name, metadata={"key": ["a", "b"]})) for name in ("0", "1", "2")]
    path = Path(shards[which].target.path(shards[which].layer_file(COLUMN)))
    data = bytearray(path.read_bytes())
    at = data.index(np.array([1.0, 0.5, 2.0], np.float32).tobytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(ShardsFailed) as caught:
        merge(*shards)
    assert [failure.shard for failure in caught.value.failures] == [str(which)]
    assert "CRC" in str(caught.value)
    assert [s.name for s in shards if read_merge_record(s.target, s.merged_file)] == [
        name for name in "012" if name != str(which)
    ]


@pytest.mark.parametrize("which", [0, 1])
def test_metadata_that_cannot_be_read_fails_its_shard_alone(make_shard: MakeShard, tmp_path: Path, which: int) -> None:
    shards = [embedded(make_shard(name, metadata={"key": ["a", "b"]})) for name in ("0", "1")]
    pq.write_table(pa.table({"id": ["a"]}), tmp_path / f"data/{which}.parquet")
    with pytest.raises(ShardsFailed, match=rf"{which}: .*{which}\.parquet: no id column 'key'"):
        merge(*shards)
    other = shards[1 - which]
    assert read_merge_record(other.target, other.merged_file) is not None


@pytest.mark.parametrize("kind", ["list", "fixed_size_list"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("encoding", ["plain", "byte_stream_split"])
def test_every_form_of_the_column_holds_the_same_vectors(
    make_shard: MakeShard, kind: Any, dtype: Any, encoding: Any
) -> None:
    form = VectorFormat(kind, dtype, encoding)
    shard = embedded(make_shard(metadata={"key": ["c", "z", "a", "b"]}))
    merge(shard, form=form, null_rows=True)
    table = merged(shard)
    assert table["image_embedding"].to_pylist() == [VECTOR["c"], None, VECTOR["a"], VECTOR["b"]]
    assert table.schema.field("image_embedding").type == form.arrow_type(2)
    column = pq.ParquetFile(shard.target.path(shard.merged_file)).metadata.row_group(0).column(1)
    assert (column.statistics, column.has_dictionary_page) == (None, False)
    assert ("BYTE_STREAM_SPLIT" in column.encodings) == (encoding == "byte_stream_split")


def test_a_value_too_large_for_float16_fails_its_shard(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["c"]}), scale=1e5)
    with pytest.raises(ShardsFailed, match="--embedding-dtype float32"):
        merge(shard, form=VectorFormat(dtype="float16"))


def test_what_has_no_partner_is_listed_with_reasons(make_shard: MakeShard) -> None:
    metadata = {"key": ["z", "b", "a", None, "a", "y", "z"], "status": [None, "success", "x", "x", "x", "failed", "x"]}
    shard = embedded(make_shard(metadata=metadata), without=("b",))
    (record,) = merge(shard)
    listed = pq.read_table(shard.target.path(shard.unmatched_file)).to_pylist()
    assert [(row["id"], row["reason"], row["detail"]) for row in listed] == [
        ("z", "no_image", "row 0 of 00000.parquet"),
        ("", "no_image", "row 3 of 00000.parquet has no id"),
        ("a", "duplicate_id", "row 4 of 00000.parquet repeats the id"),
        ("y", "no_image", "row 5 of 00000.parquet: status failed"),
        ("z", "duplicate_id", "row 6 of 00000.parquet repeats the id"),
        ("c", "no_metadata_row", "no row of 00000.parquet"),
    ]
    assert record == MergeRecord(record.key, 1, 6, 1, 3, 1, 2, 6, ["c"])
    shard = make_shard(metadata={"key": ["b", "a", "c"]})
    merge(shard)
    assert not shard.target.has(shard.unmatched_file)


@pytest.mark.parametrize(
    ("keys", "options", "message"),
    [
        (["a", "b", "a"], {"strict": True}, "id 'a' is there twice, again in row 2"),
        (["x", "y"], {}, "none of its ids is a sample's"),
        ([], {}, r"00000\.parquet: no rows"),
    ],
)
def test_metadata_changed_for_the_worse_is_refused(
    make_shard: MakeShard, keys: list[str], options: dict[str, Any], message: str
) -> None:
    shard = embedded(make_shard(metadata={"key": pa.array(keys, pa.string())}))
    with pytest.raises(ShardsFailed, match=message):
        merge(shard, **options)
    assert not shard.target.has(shard.merged_file)


def test_many_row_groups_in_any_order(make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merge_stage, "group_rows", lambda options: 7)
    keys = tuple(f"{n:03}" for n in range(100))
    order = np.random.default_rng(0).permutation(100)
    shard = embedded(make_shard(keys=keys, metadata={"key": [keys[n] for n in order]}), without=keys[10:30:3])
    merge(shard)
    found = merged(shard)
    expected = [n for n in order.tolist() if keys[n] not in keys[10:30:3]]
    assert [vector[0] for vector in found["image_embedding"].to_pylist()] == expected
    assert found["key"].to_pylist() == [keys[n] for n in expected]
    assert pq.read_metadata(shard.target.path(shard.merged_file)).num_row_groups == -(-len(expected) // 7)


def test_in_place_the_old_file_stays_until_the_new_one_is_proven(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk gives back something else than was written: a bit of the new file flips before it is read back."""
    table = pa.table({"key": ["a", "b", "c"], "text": ["A", "B", "C"]}).replace_schema_metadata({"mine": "stays"})
    shard = embedded(make_shard(metadata=table))
    path = Path(shard.source.path("00000.parquet"))
    before = path.read_bytes()

    def write_and_flip(*args: Any) -> None:
        write_groups(*args)
        data = bytearray(Path(args[2]).read_bytes())
        data[data.index(np.array(VECTOR["c"], np.float32).tobytes())] ^= 1
        Path(args[2]).write_bytes(data)

    with monkeypatch.context() as patched:
        patched.setattr(merge_stage, "write_groups", write_and_flip)
        with pytest.raises(ShardsFailed, match="CRC"):
            merge(shard, in_place=True)
    assert path.read_bytes() == before
    assert [p.name for p in path.parent.iterdir() if "tmp" in p.name] == []
    merge(shard, in_place=True)
    after = pq.read_table(path)
    assert after.drop_columns("image_embedding").equals(table)
    assert after.schema.metadata[b"mine"] == b"stays"
    assert after["image_embedding"].to_pylist() == list(VECTOR.values())


def test_a_retry_at_once_is_not_given_the_former_error(
    make_shard: MakeShard, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dask gives the answer it still holds for a task of the same name; a release is under way for a moment."""
    shard = embedded(make_shard(metadata={"key": ["a", "b", "c"]}))
    path = tmp_path / "data/00000.parquet"
    good = path.read_bytes()
    path.write_bytes(b"no Parquet")
    with monkeypatch.context() as patched:
        patched.setattr(Future, "release", lambda future: None)
        with pytest.raises(ShardsFailed, match="not readable as Parquet") as caught:
            merge(shard)
    path.write_bytes(good)
    assert merge(shard)[0].rows == 3
    del caught  # held the futures so far


# --- several layers ---------------------------------------------------------------------------------------------------

FORMS = [
    VectorFormat(kind, dtype, encoding)
    for kind in ("list", "fixed_size_list")
    for dtype in ("float32", "float16")
    for encoding in ("plain", "byte_stream_split")
]


def scored(shard: Shard, without: tuple[str, ...] = ()) -> Shard:
    """The shard with a second layer: a number, integers and a flag for each sample."""
    numbers = {
        "score": np.array([0.1, 0.2, 0.3]),
        "boxes": np.array([[1, -2], [3, 2**31 - 1], [5, 6]], np.int32),
        "nice": np.array([True, False, True]),
    }
    return embedded(shard, layer="scores", without=without, columns=numbers)


def test_two_layers_with_other_samples_in_quarantine_join(make_shard: MakeShard) -> None:
    """A row stays if any layer has a value; a layer without one is null there, as is one that lacks the shard."""
    table = {"text": ["D", "C", "B", "A"], "key": ["d", "c", "b", "a"]}
    keys = ("a", "b", "c", "d")
    first, second = make_shard("0", keys=keys, metadata=table), make_shard("1", keys=keys, metadata=table)
    for shard in (first, second):
        embedded(shard, without=("b", "d"))
    scores = {"score": np.array([0.5, 1.5, 2.5, 3.5])}
    embedded(first, layer="aesthetic", without=("a", "d"), columns=scores)
    one, other = merge(first, second)
    assert merged(first).to_pydict() == {
        "text": ["C", "B", "A"],
        "key": ["c", "b", "a"],
        "score": [2.5, 1.5, None],
        "image_embedding": [VECTOR["c"], None, VECTOR["a"]],
    }
    assert merged(second).to_pydict() == {
        "text": ["C", "A"],
        "key": ["c", "a"],
        "score": [None, None],
        "image_embedding": [VECTOR["c"], VECTOR["a"]],
    }
    assert merged(first).schema.types == merged(second).schema.types
    assert (one.rows, one.rows_without_embedding, one.unmatched) == (3, 1, 0)
    assert (other.rows, other.rows_without_embedding, other.unmatched) == (2, 2, 0)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("order", [["a", "b", "c", "z"], ["c", "z", "a", "b"]])
def test_numbers_and_integers_are_the_same_in_every_form(
    make_shard: MakeShard, form: VectorFormat, order: list[str]
) -> None:
    shard = scored(embedded(make_shard(metadata={"key": order}), without=("a",)), without=("b",))
    merge(shard, form=form, null_rows=True)
    found = {row["key"]: row for row in merged(shard).to_pylist()}
    assert list(found) == order
    assert found["a"] == {"key": "a", "score": 0.1, "boxes": [1, -2], "nice": True, COLUMN: None}
    assert found["b"] == {"key": "b", "score": None, "boxes": None, "nice": None, COLUMN: VECTOR["b"]}
    assert found["c"] == {"key": "c", "score": 0.3, "boxes": [5, 6], "nice": True, COLUMN: VECTOR["c"]}
    assert found["z"] == {"key": "z", "score": None, "boxes": None, "nice": None, COLUMN: None}
    types = merged(shard).schema
    assert types.field("score").type == pa.float64()
    assert types.field("boxes").type == form.arrow_type(2, "int32")
    assert types.field(COLUMN).type == form.arrow_type(2)


def test_columns_keep_the_order_of_their_layers_and_follow_the_users(make_shard: MakeShard) -> None:
    shard = scored(embedded(make_shard(metadata={"z": [1, 2, 3], "key": ["a", "b", "c"], "a": [4, 5, 6]})))
    embedded(shard, layer="another")
    merge(shard)
    assert merged(shard).column_names == ["z", "key", "a", "another", COLUMN, "score", "boxes", "nice"]


def test_a_dropped_layer_leaves_the_dataset_and_nothing_else_changes(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["b", "a", "c"]}), without=("c",))
    merge(shard)
    before = merged(shard)
    scored(shard)
    merge(shard)
    assert (merged(shard).num_rows, merged(shard).column_names) == (3, ["key", COLUMN, "score", "boxes", "nice"])
    drop_layer(shard, "scores")
    merge(shard)
    assert merged(shard).equals(before)


def test_layers_with_one_column_name_are_refused(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["a"]}))
    embedded(shard, layer="other", columns={COLUMN: np.zeros((3, 2), np.float32)})
    with pytest.raises(InputError, match="layers 'image_embedding' and 'other' both have a column 'image_embedding'"):
        check_column_names(layers_of(shard))


def test_tensors_and_several_rows_per_sample_stay_in_their_layer(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["a", "b", "c"]}))
    embedded(shard, layer="tokens", without=("c",), columns={"tokens": np.zeros((3, 2, 2), np.float32)})
    frames = pa.table({"id": list("aabc"), "part": [0, 1, 0, 0], "frames": [0.5, 1.5, 2.5, 3.5]})
    columns = {"part": Column("int64", ()), "frames": Column("float64", ())}
    record = LayerRecord(layer_key(shard, "frames", "e", "key"), "frames", "e", 3, 3, {}, 4, columns)
    frames = frames.cast(with_record(frames.schema, record))
    shard.target.write(shard.layer_file("frames"), lambda path: pq.write_table(frames, path))
    (record_of_merge,) = merge(shard)
    assert merged(shard).column_names == ["key", COLUMN]
    assert (record_of_merge.rows, record_of_merge.embeddings_without_row) == (3, 0)


def test_in_place_two_layers_are_added_and_every_row_stays(make_shard: MakeShard) -> None:
    table = pa.table({"key": ["z", "b", "a"], "text": ["Z", "B", "A"]})
    shard = scored(embedded(make_shard(metadata=table), without=("a",)), without=("b",))
    for _ in range(2):  # the second time it replaces what is its own
        merge(shard, in_place=True)
        after = pq.read_table(shard.source.path("00000.parquet"))
        assert after.select(["key", "text"]).equals(table)
        assert after[COLUMN].to_pylist() == [None, VECTOR["b"], None]
        assert after["score"].to_pylist() == [None, None, 0.1]
        assert after.column_names == ["key", "text", COLUMN, "score", "boxes", "nice"]


# --- large shards -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [0, 1 << 20])
def test_rows_in_another_order_come_from_memory_or_from_a_file(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch, held: int
) -> None:
    monkeypatch.setattr(layer_rows, "HELD_BYTES", held)
    monkeypatch.setattr(layer_rows, "BATCH_BYTES", 24)
    monkeypatch.setattr(merge_stage, "group_rows", lambda options: 7)
    keys = tuple(f"{n:03}" for n in range(40))
    order = np.random.default_rng(0).permutation(40)
    shard = embedded(make_shard(keys=keys, metadata={"key": [keys[n] for n in order]}))
    merge(shard)
    assert [vector[0] for vector in merged(shard)[COLUMN].to_pylist()] == order.tolist()


@pytest.mark.parametrize("null_rows", [False, True])
def test_gaps_on_either_side_of_the_layers_order(
    make_shard: MakeShard, monkeypatch: pytest.MonkeyPatch, null_rows: bool
) -> None:
    """Rows without an image and images without a row, at both ends and between, across batches and row groups."""
    monkeypatch.setattr(layer_rows, "BATCH_BYTES", 24)
    monkeypatch.setattr(merge_stage, "group_rows", lambda options: 4)
    keys = tuple(f"{n:03}" for n in range(30))
    rows = [key for n, key in enumerate(keys) if n not in (0, 1, 11, 12, 13, 29)]
    rows = ["x0", "x1", "x2", "x3", "x4", *rows[:9], "y", *rows[9:], "z0", "z1"]
    shard = embedded(make_shard(keys=keys, metadata={"key": rows}), without=keys[4:9])
    merge(shard, null_rows=null_rows)
    found = dict(zip(merged(shard)["key"].to_pylist(), merged(shard)[COLUMN].to_pylist(), strict=True))
    there = [key for key in rows if key in keys and key not in keys[4:9]]
    assert [key for key, vector in found.items() if vector is not None] == there
    assert list(found) == (rows if null_rows else there)
    assert all(vector == [int(key), 0.5] for key, vector in found.items() if vector is not None)


@pytest.mark.parametrize(
    "values", [np.zeros((3, 2, 2), np.float32), np.array([0.5, 1.5, 2.5])], ids=["tensors", "numbers"]
)
def test_a_shard_without_any_value_stops_no_other(make_shard: MakeShard, values: np.ndarray) -> None:
    names = ("0", "1", "2")
    shards = [embedded(make_shard(name, metadata={"key": ["a", "b", "c"]})) for name in names]
    for shard, without in zip(shards, (("a", "b", "c"), (), ("b",)), strict=True):
        embedded(shard, layer="x", without=without, columns={"x": values})
    assert [record.rows for record in merge(*shards)] == [3, 3, 3]
    if values.ndim == 1:
        assert merged(shards[0])["x"].to_pylist() == [None] * 3
        assert merged(shards[2])["x"].to_pylist() == [0.5, None, 2.5]
    else:
        assert merged(shards[1]).column_names == ["key", COLUMN]


def test_a_shard_whose_column_is_of_another_type_fails_by_name(make_shard: MakeShard) -> None:
    shards = [embedded(make_shard(name, metadata={"key": ["a", "b", "c"]})) for name in ("0", "1")]
    embedded(shards[0], layer="x", columns={"x": np.array([1, 2, 3])})
    embedded(shards[1], layer="x", columns={"x": np.array([0.5, 1.5, 2.5])})
    with pytest.raises(ShardsFailed) as caught:
        merge(*shards)
    (failure,) = caught.value.failures
    assert failure.error.startswith(
        "layers/x/1.parquet: column 'x' has float64 of shape (), and in another shard int64"
    )
    assert not failure.transient


def test_a_damaged_layer_fails_by_the_name_of_its_file(make_shard: MakeShard) -> None:
    shard = embedded(make_shard(metadata={"key": ["a", "b", "c"]}))
    embedded(shard, layer="x", columns={"x": np.arange(3.0)})
    path = Path(shard.target.path(shard.layer_file("x")))
    content = bytearray(path.read_bytes())
    content[content.index(np.arange(3.0).tobytes()[8:])] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardsFailed, match=r"layers/x/00000\.parquet: damaged .*delete it, and run the command that"):
        merge(shard)


def test_in_place_columns_of_a_layer_that_has_them_no_more_go(make_shard: MakeShard) -> None:
    shard = scored(embedded(make_shard(metadata={"key": ["a", "b", "c"]})))
    merge(shard, in_place=True)
    in_place = Path(shard.source.path(f"{shard.name}.parquet"))
    assert pq.read_schema(in_place).names == ["key", COLUMN, "score", "boxes", "nice"]
    (shard,) = find_shards(shard.dataset, shard.output)
    embedded(shard, layer="scores", columns={"score": np.array([7.0, 8.0, 9.0])})
    merge(shard, in_place=True)
    assert pq.read_table(in_place).to_pydict()["score"] == [7.0, 8.0, 9.0]
    assert pq.read_schema(in_place).names == ["key", COLUMN, "score"]
    (shard,) = find_shards(shard.dataset, shard.output)
    drop_layer(shard, "scores")  # what it had may be wanted: the file is the user's own
    merge(shard, in_place=True)
    assert pq.read_schema(in_place).names == ["key", "score", COLUMN]
