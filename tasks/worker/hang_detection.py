"""Detect hung workers: keep track of the shards in progress, and of how long each has made none.

Neither a signal nor an exception interrupts a hang inside C code. But another thread can notice it, report it, and end
the process.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from dataclasses import dataclass, field

BASE_SECONDS = 600.0
"""Allowed for any step, for instance to compile a model in the first batch or to wait for a busy disk."""

BYTES_PER_SECOND = 50_000_000
"""Added to the base: reading a tar's headers and ids, or writing vectors, is faster than this."""

SECONDS_PER_SAMPLE = {"cuda": 0.1, "cpu": 1.0}
"""Added to the base: many times what slow models need."""

LARGEST_BATCH = 1024
"""A limit counts at most this many samples: larger shards come in several batches, each of which is progress."""

SECONDS_TO_LEAVE = 5.0
"""Time for a hung worker to tell the scheduler which shards it failed at."""


class Step(enum.Enum):
    """What a worker is doing with a shard."""

    OPEN = enum.auto()
    """Download it, index it, read it ahead."""
    EMBED = enum.auto()
    """Compute its vectors, or wait for the engine."""
    WRITE = enum.auto()


@dataclass(frozen=True)
class Limit:
    """How many seconds a step may go without progress: ten minutes and more, or what the user asked for."""

    device: str
    seconds: float | None = None

    def bytes(self, size: int) -> float:
        """Return the limit for reading or writing a file of `size` bytes."""
        return self._or_given(size / BYTES_PER_SECOND)

    def samples(self, count: int) -> float:
        """Return the limit for one batch of a shard with `count` samples."""
        return self._or_given(min(count, LARGEST_BATCH) * SECONDS_PER_SAMPLE[self.device])

    def _or_given(self, own: float) -> float:
        return BASE_SECONDS + own if self.seconds is None else self.seconds


@dataclass(eq=False)
class Held:
    """A shard in progress. Compared by identity, since two runs may work on shards of one name."""

    step: Step
    limit: float
    since: float = field(default_factory=time.monotonic)

    def waited(self, now: float) -> float | None:
        """Return the seconds without progress if they exceed its limit; else None."""
        waited = now - self.since
        return waited if waited > self.limit else None


class Watch:
    """The shards that this process is working on, of all its tasks and runs.

    Each has a clock of its own, so that a hung one is noticed although others make progress. A batch is progress for
    all shards in the engine, because it takes them in their order. While a file is being written, the clocks of the
    shards in the engine do not count, because the engine may be waiting for it.
    """

    def __init__(self) -> None:
        self._held: set[Held] = set()
        self._lock = threading.Lock()

    def take(self, limit: float) -> Held:
        """Begin with a shard, which is opened first.

        Args:
            limit: Seconds that it may go without progress.
        """
        held = Held(Step.OPEN, limit)
        with self._lock:
            self._held.add(held)
        return held

    def move(self, held: Held, step: Step, limit: float) -> None:
        """Begin a shard's next step, with a limit of its own in seconds."""
        with self._lock:
            held.step, held.limit, held.since = step, limit, time.monotonic()

    def got_on(self, held: Held) -> None:
        """Note that one shard has made progress."""
        held.since = time.monotonic()

    def batch(self) -> None:
        """Note that the engine has finished a batch."""
        now = time.monotonic()
        with self._lock:
            for held in self._held:
                if held.step is Step.EMBED:
                    held.since = now

    def leave(self, held: Held) -> None:
        """Forget a shard that is done or has failed."""
        with self._lock:
            self._held.discard(held)
        if held.step is Step.WRITE:
            self.batch()

    def overdue(self) -> float | None:
        """Return the seconds without progress of the longest hung shard; None if no shard exceeds its limit."""
        now = time.monotonic()
        with self._lock:
            writing = any(held.step is Step.WRITE for held in self._held)
            counted = [held for held in self._held if not (writing and held.step is Step.EMBED)]
            overdue = [waited for held in counted if (waited := held.waited(now)) is not None]
            return max(overdue, default=None)


watch = Watch()
"""The shards of this process."""


def end_this_worker() -> None:
    """End this process shortly if it is a Dask worker, because one of its threads is stuck. Dask starts another."""
    from distributed import get_worker
    from distributed.core import Status

    try:
        worker = get_worker()
    except ValueError:
        return
    worker.loop.add_callback(
        setattr, worker, "status", Status.paused
    )  # so that it gets no more tasks, which would die with it
    timer = threading.Timer(SECONDS_TO_LEAVE, os._exit, [1])
    timer.daemon = True
    timer.start()
