"""`python -m deployments.serve`: the deployments of prefect.yaml from one process, without a work pool."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import yaml
from prefect import serve
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.schedules import Cron, Interval, Schedule

DECLARED = Path(__file__).with_name("prefect.yaml")


def deployments(declared: Path = DECLARED) -> list[Any]:
    """What prefect.yaml declares, as deployments that a process can serve."""
    return [_deployment(entry) for entry in yaml.safe_load(declared.read_text())["deployments"]]


def _deployment(entry: dict[str, Any]) -> Any:
    path, _, name = entry["entrypoint"].partition(":")
    flow = getattr(importlib.import_module(path.removesuffix(".py").replace("/", ".")), name)
    return flow.to_deployment(
        entry["name"],
        description=entry["description"],
        parameters=entry.get("parameters"),
        tags=entry["tags"],
        schedules=[_schedule(schedule) for schedule in entry.get("schedules", [])],
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
    )


def _schedule(said: dict[str, Any]) -> Schedule:
    active = said.get("active", True)
    if "cron" in said:
        return Cron(said["cron"], timezone=said.get("timezone"), active=active)
    return Interval(said["interval"], active=active)


if __name__ == "__main__":
    serve(*deployments())
