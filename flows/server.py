"""The Prefect API of a run: the configured server, or a local one for as long as the run takes."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

LOCAL_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}
EPHEMERAL = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
SECONDS_TO_START = 60.0
SECONDS_TO_STOP = 3.0
RESTARTS = 5


def has_server() -> bool:
    """Whether a Prefect server is configured."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


class LocalServer:
    """A Prefect server on loopback, started again on its port if it dies: its database is a file, so the run goes on.

    Like `prefect.server.api.server.SubprocessASGIServer`, which neither notices a death nor ends with its parent.
    """

    def __init__(self) -> None:
        """Start it. It answers after some seconds; see `wait`."""
        self.port = _free_port()
        self.process = self._start()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    def wait(self) -> None:
        """Wait until it answers, and keep it running from then on.

        :raises RuntimeError: it does not start.
        """
        if self._keeper is None:
            self._wait_until_it_answers()
            self._keeper = threading.Thread(target=self._keep, name="prefect-server", daemon=True)
            self._keeper.start()

    @property
    def api_url(self) -> str:
        """Where the API answers."""
        return f"http://127.0.0.1:{self.port}/api"

    def stop(self) -> None:
        """End it."""
        self._stopping.set()
        if self._keeper is not None:
            self._keeper.join()
        self.process.terminate()
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        from prefect.settings import get_current_settings

        # -P: the folder of this file is no place to import from. A session of its own: Ctrl-C is for the run, which
        # needs the server to say so.
        script = Path(__file__).with_name("local_server.py")
        return subprocess.Popen(
            [sys.executable, "-P", str(script), str(self.port), str(os.getpid())],
            env=os.environ | EPHEMERAL | get_current_settings().to_environment_variables(exclude_unset=True),
            start_new_session=True,
        )

    def _wait_until_it_answers(self) -> None:
        import httpx

        until = time.monotonic() + SECONDS_TO_START
        try:
            while time.monotonic() < until:
                if self.process.poll() == 3:  # somebody was faster to take the port
                    self.port = _free_port()
                    self.process = self._start()
                elif self.process.poll() is not None:
                    raise RuntimeError(f"the local Prefect server ended with status {self.process.returncode}")
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.api_url}/health", timeout=5).status_code == 200:
                        return
                time.sleep(0.1)
            raise RuntimeError(f"the local Prefect server did not start within {SECONDS_TO_START:.0f} s")
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _keep(self) -> None:
        for _ in range(RESTARTS):
            while self.process.poll() is None:
                if self._stopping.wait(0.2):
                    return
            if self._stopping.is_set():
                return
            self.process = self._start()


def _free_port() -> int:
    with contextlib.closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def started_early(wanted: bool) -> Iterator[LocalServer | None]:
    """A local server that starts while its run is planned, if one is wanted and none is configured."""
    if not wanted or has_server():
        yield None
        return
    with _environment(LOCAL_SERVER):
        server = LocalServer()
    try:
        yield server
    finally:
        server.stop()


@contextlib.contextmanager
def prefect_server(started: LocalServer | None = None, wait: bool = True) -> Iterator[LocalServer | None]:
    """Run with the configured server, or with one local server that this process and its workers share.

    Without this every Dask worker would start a server of its own.

    :param started: a local server that was started before; whoever did it stops it.
    :param wait: whether to wait until it answers.
    :return: the local server, if there is one.
    """
    if has_server():
        yield None
        return
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with _environment(LOCAL_SERVER):
        server = started or LocalServer()
        try:
            if wait:
                server.wait()
            with shared(server), temporary_settings({PREFECT_API_URL: server.api_url}):
                try:
                    yield server
                finally:
                    APILogHandler().flush()  # what is still queued when the server stops is retried for a minute
        finally:
            if started is None:
                server.stop()


@contextlib.contextmanager
def shared(server: LocalServer) -> Iterator[None]:
    """Tell the processes that are started within the block of the server."""
    with _environment(LOCAL_SERVER | {"PREFECT_API_URL": server.api_url}):
        yield


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
