"""Detect hung workers: what this process has in hand, and since when nothing of it got on.

A hang inside C code cannot be interrupted, by a signal or an exception. It can be seen from another thread, told to
whoever waits, and ended with its process.
"""

from __future__ import annotations

import enum
import os
import threading
import time
from dataclasses import dataclass, field

BASE_SECONDS = 600.0
"""Allowed for any step, whatever its size: compiling a model in the first batch, a disk that others keep busy."""

BYTES_A_SECOND = 50_000_000
"""Beyond the base: reading a tar's headers and ids, writing vectors."""

SECONDS_A_SAMPLE = {"cuda": 0.1, "cpu": 1.0}
"""Beyond the base: many times what slow models need."""

LARGEST_BATCH = 1024
"""Samples that a limit counts at most: larger shards come in batches, and each is progress."""

SECONDS_TO_LEAVE = 5.0
"""What a worker that is given up still has, to tell the scheduler which shards it failed at."""


class Step(enum.Enum):
    """What is being done with a shard."""

    OPEN = enum.auto()
    """Downloaded, indexed, read ahead."""
    EMBED = enum.auto()
    """In the engine, or in line before it."""
    WRITE = enum.auto()


@dataclass(frozen=True)
class Limit:
    """Say how many seconds a step may go without progress: minutes for any shard, or what the user says."""

    device: str
    seconds: float | None = None

    def bytes(self, size: int) -> float:
        """Return the limit for reading or writing a file of `size` bytes."""
        return self._or_given(size / BYTES_A_SECOND)

    def samples(self, count: int) -> float:
        """Return the limit for one batch of a shard with `count` samples."""
        return self._or_given(min(count, LARGEST_BATCH) * SECONDS_A_SAMPLE[self.device])

    def _or_given(self, own: float) -> float:
        return BASE_SECONDS + own if self.seconds is None else self.seconds


@dataclass(eq=False)
class Held:
    """A shard in hand. Compared by identity: two runs may have shards of one name in hand."""

    step: Step
    limit: float
    since: float = field(default_factory=time.monotonic)

    def waited(self, now: float) -> float | None:
        """Return the seconds since it got on, once they are more than its limit; else None."""
        waited = now - self.since
        return waited if waited > self.limit else None


class Watch:
    """The shards that this process has in hand, of all its tasks and runs.

    Each has a clock of its own, so that one that hangs is seen however well others get on. What shares something
    shares progress: a batch is progress for all shards in the engine, because it takes them in their order, and the
    engine's clocks stand still while a file is written, because it may wait for that.
    """

    def __init__(self) -> None:
        self._held: set[Held] = set()
        self._lock = threading.Lock()

    def take(self, limit: float) -> Held:
        """Take a shard in hand, to be opened."""
        held = Held(Step.OPEN, limit)
        with self._lock:
            self._held.add(held)
        return held

    def move(self, held: Held, step: Step, limit: float) -> None:
        """Go on with a shard's next step."""
        with self._lock:
            held.step, held.limit, held.since = step, limit, time.monotonic()

    def got_on(self, held: Held) -> None:
        """Note progress of one shard."""
        held.since = time.monotonic()

    def batch(self) -> None:
        """Note that the engine got on."""
        now = time.monotonic()
        with self._lock:
            for held in self._held:
                if held.step is Step.EMBED:
                    held.since = now

    def leave(self, held: Held) -> None:
        """Be done with a shard, whatever came of it."""
        with self._lock:
            self._held.discard(held)
        if held.step is Step.WRITE:
            self.batch()

    def overdue(self) -> float | None:
        """Return the seconds that some shard has gone without progress, if they are more than it may; else None."""
        now = time.monotonic()
        with self._lock:
            writing = any(held.step is Step.WRITE for held in self._held)
            counted = [held for held in self._held if not (writing and held.step is Step.EMBED)]
            return max((waited for held in counted if (waited := held.waited(now)) is not None), default=None)


watch = Watch()
"""This process's."""


def end_this_worker() -> None:
    """End this process in a moment, if it is a Dask worker: a thread of it is stuck for good. Another is started."""
    from distributed import get_worker
    from distributed.core import Status

    try:
        worker = get_worker()
    except ValueError:
        return
    worker.loop.add_callback(setattr, worker, "status", Status.paused)  # or it would be given what then dies with it
    timer = threading.Timer(SECONDS_TO_LEAVE, os._exit, [1])
    timer.daemon = True
    timer.start()
