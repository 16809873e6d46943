"""Groups are so large that the control plane keeps up, and all workers finish together."""

from __future__ import annotations

import heapq

import pytest

from tasks.group_size import SECONDS_OF_WORK, SHARE_OF_CONTROL, GroupSize, guess


def sizes(size: GroupSize, shards: int, threads: int) -> list[int]:
    """The groups of a run over so many shards."""
    found = []
    while shards:
        found.append(min(shards, size.next(shards, threads)))
        shards -= found[-1]
    return found


@pytest.mark.parametrize("shards", [0, 1, 2, 7, 100, 12_345, 100_000])
@pytest.mark.parametrize("threads", [1, 2, 24, 768, 6000])
@pytest.mark.parametrize("seconds", [0.01, 4.0, 300.0])
def test_groups_hold_every_shard_once_and_keep_every_thread_busy(shards: int, threads: int, seconds: float) -> None:
    found = sizes(GroupSize(seconds), shards, threads)
    assert sum(found) == shards
    assert len(found) >= min(shards, threads) / 2
    assert all(found)


def test_a_group_takes_seconds_on_a_few_workers_and_minutes_on_hundreds() -> None:
    few, many = GroupSize(4.0).next(10**6, 3), GroupSize(4.0).next(10**6, 768)
    assert few * 4.0 == pytest.approx(SECONDS_OF_WORK, abs=4.0)
    assert 2 < many * 4.0 / 60 < 20
    busy = 768 / (many * 4.0) * GroupSize(4.0).control_seconds
    assert busy == pytest.approx(SHARE_OF_CONTROL, rel=0.05)


@pytest.mark.parametrize(("threads", "shards_each"), [(6, 200), (48, 200), (768, 2000)])
def test_all_threads_finish_together(threads: int, shards_each: int) -> None:
    """Give each group to the thread that is free first, as the scheduler does."""
    ends = [0.0] * threads
    for group in sizes(GroupSize(4.0), shards_each * threads, threads):
        heapq.heapreplace(ends, ends[0] + 4.0 * group)
    assert sum(ends) / (threads * max(ends)) > 0.97


def test_what_groups_take_changes_the_next_ones() -> None:
    size = guess(10_000_000, 1000, on_gpu=True)
    before = size.next(10**6, 768)
    size.ended(before, before * size.shard_seconds * 4, 768, 0.0)  # a slower model than it was taken for
    assert size.next(10**6, 768) == pytest.approx(before / 4, abs=1)
    for _ in range(50):
        size.cost(3.0)  # a slow server
    assert size.next(10**6, 768) > before


def test_a_larger_cluster_gets_larger_groups_until_few_shards_are_left() -> None:
    size = GroupSize(4.0)
    assert size.next(100_000, 96) < size.next(100_000, 768)
    assert size.next(768, 768) == 1


@pytest.mark.parametrize(("apart", "grows"), [(0.5, True), (0.026, False)])
def test_groups_grow_if_they_end_farther_apart_than_the_threads_would_end_them(apart: float, grows: bool) -> None:
    size = GroupSize(4.0, control_seconds=0.05)
    before = size.next(10**6, 768)
    for number in range(1000):
        size.ended(before, before * 4.0, 768, number * max(apart, before * 4.0 / 768))
    assert (size.next(10**6, 768) > before) is grows
