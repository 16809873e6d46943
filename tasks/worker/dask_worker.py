"""Find out whether a task runs on a Dask worker, or in the process of its flow."""

from __future__ import annotations

from typing import Any


def dask_worker() -> Any | None:
    """Return the `distributed.Worker` that runs the task of this thread; None outside one."""
    from distributed import get_worker

    try:
        return get_worker()
    except ValueError:
        return None
