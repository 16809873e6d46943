"""`python -m deployments.serve`: serve the declared deployments from one process, without a work pool.

One run that embeds goes on at a time, since this machine's GPUs are one; sensors run beside it.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.flows import load_flow_from_entrypoint
from prefect.runner import Runner
from prefect.schedules import Cron, Interval, Schedule
from prefect.types.entrypoint import EntrypointType

from deployments.declared import DATASETS, DECLARED, Declared, declared
from deployments.deploy import QUEUES


def deployments(file: Path = DECLARED, datasets: Path = DATASETS) -> dict[str, list[Any]]:
    """Return what is declared, for Prefect's runners, by the queue that it is declared for.

    Args:
        file: A prefect.yaml, this folder's by default.
        datasets: A datasets.yaml, this folder's by default.
    """
    by_queue: dict[str, list[Any]] = {queue: [] for queue in QUEUES}
    for one in declared(file, datasets):
        by_queue.setdefault(one.entry["work_pool"].get("work_queue_name", ""), []).append(_deployment(one))
    return by_queue


def _deployment(one: Declared) -> Any:
    entry = one.entry
    flow: Any = load_flow_from_entrypoint(entry["entrypoint"])
    return flow.to_deployment(
        entry["name"],
        description=entry["description"],
        parameters=entry.get("parameters"),
        tags=entry["tags"],
        schedules=[_schedule(schedule) for schedule in entry.get("schedules", [])],
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
        entrypoint_type=EntrypointType.MODULE_PATH,
    )


def _schedule(entry: dict[str, Any]) -> Schedule:
    active = entry.get("active", True)
    if "cron" in entry:
        return Cron(entry["cron"], timezone=entry.get("timezone"), active=active)
    return Interval(entry["interval"], active=active)


async def serve(by_queue: dict[str, list[Any]]) -> None:
    """Serve until the process is stopped, with a runner for each queue.

    Args:
        by_queue: What `deployments` returns; in a running event loop Prefect would make coroutines of them.
    """
    runners = []
    for queue, found in by_queue.items():
        runners.append(Runner(name=f"shard-embed {queue}", limit=QUEUES.get(queue)))
        for deployment in found:
            await runners[-1].aadd_deployment(deployment)
    await asyncio.gather(*(runner.start() for runner in runners))


if __name__ == "__main__":
    asyncio.run(serve(deployments()))
