"""What is said of vectors that are wrong as a whole, and that nothing is said of others."""

from __future__ import annotations

import numpy as np
import pytest

from tasks.records import LayerRecord
from tasks.vector_checks import check_vectors, measure_vectors
from tests.layers import LAYER, layer_record

GENERATOR = np.random.default_rng(0)


def unit(count: int, dimensions: int = 16) -> np.ndarray:
    vectors = GENERATOR.normal(size=(count, dimensions)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def record(vectors: np.ndarray, **quarantined: int) -> LayerRecord:
    measured = measure_vectors(vectors)
    return layer_record(len(vectors), quarantined, dimensions=16, statistics={LAYER: measured})


def said(*shards: np.ndarray, normalized: bool = True) -> str:
    records = {f"{number:05}": record(vectors) for number, vectors in enumerate(shards)}
    return "\n".join(check_vectors(records, {"normalized": normalized}))


def test_nothing_is_wrong_with_sound_vectors() -> None:
    assert said(unit(20), unit(1), np.zeros((0, 16), np.float32)) == ""
    assert said(unit(20) * 7, normalized=False) == ""
    assert said(np.repeat(unit(1), 3, axis=0)) == ""  # three copies of an image
    assert said(np.repeat(unit(1), 30, axis=0), unit(30)) == ""  # a shard of placeholders


def test_a_record_without_measurements_is_passed_over() -> None:
    assert check_vectors({"00000": layer_record(20, dimensions=16)}, {"normalized": True}) == []


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_no_numbers(value: float) -> None:
    spoilt = unit(20)
    spoilt[3, 2] = value
    line = said(unit(20), spoilt)
    assert line.startswith("NaN or infinite vectors in 1 shard (00001)")
    assert "\n" not in line
    assert "NaN" in said(np.full((5, 16), value, np.float32))


def test_norms_off_one_count_only_where_they_were_normalised() -> None:
    vectors = unit(20)
    vectors[7] *= 1.5
    assert said(unit(20), vectors).startswith("norms from 1 to 1.5 where each should be 1, in 1 shard (00001)")
    assert said(vectors, normalized=False) == ""


def test_vectors_that_are_all_alike() -> None:
    alike = np.repeat(unit(1), 20, axis=0)
    nearly = alike + GENERATOR.normal(size=alike.shape).astype(np.float32) * 1e-5
    assert "alike" in said(alike, normalized=False)
    assert "alike" in said(nearly, normalized=False)
    assert "alike" not in said(alike + GENERATOR.normal(size=alike.shape).astype(np.float32) * 1e-2, normalized=False)


def test_zero_vectors() -> None:
    assert "all vectors are zero" in said(np.zeros((20, 16), np.float32))


def test_a_model_that_gives_nothing_at_all() -> None:
    none = np.zeros((0, 16), np.float32)
    assert "no usable vector" in check_vectors({"00000": record(none, not_embedded=9)}, {})[0]
    assert check_vectors({"00000": record(none, truncated=9)}, {}) == []
