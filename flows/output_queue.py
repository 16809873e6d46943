"""Let runs over one output wait for each other: a global concurrency limit of Prefect's, with one slot per output.

The lock in the output (`tasks/run_lock.py`) stays what protects the files; it refuses a second run. The slot comes
before it, so that deployments that share an output take turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import GlobalConcurrencyLimitCreate
from prefect.client.schemas.objects import ConcurrencyLeaseHolder
from prefect.concurrency.asyncio import ConcurrencySlotAcquisitionError
from prefect.concurrency.sync import concurrency
from prefect.context import FlowRunContext
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.logging import get_run_logger

from flows.run_labels import name_with_hash
from tasks.run_lock import EXPIRED_AFTER

LEASE_SECONDS = EXPIRED_AFTER + 30.0
"""How long the slot of a run that died without a word stays taken: longer than its lock, so that the next run, which
gets the slot, is not refused by the lock."""


@contextlib.contextmanager
def turn(*folders: str) -> Iterator[None]:
    """Wait until no other flow run writes to any of the folders, and keep others waiting within the block.

    Call it in a flow run. The run's log says that it waits, and for which folders.

    Args:
        folders: Folders or fsspec URLs that the run writes to.

    Example:
        >>> with turn("s3://vectors/laion"):
        ...     write()
    """
    names = sorted({limit_name(folder) for folder in folders})
    _create_limits(names)
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    holder = ConcurrencyLeaseHolder(type="flow_run", id=run.id) if run is not None else None

    def slot(tries: int | None) -> contextlib.AbstractContextManager[None]:
        return concurrency(
            names,
            max_retries=tries,
            lease_duration=LEASE_SECONDS,
            strict=True,
            holder=holder,
            raise_on_lease_renewal_failure=False,  # a server that is away for a while ends no run: there is the lock
        )

    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(slot(0))
        except ConcurrencySlotAcquisitionError:
            get_run_logger().info("another run writes to %s; this one starts when it ends", " or ".join(folders))
            stack.enter_context(slot(None))
        yield


def limit_name(folder: str) -> str:
    """Return the name of the concurrency limit of a folder, as Prefect's UI lists it.

    Example:
        >>> limit_name("s3://vectors/laion")
        'shard-embed-laion-4fb30a67'
    """
    return name_with_hash("shard-embed", folder)


def _create_limits(names: Sequence[str]) -> None:
    with get_client(sync_client=True) as client:
        for name in names:
            try:
                client.read_global_concurrency_limit_by_name(name)
            except ObjectNotFound:
                with contextlib.suppress(ObjectAlreadyExists):  # another run was faster
                    client.create_global_concurrency_limit(GlobalConcurrencyLimitCreate(name=name, limit=1))
