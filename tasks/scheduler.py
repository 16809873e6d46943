"""An existing Dask scheduler: whether it answers, and whether it has workers."""

from __future__ import annotations

import asyncio
import os
import re

from embedders.errors import InputError, one_line

CONNECT_SECONDS = 5
TLS = {
    "ca-file": "DASK_DISTRIBUTED__COMM__TLS__CA_FILE",
    "client.cert": "DASK_DISTRIBUTED__COMM__TLS__CLIENT__CERT",
    "client.key": "DASK_DISTRIBUTED__COMM__TLS__CLIENT__KEY",
}
"""Dask's settings that a client of a tls:// scheduler needs, and the environment variables that set them."""


def check_scheduler(address: str) -> None:
    """Prove that a Dask scheduler answers and has workers, by one short connection.

    :raises InputError: certificates are missing or do not fit, nothing answers, or it has no worker.
    """
    import dask

    if address.startswith("tls://"):
        for setting, variable in TLS.items():
            path = dask.config.get(f"distributed.comm.tls.{setting}", None)
            if not path:
                raise InputError(f"{address}: set {variable} to the {setting} file (or distributed.comm.tls in Dask)")
            if "\n" not in path and not os.path.isfile(path):  # Dask takes the certificate itself, too
                raise InputError(f"{address}: {variable}: no file {path}")
    try:
        workers = asyncio.run(asyncio.wait_for(_workers(address), 2 * CONNECT_SECONDS))
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        cause = error.__cause__ or error
        said = re.sub(r"^in <.*?>: ", "", one_line(cause)) if str(cause) else "no answer"
        raise InputError(
            f"--scheduler {address}: cannot connect ({said}); check that it runs, its port and its certificates"
        ) from error
    if not workers:
        raise InputError(f"--scheduler {address}: it has no workers; start some with: dask worker {address}")


async def _workers(address: str) -> int:
    """How many workers a scheduler has. A whole client would leave threads and tracebacks behind where it fails."""
    from distributed.core import rpc
    from distributed.security import Security

    arguments = Security().get_connection_args("client")
    async with rpc(address, connection_args=arguments, timeout=CONNECT_SECONDS) as scheduler:
        return len((await scheduler.identity(n_workers=-1))["workers"])
