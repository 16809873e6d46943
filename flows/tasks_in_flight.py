"""The tasks that a run has on its cluster, and what ends of them; also whether the cluster is still there."""

from __future__ import annotations

import copyreg
import queue
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from prefect.context import SettingsContext
from prefect.utilities.annotations import quote
from pydantic import PrivateAttr

from tasks import cluster
from tasks.wording import counted

SECONDS_PER_LOOK = 5.0
"""How often the scheduler is asked for the number of its workers."""

SECONDS_TO_RECONNECT = 45.0
"""How long a scheduler may be out of reach. Dask tries for 30 seconds."""


class ClusterLost(Exception):
    """The cluster is gone, for good as far as one can tell; what is embedded is kept."""


@dataclass(frozen=True)
class Ended:
    """A task that ended: its result, or the error that it ended with.

    `lost` tells that the scheduler was out of reach meanwhile: nobody knows how it ended, and it has to be done again.
    """

    future: Any
    result: Any = None
    error: BaseException | None = None
    lost: bool = False


class TasksInFlight:
    """Submits tasks to a cluster and hands over what ends, while it watches the cluster."""

    def __init__(self, runner: Any, worker_timeout: float, note: Callable[[str], None]) -> None:
        """Start to watch.

        Args:
            runner: Prefect's task runner on the cluster, within its context.
            worker_timeout: Seconds to wait for new workers once all are gone.
            note: Called with a line that a person should read.
        """
        self._runner = runner
        self._client = runner.client
        self._worker_timeout = worker_timeout
        self._note = note
        self._ended: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._in_flight: dict[Any, Any] = {}
        self._started: list[Any] = []
        self._gone_since: float | None = None
        self._silent_since: float | None = None
        self._looked = 0.0
        self.workers = 0
        self.threads = 0
        self.look()

    def __len__(self) -> int:
        return len(self._in_flight)

    def submit(
        self,
        task: Any,
        parameters: dict[str, Any],
        wait_for: Sequence[Any] = (),
        priority: int = 0,
        workers: Sequence[str] = (),
    ) -> Any:
        """Submit a Prefect task and return its future.

        Args:
            task: The task.
            parameters: Its arguments; a future among them stands for its result.
            wait_for: Futures of the tasks that it follows.
            priority: Tasks of a higher one go first.
            workers: Addresses of those that may do it, as long as one of them is there; empty for any.
        """
        from prefect_dask.task_runners import PrefectDaskFuture

        # What the runner's own `submit` does, without looking through all that the task is given: Prefect would do it
        # to find futures (`quote`), and Dask to name the task by its content (`pure`).
        dask_future = self._client.submit(
            task,
            parameters={name: _argument(value) for name, value in parameters.items()},
            wait_for=[future.wrapped_future for future in wait_for],
            return_type="state",
            priority=priority,
            workers=list(workers) or None,
            allow_other_workers=bool(workers),
            pure=False,
        )
        future: Any = PrefectDaskFuture(wrapped_future=dask_future, task_run_id=dask_future.task_run_id)
        self._in_flight[dask_future.key] = future
        dask_future.add_done_callback(self._ended.put)
        return future

    def start_on_each(self, workers: Sequence[str], function: Callable[..., None], *args: Any) -> None:
        """Call a function on each of some workers, as no task of Prefect's; nobody waits for it or asks how it went."""
        self._started += [self._client.submit(function, *args, workers=[it], pure=False) for it in workers]

    def forget_started(self) -> None:
        """Let go of what `start_on_each` has started; what runs goes on."""
        self._started.clear()

    def ended(self, seconds: float) -> Iterator[Ended]:
        """Yield the tasks that have ended; wait for the first of them for so long.

        Release each future when it is not needed any more: a result held on a worker that dies is computed again.

        Raises:
            ClusterLost: The scheduler does not answer, or all workers have been gone for too long.
        """
        try:
            found = [self._ended.get(timeout=seconds)] if seconds else []
        except queue.Empty:
            found = []
        self.look()
        while not self._ended.empty():
            found.append(self._ended.get())
        for done in found:
            future = self._in_flight.pop(done.key, None)
            if future is not None:
                yield self._outcome(future)

    def release(self, future: Any) -> None:
        """Let go of a task's result."""
        future.wrapped_future.release()

    def look(self) -> None:
        """See whether the cluster is there, every few seconds; say so if its workers are gone.

        Raises:
            ClusterLost: The scheduler does not answer, or all workers have been gone for too long.
        """
        now = time.monotonic()
        if self._client.status == "running" and now - self._looked < SECONDS_PER_LOOK:
            return
        self._looked = now
        found = cluster.count(self._client) if self._client.status == "running" else None
        if found is None:
            self._scheduler_is_silent(now)
            return
        if self._silent_since is not None:
            self._note("the scheduler answers again")
            self._silent_since = None
        self.workers, self.threads = found
        self._count_of_workers(now)

    def _scheduler_is_silent(self, now: float) -> None:
        if self._silent_since is None:
            self._silent_since = now
            self._note(f"the scheduler does not answer; waiting {SECONDS_TO_RECONNECT:.0f} s for it")
        if self._client.status == "closed" or now - self._silent_since > SECONDS_TO_RECONNECT:
            raise ClusterLost("the Dask scheduler is gone")

    def _count_of_workers(self, now: float) -> None:
        if self.workers:
            if self._gone_since is not None:
                self._note(f"{counted(self.workers, 'worker')} joined; going on")
                self._gone_since = None
            return
        if self._gone_since is None:
            self._gone_since = now
            self._note(
                f"all workers are gone; waiting {_minutes(self._worker_timeout)} for new ones (--worker-timeout)"
            )
        if now - self._gone_since > self._worker_timeout:
            raise ClusterLost(f"all workers were gone for {_minutes(self._worker_timeout)}")

    def _outcome(self, future: Any) -> Ended:
        from distributed.client import FutureCancelledError

        try:
            return Ended(future, result=future.result(timeout=SECONDS_TO_RECONNECT))
        except FutureCancelledError as error:
            self._wait_for_scheduler()
            return Ended(future, error=error, lost=True)
        except Exception as error:
            return Ended(future, error=error)

    def _wait_for_scheduler(self) -> None:
        """Return once the client is connected again; its tasks were cancelled when it lost the connection.

        Raises:
            ClusterLost: It does not find the scheduler again.
        """
        while self._client.status != "running":
            self.look()
            time.sleep(0.2)


