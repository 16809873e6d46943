"""Which row of a layer each metadata row gets: the same from Arrow and from a Dask DataFrame job."""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.dataset import join as join_module
from tasks.dataset.join import chosen_join, join_arrow, join_frames, join_ids

IDS = st.sampled_from(["a", "b", "c", "d", "é", "", "12", "012"])
no_cudf = pytest.mark.skipif(importlib.util.find_spec("cudf") is not None, reason="here cuDF is installed")


def text(values: list[Any], cut: int = 0) -> pa.ChunkedArray:
    return pa.chunked_array([values[:cut], values[cut:]], pa.string())


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.none() | IDS, max_size=12),
    layers=st.lists(st.lists(IDS, unique=True, max_size=6), min_size=1, max_size=3),
    cut=st.integers(0, 5),
)
def test_both_ways_find_the_same_places(rows: list[str | None], layers: list[list[str]], cut: int) -> None:
    ids, named = text(rows, cut), {str(n): text(layer, cut) for n, layer in enumerate(layers)}
    expected = {
        name: [
            layer.index(row) if row is not None and row in layer and row not in rows[:at] else -1
            for at, row in enumerate(rows)
        ]
        for name, layer in zip(named, layers, strict=True)
    }
    for found in (join_arrow(ids, named), join_frames(ids, named, "pandas")):
        assert {name: places.tolist() for name, places in found.items()} == expected
        assert {places.dtype for places in found.values()} == {np.dtype(np.int64)}


def test_no_layer_has_no_places() -> None:
    assert join_ids(text(["a"]), {}) == {} == join_frames(text(["a"]), {}, "pandas")


@no_cudf
def test_without_cudf_arrow_joins_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert join_ids(text(["b", "a"]), {"x": text(["a", "b"])}, "cudf")["x"].tolist() == [1, 0]
    assert "cuDF is not installed; joining with Arrow" in caplog.text


def test_cudf_joins_many_rows_where_there_is_a_gpu_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """The choice alone, as it is made on machines with and without a GPU; `benchmarks.gpu_check` joins on one."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    for gpus, chosen in ((1, "cudf"), (0, "arrow")):
        monkeypatch.setattr(join_module, "count_gpus", lambda found=gpus: found)
        assert chosen_join("auto", join_module.CUDF_ROWS) == chosen
        assert chosen_join("auto", join_module.CUDF_ROWS - 1) == "arrow"
        assert chosen_join("arrow", 1 << 40) == "arrow"
        assert chosen_join("cudf", 1) == "cudf"
