"""An existing Dask cluster: check that its scheduler answers and has workers, and run tasks on it."""

from __future__ import annotations

import asyncio
import os
import re
from typing import TYPE_CHECKING

from embedders.errors import InputError, one_line

if TYPE_CHECKING:
    from distributed.security import Security
    from prefect_dask import DaskTaskRunner

CONNECT_SECONDS = 5
TLS = {
    "ca-file": "DASK_DISTRIBUTED__COMM__TLS__CA_FILE",
    "client.cert": "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT",
    "client.key": "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY",
}
"""Dask's settings that a client of a tls:// scheduler needs, and the environment variables that set them."""


def task_runner(address: str, security: Security | None = None) -> DaskTaskRunner:
    """Return Prefect's task runner on the cluster of a scheduler.

    Args:
        address: The scheduler's, such as "tcp://10.0.0.1:8786".
        security: The certificates to connect with; by default those of Dask's configuration.
    """
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(address=address, client_kwargs={"security": security})


def check_scheduler(address: str) -> None:
    """Prove by one short connection that a Dask scheduler answers and has workers.

    Args:
        address: The scheduler's, such as "tcp://10.0.0.1:8786" or "tls://…".

    Raises:
        InputError: Certificates are missing or do not fit, nothing answers, or there is no worker.
    """
    if address.startswith("tls://"):
        _check_certificates(address)
    try:
        workers = asyncio.run(asyncio.wait_for(_count_workers(address), 2 * CONNECT_SECONDS))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        cause = error.__cause__ or error
        said = re.sub(r"^in <.*?>: ", "", one_line(cause)) if str(cause) else "no answer"
        raise InputError(
            f"--scheduler {address}: cannot connect ({said}); check that it runs, its port and its certificates"
        ) from error
    if not workers:
        raise InputError(f"--scheduler {address}: it has no workers; start some with: dask worker {address}")


def _check_certificates(address: str) -> None:
    """Raise InputError unless Dask's configuration names the files that a TLS client needs, and they exist."""
    import dask

    for setting, variable in TLS.items():
        path = dask.config.get(f"distributed.comm.tls.{setting}", None)
        if not path:
            raise InputError(f"{address}: set {variable} to the {setting} file (or distributed.comm.tls in Dask)")
        if "\n" not in path and not os.path.isfile(path):  # Dask takes the certificate itself, too
            raise InputError(f"{address}: {variable}: no file {path}")


async def _count_workers(address: str) -> int:
    """Return how many workers a scheduler has. A whole client would leave threads and tracebacks where it fails."""
    from distributed.core import rpc
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    async with rpc(address, connection_args=arguments, timeout=CONNECT_SECONDS) as scheduler:
        return len((await scheduler.identity(n_workers=-1))["workers"])