def _pickled(quoted: Any) -> tuple[Any, tuple[Any]]:
    return quote, (quoted.unquote(),)


copyreg.pickle(quote, _pickled)  # Prefect's 3.8.8 wraps the value once more whenever it is pickled


def _argument(value: Any) -> Any:
    """Return an argument as Dask and Prefect want it: a future as Dask's, anything else marked as what it is."""
    return getattr(value, "wrapped_future", None) or quote(value)


class SettingsOnce(SettingsContext):
    """Prefect's settings, which do not change within a run: turned into plain data once, and not for every task."""

    @classmethod
    def now(cls) -> SettingsOnce:
        """Return the settings of this moment, as a context to enter."""
        settings = SettingsContext.get()
        assert settings is not None, "Prefect has settings as soon as it is imported"
        return cls(profile=settings.profile, settings=settings.settings)

    def serialize(self, include_secrets: bool = True) -> dict[str, Any]:
        """Return the settings as plain data."""
        if not include_secrets:
            return super().serialize(include_secrets)
        if self._plain is None:
            self._plain = super().serialize()
        return self._plain

    _plain: dict[str, Any] | None = PrivateAttr(None)


def _minutes(seconds: float) -> str:
    return f"{seconds:g} s" if seconds < 120 else f"{seconds / 60:g} min"
