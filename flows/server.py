"""The Prefect API of a run: the configured server, or a local one for as long as the run takes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

LOCAL_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}


def has_server() -> bool:
    """Whether a Prefect server is configured."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


@contextlib.contextmanager
def prefect_server() -> Iterator[None]:
    """Run with the configured server, or with one local server that this process and its workers share.

    Without this every Dask worker would start a server of its own.
    """
    if has_server():
        yield
        return
    from prefect.logging.handlers import APILogHandler
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with _environment(LOCAL_SERVER):
        server = SubprocessASGIServer()
        server.start(timeout=60)
        try:
            with (
                _environment({"PREFECT_API_URL": server.api_url}),
                temporary_settings({PREFECT_API_URL: server.api_url}),
            ):
                try:
                    yield
                finally:
                    APILogHandler().flush()  # what is still queued when the server stops is retried for a minute
        finally:
            server.stop()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Environment variables for the processes started within the block; what the user has set stays."""
    added = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)
