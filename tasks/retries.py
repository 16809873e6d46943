"""Which shards failed and why, and whether trying again can help."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect.tasks import exponential_backoff

from embedders.errors import drop_locals, one_line

PERMANENT_IO = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)


@dataclass(frozen=True)
class ShardFailure:
    """A shard that could not be done, with one line that says why."""

    shard: str
    error: str
    transient: bool
    alone: bool = False
    """Whether to try the shard once more, in a task of its own: it may have been failed by another one."""

    @classmethod
    def of(cls, shard: str, error: BaseException) -> ShardFailure:
        """Return the failure that an exception stands for; the exception keeps nothing alive any more."""
        drop_locals(error)
        kind = type(error).__name__
        if kind == "KilledWorker":  # Dask's, whose text is about its own settings
            text = "its worker died whenever it was tried: out of memory, or a crash in native code; see its log"
            return cls(shard, text, False)
        says_it_all = kind in {"InputError", "MalformedShard", "ShardReplaced"}
        return cls(shard, one_line(error, named=not says_it_all), passes(error))


class ShardsFailed(Exception):
    """Raised once a group of shards is through, when some of them failed."""

    def __init__(self, failures: Sequence[ShardFailure]) -> None:
        super().__init__(failures)
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return "; ".join(f"{failure.shard}: {failure.error}" for failure in self.failures)


def passes(error: BaseException) -> bool:
    """Whether what raised this may succeed when tried again: I/O and memory, not malformed data."""
    if isinstance(error, OSError | MemoryError):
        return not isinstance(error, PERMANENT_IO)
    return type(error).__name__ == "OutOfMemoryError"  # torch's, not imported for a name


def retry_if_it_can_pass(task: Any, task_run: Any, state: Any) -> bool:
    """Prefect's retry condition: some shard of the group failed for a reason that passes."""
    error = state.result(raise_on_failure=False)
    return any(f.transient for f in error.failures) if isinstance(error, ShardsFailed) else passes(error)


RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=1),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": retry_if_it_can_pass,
}
"""How a stage is tried again: soon, since a retry that sleeps holds its worker, and only for what can pass."""
