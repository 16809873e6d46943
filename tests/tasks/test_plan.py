"""What counts as done, and how the rest is split into tasks."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders.errors import InputError
from embedders.samples import Component, Sample, TarIndex
from embedders.tar_index import format_index
from tasks.keys import layer_key, merge_key
from tasks.merge_options import MergedColumn, MergeOptions
from tasks.plan import Plan, make_plan, plan_in_one_schema
from tasks.records import LayerRecord, MergeRecord, with_record
from tasks.run_part import RunPart
from tasks.shards import Shard
from tests.layers import LAYER, layer_record, recipe_named

OPTIONS = MergeOptions("key")
E, F = (recipe_named("e"),), (recipe_named("f"),)
MERGED = replace(OPTIONS, columns=(MergedColumn(LAYER, LAYER, "float32", (4,)),))


@pytest.fixture
def shards(tmp_path: Path) -> list[Shard]:
    """Three shards; all are embedded and merged, the last has a quarantined sample."""
    made = [Shard(f"a/{n}", "/data", str(tmp_path), 10, f"10-{n}", "20-1") for n in range(3)]
    for shard in made:
        bad = {"empty": 1} if shard is made[2] else {}
        record = layer_record(2, bad, key=layer_key(shard, "image_embedding", "e", "key"), recipe="e")
        write(shard, shard.layer_file(LAYER), record)
        write(
            shard, shard.merged_file, MergeRecord(merge_key(shard, {LAYER: record.version}, MERGED.as_dict()), 2, 0, 0)
        )
    bad = pa.table({"id": ["2"]})
    made[2].target.write(made[2].quarantine_file(LAYER), lambda path: pq.write_table(bad, path))
    for shard, samples in zip(made, (2, 2, 3), strict=True):
        shard.target.write_text(shard.index_file, index_of(shard, samples))
    return made


def index_of(shard: Shard, samples: int) -> str:
    """The index of a tar with so many samples of one image."""
    found = [Sample(f"{i}", (Component("jpg", 512 + 1024 * i, 9, f"{i}.jpg"),)) for i in range(samples)]
    return format_index(TarIndex.of(found), shard.tar_fingerprint)


def write(shard: Shard, name: str, record: LayerRecord | MergeRecord) -> None:
    table = pa.table({"id": ["0", "1"]})
    shard.target.write(name, lambda path: pq.write_table(table.cast(with_record(table.schema, record)), path))


def left(plan: Plan) -> tuple[list[str], list[str]]:
    return [shard.name for shard in plan.to_embed], [shard.name for shard in plan.to_merge]


def test_what_is_done_is_not_planned(shards: list[Shard]) -> None:
    assert left(make_plan(shards, E, OPTIONS)) == ([], [])


def test_an_empty_output_is_planned_whole(tmp_path: Path) -> None:
    shards = [Shard(str(n), "/data", str(tmp_path / "new"), 10, "10-1", None) for n in range(3)]
    assert left(make_plan(shards, E, OPTIONS)) == (["0", "1", "2"], [])
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "damage", ["deleted", "cut", "foreign", "of another tar", "without quarantine", "another index"]
)
def test_a_shard_whose_files_do_not_hold_is_embedded_again(shards: list[Shard], damage: str) -> None:
    path = Path(shards[2].target.path(shards[2].layer_file(LAYER)))
    if damage == "deleted":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-9])
    elif damage == "foreign":
        pq.write_table(pa.table({"id": ["0", "1"]}), path)
    elif damage == "of another tar":
        shards[2] = replace(shards[2], tar_fingerprint="11-1")
    elif damage == "another index":
        shards[2].target.write_text(shards[2].index_file, index_of(shards[2], 4))
    else:
        shards[2].target.remove(shards[2].quarantine_file(LAYER))
    assert left(make_plan(shards, E, OPTIONS)) == (["a/2"], [])


def test_a_changed_caption_or_option_merges_again_and_embeds_nothing(shards: list[Shard]) -> None:
    changed = [replace(shards[0], metadata_fingerprint="20-9"), *shards[1:]]
    assert left(make_plan(changed, E, OPTIONS)) == ([], ["a/0"])
    assert left(make_plan(shards, E, replace(OPTIONS, null_rows=True))) == ([], ["a/0", "a/1", "a/2"])
    shards[1].target.remove(shards[1].merged_file)
    assert left(make_plan(shards, E, OPTIONS)) == ([], ["a/1"])


def test_another_embedders_output_is_refused_unless_told(shards: list[Shard]) -> None:
    with pytest.raises(InputError, match="--overwrite"):
        make_plan(shards, F, OPTIONS)
    assert left(make_plan(shards, F, OPTIONS, overwrite=True)) == (["a/0", "a/1", "a/2"], [])


def test_a_part_is_left_to_do_its_own_shards(shards: list[Shard]) -> None:
    shards[0].target.remove(shards[0].layer_file(LAYER))
    shards[1].target.remove(shards[1].merged_file)
    plans = [make_plan(shards, E, OPTIONS, part=RunPart(number, 2)) for number in range(2)]
    assert [left(plan) for plan in plans] == [(["a/0"], []), ([], ["a/1"])]
    for plan in plans:
        assert [shard.name for shard in plan.unfinished] == ["a/0", "a/1"]
        assert set(plan.embedded) == {"a/1", "a/2"}


def test_a_part_verifies_its_own_shards(shards: list[Shard]) -> None:
    for shard in shards:
        path = Path(shard.target.path(shard.layer_file(LAYER)))
        table = pq.read_table(path)
        pq.write_table(table, path, write_page_checksum=True)
        data = bytearray(path.read_bytes())
        data[8] ^= 255
        path.write_bytes(data)
    assert left(make_plan(shards, E, OPTIONS, verify=True)) == (["a/0", "a/1", "a/2"], [])
    part = make_plan(shards, E, OPTIONS, verify=True, part=RunPart(1, 2))
    assert left(part) == (["a/1"], [])
    assert set(part.embedded) == {"a/0", "a/2"}


def test_parts_find_one_schema_whatever_is_done_meanwhile(shards: list[Shard], tmp_path: Path) -> None:
    """The fields are in the dataset's order, and not that of what is left to embed and then to merge."""
    for number, shard in enumerate(shards):
        shard.target.remove(shard.merged_file)
        shards[number] = replace(shard, dataset=str(tmp_path / "data"))
        path = Path(shards[number].source.path(f"{shard.name}.parquet"))
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"key": ["0", "1"], f"column {number}": [1, 2]}), path)

    def names(part: RunPart | None) -> list[str]:
        schema = plan_in_one_schema(shards, E, OPTIONS, lambda columns: None, part=part).options.schema
        assert schema is not None
        return list(schema.names)

    expected = ["key", "column 0", "column 1", "column 2"]
    assert names(None) == names(RunPart(1, 2)) == expected  # all are embedded
    shards[1].target.remove(shards[1].layer_file(LAYER))
    assert names(None) == names(RunPart(0, 2)) == names(RunPart(1, 2)) == expected
    shards[0].target.remove(shards[0].layer_file(LAYER))
    assert names(None) == names(RunPart(0, 2)) == names(RunPart(1, 2)) == expected


