"""How many of the machine's processor cores this worker has for itself: its share among the workers beside it.

Dask's nanny sets OMP_NUM_THREADS=1 in every worker, so that variable says nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Collection
from typing import Any

from tasks.hardware import cpu_quotas

logger = logging.getLogger(__name__)

ANSWER_SECONDS = 10.0
"""For the scheduler to say which workers this machine has."""


def share_of_cores(before: int = 0) -> int:
    """Return how many cores this process has for itself, at least 1.

    In a Dask worker, a core that several workers of this machine may use counts for each of them in part: workers may
    be pinned to different cores, as dask-cuda does. A cgroup's limit is divided among the workers in the cgroup.
    Elsewhere these are all cores that the process may use.

    Args:
        before: What to return if the scheduler does not answer; 0 for all cores that the process may use.
    """
    workers = _workers_here()
    if workers is None and before:
        return before
    return divide(os.getpid(), workers or ())


def divide(pid: int, workers: Collection[int]) -> int:
    """Return the share of a process in the cores that it may use, at least 1.

    Args:
        pid: The process.
        workers: The processes that share this machine's cores. Those that are not found here count for nothing.
    """
    others = [other for other in {*workers} - {pid} if os.path.exists(f"/proc/{other}")]
    masks = [mask for other in others if (mask := _affinity(other))]
    share = sum(1 / (1 + sum(core in mask for mask in masks)) for core in _affinity(pid))
    groups = [cpu_quotas(other) for other in others]
    for folder, quota in cpu_quotas(pid).items():
        share = min(share, quota / (1 + sum(folder in group for group in groups)))
    return max(1, int(share + 1e-6))  # thirds add up to a little less than a whole


def _affinity(pid: int) -> set[int]:
    """Return the cores that a process may use; none if it has ended."""
    try:
        return os.sched_getaffinity(pid)
    except OSError:
        return set()


def _workers_here() -> list[int] | None:
    """Return the processes of the Dask workers on this machine; none outside of a worker, None if unknown."""
    if "distributed.worker" not in sys.modules:
        return []
    from distributed.core import Status
    from distributed.worker import Worker

    # Not get_worker(), which only knows the threads that the worker started itself.
    at_work = {Status.running, Status.paused, Status.closing_gracefully}
    worker: Any = next((worker for worker in [*Worker._instances] if worker.status in at_work), None)
    if worker is None:
        return []
    asked = asyncio.run_coroutine_threadsafe(_ask_scheduler(worker), worker.loop.asyncio_loop)
    try:
        return asked.result(ANSWER_SECONDS)
    except Exception as error:
        logger.warning("the scheduler does not say which workers share this machine's cores: %r", error)
        return None


async def _ask_scheduler(worker: Any) -> list[int]:
    from distributed.comm.addressing import get_address_host
    from distributed.protocol.pickle import dumps

    function = _pids_on(get_address_host(worker.address))
    answer = await worker.scheduler.run_function(function=dumps(function))
    if answer["status"] != "OK":
        raise OSError(answer.get("exception_text"))
    return list(answer["result"])


def _pids_on(host: str) -> Callable[..., list[int]]:
    """Return a function for the scheduler, which sends the few workers of one host and not what it knows of all."""

    def pids(dask_scheduler: Any) -> list[int]:
        addresses = dask_scheduler.host_info.get(host, {}).get("addresses", ())
        return [dask_scheduler.workers[it].pid for it in addresses if it in dask_scheduler.workers]

    return pids
