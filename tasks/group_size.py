"""How many shards a task gets: as few as the control plane can keep up with, and fewer towards the end of a run."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")

SECONDS_OF_WORK = 10.0
"""What a group should take at least. A task costs Prefect and Dask about a quarter of a second."""

SECONDS_AT_LEAST = 2.0
"""What the groups of the last rounds should take at least, while there are enough for all workers."""

CONTROL_SECONDS = 0.3
"""What a group costs the control plane, until that is measured: submitting its tasks and taking their results."""

SHARE_OF_CONTROL = 0.5
"""How much of its time the control plane should at most be busy, so that no worker waits for it."""

GPU_IMAGES_PER_SECOND, CPU_IMAGES_PER_SECOND = 3000.0, 50.0
"""What a worker is taken to do, until that is measured."""

SECONDS_OF_A_MERGE = 0.5
"""What merging a shard is taken to cost."""

WEIGHT = 0.2
"""The weight of the newest measurement in a running average."""

RECENT, ENOUGH = 16, 8
"""Groups whose ends tell how fast they come, at most and at least."""

LATE = 1.3
"""How much farther apart than expected groups may end before the control plane counts as late."""

MOST = 2000
"""Shards of a group at most: a task's message to its worker has to stay small."""


@dataclass
class GroupSize:
    """The size of the next group, from what groups took so far.

    Attributes:
        shard_seconds: What a shard takes within its group, while other groups of the worker run beside it.
        control_seconds: What a group costs the control plane.

    Example:
        >>> GroupSize(shard_seconds=4.0).next(left=100_000, threads=3)
        3
        >>> GroupSize(shard_seconds=4.0).next(left=100_000, threads=768)
        66
    """

    shard_seconds: float
    control_seconds: float = CONTROL_SECONDS
    _measured: bool = False
    _ends: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    _ended: int = 0
    _last_round: tuple[int, int] | None = None

    def ended(self, shards: int, seconds: float, threads: int, now: float) -> None:
        """Take how long a group took on its worker, and see whether the control plane keeps up.

        It does not if groups end farther apart than so many threads would end them; then that time is what one costs.

        Args:
            shards: How many shards it had.
            seconds: What they took.
            threads: Tasks that the cluster runs at once.
            now: The time, in seconds.
        """
        found = max(seconds / shards, 1e-3)
        self.shard_seconds = found if not self._measured else _average(self.shard_seconds, found)
        self._measured = True
        self._ends.append(now)
        self._ended += 1
        if self._ended > threads and len(self._ends) >= ENOUGH:
            apart = (self._ends[-1] - self._ends[0]) / (len(self._ends) - 1)
            if apart > LATE * seconds / threads:
                self.cost(apart)

    def cost(self, seconds: float) -> None:
        """Take what a group cost the control plane."""
        self.control_seconds = _average(self.control_seconds, seconds)

    def next(self, left: int, threads: int) -> int:
        """Return how many shards the next group takes.

        A group takes at least `SECONDS_OF_WORK`, and so long that the control plane can give every thread of the
        cluster its next group in time. Once there is no more than a round or two of such groups, what is left is
        spread evenly, so that all workers finish together.

        Args:
            left: Shards that are not submitted yet.
            threads: Tasks that the cluster runs at once.
        """
        keeps_up = threads * self.control_seconds / SHARE_OF_CONTROL
        size = max(1, min(MOST, round(max(SECONDS_OF_WORK, keeps_up) / self.shard_seconds)))
        least = max(1, round(max(SECONDS_AT_LEAST, keeps_up / 4) / self.shard_seconds))
        if left > 2 * threads * least:
            self._last_round = None
            return max(1, min(size, -(-left // (2 * threads))))
        if self._last_round is None or self._last_round[0] != threads:
            self._last_round = threads, max(1, min(size, -(-left // threads)))
        return self._last_round[1]


def _average(before: float, found: float) -> float:
    return before + WEIGHT * (found - before)


def split(shards: Sequence[T], size: GroupSize, threads: int) -> list[tuple[T, ...]]:
    """Split shards into groups, all at once.

    Args:
        shards: Any number of them.
        size: How large groups are.
        threads: Tasks that run at once.
    """
    groups, start = [], 0
    while start < len(shards):
        stop = start + size.next(len(shards) - start, threads)
        groups.append(tuple(shards[start:stop]))
        start = stop
    return groups


def guess(images: int, shards: int, on_gpu: bool) -> GroupSize:
    """Return the sizes for a run of which nothing is measured yet.

    Args:
        images: About how many images its shards hold.
        shards: How many shards there are.
        on_gpu: Whether its workers have GPUs.
    """
    rate = GPU_IMAGES_PER_SECOND if on_gpu else CPU_IMAGES_PER_SECOND
    return GroupSize(max(images / max(shards, 1) / rate, 1e-2))
