"""What a manifest warns of, from the records of the shards alone."""

from __future__ import annotations

from typing import Any

import pytest

from tasks.manifest import Manifest, Timing, account
from tasks.merge_options import MergeOptions
from tasks.plan import Layer, Plan
from tasks.records import LayerRecord
from tasks.shards import Shard
from tests.layers import LAYER, layer_record, recipe_named


def record(good: int, bad: int = 0, **fields: Any) -> LayerRecord:
    reasons = {"truncated": bad} if bad else {}
    return layer_record(good, reasons, dimensions=8, **fields)


def accounted(*records: LayerRecord, limit: float | None = None) -> Manifest:
    names = [f"{number:05}" for number in range(len(records))]
    shards = tuple(Shard(name, "/data", "/out", 1, "1-1", None) for name in names)
    layer = Layer(LAYER, "e", {"model": "m"}, True, dict(zip(names, records, strict=True)))
    plan = Plan(shards, (recipe_named("e"),), MergeOptions("key"), (layer,), {})
    return account(plan, 0, (), Timing(1.0), 0, max_quarantined=limit)


@pytest.mark.parametrize(
    ("good", "bad", "says"),
    [
        (100, 0, ""),
        (91, 9, ""),
        (90, 10, "10% OF THE SAMPLES ARE QUARANTINED: 10 of 100, 10 of them truncated"),
        (49, 51, "MORE THAN HALF OF THE SAMPLES ARE QUARANTINED: 51 of 100"),
        (0, 100, "NOTHING WAS EMBEDDED: 100 of 100"),
    ],
)
def test_a_large_quarantine_is_warned_of(good: int, bad: int, says: str) -> None:
    warnings = accounted(record(good, bad)).warnings
    assert bool(warnings) == bool(says)
    assert not warnings or warnings[0].startswith(says)


def test_tars_without_samples_are_warned_of_with_what_is_in_them() -> None:
    (warning,) = accounted(record(0, ignored=2, ignored_examples=["pictures/0001", "LICENSE"])).warnings
    assert "NOTHING WAS EMBEDDED: the tars hold no samples, but 2 members" in warning
    assert "00000.tar/pictures/0001, 00000.tar/LICENSE" in warning


def test_what_is_part_of_no_sample_is_counted_with_examples() -> None:
    many = [record(5, ignored=7, ignored_examples=["a", "b", "c", "d", "e"]), record(5), record(1, ignored=1)]
    manifest = accounted(*many)
    assert (manifest.ignored, manifest.ignored_examples) == (8, ["00000.tar/a", "00000.tar/b", "00000.tar/c"])
    assert manifest.warnings == []


def test_a_tar_whose_end_is_in_doubt_is_named() -> None:
    (warning,) = accounted(record(5), record(5, doubt="it has no end-of-archive mark")).warnings
    told = "samples may be missing at the end of 1 of 2 tars, such as 00001.tar (it has no end-of-archive mark)"
    assert warning.startswith(told)


@pytest.mark.parametrize(("limit", "fails"), [(None, False), (0.05, False), (0.049, True), (0.0, True), (1.0, False)])
def test_a_quarantine_beyond_its_limit_is_told(limit: float | None, fails: bool) -> None:
    told = accounted(record(95, 5), limit=limit).over_limit
    assert bool(told) == fails
    assert not told or told.startswith("5 of 100 samples (5.0%) are quarantined, more than ")
    assert accounted(record(95), limit=0.0).over_limit == ""
