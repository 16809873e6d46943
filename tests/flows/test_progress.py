"""The pace of a run: what its shards took, not what its workers took to start."""

from __future__ import annotations

import time

import pytest

from flows.progress import Pace
from tasks.records import LayerRecord, seconds_in_work
from tests.layers import layer_record


def record(began: float, ended: float, samples: int = 100) -> LayerRecord:
    return layer_record(samples, work={"began": began, "ended": ended})


def test_the_rate_does_not_include_the_start() -> None:
    pace = Pace(shards_in_all=4, started=time.monotonic() - 60)
    assert (pace.average, pace.now) == (0, 0)
    pace.count([record(1000, 1010)])
    assert pace.average == pytest.approx(10)
    assert pace.now == pytest.approx(10)
    pace.count([record(1005, 1015), record(1010, 1020)])
    assert pace.average == pytest.approx(15)


def test_now_counts_what_was_done_since() -> None:
    pace = Pace(shards_in_all=4)
    pace.count([record(1000, 1010)])
    before = time.monotonic()
    time.sleep(0.2)
    pace.count([record(1010, 1020, samples=50)])
    assert pace.now == pytest.approx(50 / (time.monotonic() - before), rel=0.2)


def test_the_time_that_shards_were_in_work() -> None:
    assert seconds_in_work([]) == 0
    assert seconds_in_work([record(5, 9), record(7, 12)]) == 7
    assert seconds_in_work([layer_record(0)]) == 0
