"""What the Dask cluster of a run has at the moment: workers, task threads and GPUs, as it says itself."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tasks.hardware import count_gpus

SECONDS_TO_ASK = 10.0
"""How long a scheduler that is busy may take to say how many workers it has."""


@dataclass(frozen=True)
class Cluster:
    """What a cluster has at the moment, over all of its workers.

    Attributes:
        workers: Worker processes.
        threads: Tasks that all of them together run at once.
        with_gpu: The addresses of the workers that have a GPU.
    """

    workers: int
    threads: int
    with_gpu: tuple[str, ...] = ()

    @property
    def device(self) -> str:
        """Return what its workers compute on: "cuda" or "cpu", or "auto" where some have a GPU and others do not."""
        return "cpu" if not self.with_gpu else "cuda" if len(self.with_gpu) == self.workers else "auto"


def describe(client: Any) -> Cluster:
    """Ask the scheduler for its workers, and each of them for its GPUs.

    Args:
        client: A Dask client of the cluster.
    """
    gpus: Mapping[str, int] = client.run(count_gpus)
    threads: Mapping[str, int] = client.nthreads()
    with_gpu = tuple(address for address, found in gpus.items() if found)
    return Cluster(len(gpus), sum(threads.get(address, 1) for address in gpus), with_gpu)


def count(client: Any) -> tuple[int, int] | None:
    """Ask the scheduler how many workers it has; cheap enough for every few seconds.

    Returns:
        Its workers and their task threads, or None if it does not answer.
    """

    async def ask() -> Mapping[str, Any]:
        found: Mapping[str, Any] = await asyncio.wait_for(client.scheduler.identity(n_workers=0), SECONDS_TO_ASK)
        return found

    try:
        found = client.sync(ask)
    except (OSError, TimeoutError, ValueError, TypeError, AttributeError):  # the last two while it reconnects
        return None
    return int(found["n_workers"]), int(found["total_threads"])
