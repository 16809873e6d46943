"""Whether a worker still gets on: what it has in hand, and since when nothing of it was finished.

A hang inside C code cannot be interrupted, by a signal or an exception. It can be seen from another thread, told to
whoever waits, and ended with its process.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field

BASE_SECONDS = 600.0
"""Allowed on top of what shards take: loading and compiling a model, a busy disk."""

BYTES_A_SECOND = 1_000_000
"""Slower than any disk or store that is of use."""

SECONDS_A_SAMPLE = {"cuda": 0.1, "cpu": 5.0}
"""A hundred times what slow models need."""

SECONDS_TO_LEAVE = 5.0
"""What a worker that is given up still has, to tell the scheduler which shards it failed at."""


@dataclass(frozen=True)
class Limit:
    """How long shards may take, in seconds: a generous function of their size, or what the user says."""

    device: str
    seconds: float | None = None

    def of(self, size: int, samples: int) -> float:
        """For one shard.

        :param size: bytes of its tar.
        :param samples: samples in it; 0 while that is not known.
        """
        if self.seconds is not None:
            return self.seconds
        return size / BYTES_A_SECOND + samples * SECONDS_A_SAMPLE[self.device]

    @property
    def base(self) -> float:
        """For whatever is not a shard's own: the model."""
        return BASE_SECONDS if self.seconds is None else 0.0


@dataclass
class Watch:
    """The shards that this process has in hand. All its tasks share one stream, so they share what holds it up."""

    _limits: dict[str, float] = field(default_factory=dict)
    _since: float = field(default_factory=time.monotonic)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, shard: str, seconds: float) -> None:
        """A shard is in hand now, and may take so long."""
        with self._lock:
            self._limits[shard] = seconds
            self._since = time.monotonic()

    def leave(self, shard: str) -> None:
        """A shard is through, whatever came of it."""
        with self._lock:
            if self._limits.pop(shard, None) is not None:
                self._since = time.monotonic()

    def holds(self, shard: str) -> bool:
        """Whether a shard is in hand."""
        return shard in self._limits

    def overdue(self, base: float) -> float | None:
        """The seconds without any progress, once they are more than all shards in hand may take; else None."""
        with self._lock:
            waited = time.monotonic() - self._since
            return waited if self._limits and waited > base + sum(self._limits.values()) else None


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