@pytest.mark.slow
def test_ten_thousand_finished_shards_are_found_done_in_seconds(tmp_path: Path) -> None:
    shards = [Shard(f"{n:05}", "/data", str(tmp_path), 10, f"10-{n}", "20-1") for n in range(10_000)]
    for shard in shards:
        record = layer_record(2, {"empty": 1}, key=layer_key(shard, "image_embedding", "e", "key"), recipe="e")
        write(shard, shard.layer_file(LAYER), record)
        write(
            shard, shard.merged_file, MergeRecord(merge_key(shard, {LAYER: record.version}, MERGED.as_dict()), 2, 0, 0)
        )
        shard.target.write(shard.quarantine_file(LAYER), lambda path: pq.write_table(pa.table({"id": ["2"]}), path))
        shard.target.write_text(shard.index_file, index_of(shard, 3))
    begun = time.process_time()
    assert left(make_plan(shards, E, OPTIONS)) == ([], [])
    seconds = time.process_time() - begun
    print(f"10,000 shards planned in {seconds:.1f} s of CPU")
    assert seconds < 10


def test_records_of_many_shards_share_what_is_the_same(shards: list[Shard]) -> None:
    """A plan of a million shards holds how a layer was made once."""
    one, other, _ = make_plan(shards, E, OPTIONS).main.records.values()
    assert one.key != other.key
    assert one.columns is other.columns
    assert one.versions is other.versions
