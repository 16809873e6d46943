"""How many workers a run starts, and how much each of them does at once."""

from __future__ import annotations

from tasks.hardware import available_cores, count_gpus

CORES_PER_WORKER = 4
"""On machines without a GPU."""
TASKS_PER_WORKER = 2
TASKS_PER_GPU_WORKER = 3
"""Task threads of a worker: while the engine computes one task's shards, the next task opens its own (see
tasks/worker/shared_engine.py). A GPU may finish a group of small shards before Prefect has recorded the end of the
group before, so its worker takes a third. Merges take no thread from them, see tasks/merge.py."""


def choose_workers(device: str, workers: int | None, shards: int) -> int:
    """Return how many worker processes to start: one per GPU, or one per four cores; never more than shards.

    Args:
        device: "cuda" or "cpu".
        workers: What the user asked for with --workers; None for the default.
        shards: How many shards there are.
    """
    default = count_gpus() if device == "cuda" else max(1, available_cores() // CORES_PER_WORKER)
    return max(1, min(workers or default, shards))


def choose_threads(workers: int) -> int:
    """Return how many threads numerical libraries use in each of so many workers, which share this machine's cores."""
    return max(1, available_cores() // workers)
