"""`python -m deployments.serve`: serve the deployments of prefect.yaml from one process, without a work pool."""

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
    """Return the deployments that a prefect.yaml declares, for `prefect.serve`.

    Args:
        declared: The file, this folder's by default.
    """
    return [_deployment(entry) for entry in yaml.safe_load(declared.read_text())["deployments"]]


def _deployment(entry: dict[str, Any]) -> Any:
    path, _, name = entry["entrypoint"].partition(":")
    module = importlib.import_module(path.removesuffix(".py").replace("/", "."))
    flow = getattr(module, name)
    return flow.to_deployment(
        entry["name"],
        description=entry["description"],
        parameters=entry.get("parameters"),
        tags=entry["tags"],
        schedules=[_schedule(schedule) for schedule in entry.get("schedules", [])],
        concurrency_limit=ConcurrencyLimitConfig(**entry["concurrency_limit"]),
    )


def _schedule(entry: dict[str, Any]) -> Schedule:
    active = entry.get("active", True)
    if "cron" in entry:
        return Cron(entry["cron"], timezone=entry.get("timezone"), active=active)
    return Interval(entry["interval"], active=active)


if __name__ == "__main__":
    serve(*deployments())
