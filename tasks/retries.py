"""Retries: which failures are tried again, and the shards that failed with the reason."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefect.tasks import exponential_backoff

from embedders.errors import drop_locals, one_line

PERMANENT_IO = (FileNotFoundError, PermissionError, NotADirectoryError, IsADirectoryError)
"""Errors of files that another try does not change."""


@dataclass(frozen=True)
class ShardFailure:
    """A shard that failed, with one line that says why."""

    shard: str
    error: str
    transient: bool
    alone: bool = False
    """Whether to try the shard once more in a task of its own, because another shard may have caused the failure."""

    @classmethod
    def of(cls, shard: str, error: BaseException) -> ShardFailure:
        """Return the failure that an exception stands for, and free the memory that the exception keeps alive.

        Args:
            shard: The shard's name.
            error: What its task raised.
        """
        drop_locals(error)
        kind = type(error).__name__
        if kind == "KilledWorker":  # Dask's, whose text is about its own settings
            text = "its worker died at every try: out of memory, or a crash in native code; see its log"
            return cls(shard, text, False)
        says_it_all = kind in {"InputError", "MalformedShard", "ShardReplaced"}
        return cls(shard, one_line(error, named=not says_it_all), is_transient(error))


class ShardsFailed(Exception):
    """Some shards of a group failed. A task raises it after it has tried all of them."""

    def __init__(self, failures: Sequence[ShardFailure]) -> None:
        super().__init__(failures)
        self.failures = tuple(failures)

    def __str__(self) -> str:
        return "; ".join(f"{failure.shard}: {failure.error}" for failure in self.failures)


def is_transient(error: BaseException) -> bool:
    """Return whether another try may succeed: after I/O and memory errors, not with malformed data."""
    if isinstance(error, OSError | MemoryError):
        return not isinstance(error, PERMANENT_IO)
    return type(error).__name__ == "OutOfMemoryError"  # torch's, not imported for a name


def retry_if_transient(task: Any, task_run: Any, state: Any) -> bool:
    """Return whether some shard of the group had a transient error; Prefect's `retry_condition_fn`."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, ShardsFailed):
        return any(failure.transient for failure in error.failures)
    return is_transient(error)


RETRIES: dict[str, Any] = {
    "retries": 3,
    "retry_delay_seconds": exponential_backoff(backoff_factor=1),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": retry_if_transient,
}
"""Arguments of each stage's task. Delays are short because a waiting retry occupies a worker."""
