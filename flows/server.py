"""The Prefect server that a run reports to: the configured one, or a local one that lives as long as the run."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from embedders.errors import InputError
from tasks.own_cluster import LOOPBACK
from tasks.storage.remote import has_secret, redacted

LOCAL_SERVER = {
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_LOGGING_TO_API_ENABLED": "true",
    "PREFECT_SERVER_LOGGING_LEVEL": "ERROR",
}
EPHEMERAL = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
ERROR_LINE = re.compile(r"[\w.]+(Error|Exception)\b")
SECONDS_TO_START = 60.0
SECONDS_TO_STOP = 3.0
RESTARTS = 5


def has_server() -> bool:
    """Return whether a Prefect server is configured."""
    from prefect.settings import PREFECT_API_URL

    return bool(PREFECT_API_URL.value())


def check_server() -> None:
    """Prove that the configured Prefect server answers, accepts our password and has a version that fits.

    Raises:
        InputError: It does not; the message says which server, why, and what to do.
    """
    import httpx
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    url = str(PREFECT_API_URL.value())
    url = redacted(url) if has_secret(url) else url
    try:
        with get_client(sync_client=True) as client:
            if isinstance(error := client.api_healthcheck(), httpx.TransportError):
                raise error
            client.raise_for_api_version_mismatch()
    except (httpx.HTTPError, httpx.InvalidURL, RuntimeError, ValueError) as error:
        cause = " ".join(str(error.__cause__ or error).split("\n")[0].split()).rstrip(".")
        raise InputError(
            f"PREFECT_API_URL={url}: this Prefect server cannot be used ({cause}); start it, correct the address or "
            "PREFECT_API_AUTH_STRING, or unset PREFECT_API_URL for a run with a server of its own"
        ) from error


class LocalServer:
    """A Prefect server on loopback that is restarted if it dies; its database is a file, so the run goes on.

    `prefect.server.api.server.SubprocessASGIServer` is alike, but neither notices a death nor ends with its parent.
    The server asks for a password, which the run's processes have in their environment, where no other user can read
    it. This process holds the port, so that nobody else can take it, and receive the password, while the server is
    down.

    Example:
        >>> server = LocalServer()
        >>> server.wait()
        >>> subprocess.run(command, env=os.environ | server.environment)
        >>> server.stop()
    """

    def __init__(self) -> None:
        """Begin to start it, which takes some seconds; `wait` returns when it answers."""
        self.auth_string = f"run:{secrets.token_urlsafe()}"
        self._socket = socket.create_server((LOOPBACK, 0))
        self.port = int(self._socket.getsockname()[1])
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by stop
        self.process = self._start()
        self._stopping = threading.Event()
        self._keeper: threading.Thread | None = None

    def wait(self) -> None:
        """Wait until it answers, and keep it running from then on.

        Raises:
            InputError: It does not start; the message says why.
        """
        if self._keeper is None:
            self._wait_until_it_answers()
            self._keeper = threading.Thread(target=self._keep, name="prefect-server", daemon=True)
            self._keeper.start()

    @property
    def api_url(self) -> str:
        """Return the URL of its API."""
        return f"http://{LOOPBACK}:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        """Return the variables that processes need in their environment to use it."""
        return {"PREFECT_API_URL": self.api_url, "PREFECT_API_AUTH_STRING": self.auth_string}

    def stop(self) -> None:
        """Stop it, by force if it takes too long."""
        self._stopping.set()
        if self._keeper is not None:
            self._keeper.join()
        self.process.terminate()
        try:
            self.process.wait(SECONDS_TO_STOP)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._socket.close()
        self._errors.close()

    def _start(self) -> subprocess.Popen[bytes]:
        from prefect.settings import get_current_settings

        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        own = {
            "PREFECT_SERVER_API_AUTH_STRING": self.auth_string,
            "PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL": "ERROR",  # `_did_not_start` reads it; no person does
        }
        # -P keeps this file's folder off the import path. The session of its own keeps Ctrl-C away from the server:
        # the run, which is being stopped, needs it to record that.
        script = Path(__file__).with_name("local_server.py")
        return subprocess.Popen(
            [sys.executable, "-P", str(script), str(self._socket.fileno()), str(os.getpid())],
            env=os.environ | EPHEMERAL | settings | own,
            pass_fds=[self._socket.fileno()],
            stderr=self._errors,
            start_new_session=True,
        )

    def _wait_until_it_answers(self) -> None:
        import httpx

        until = time.monotonic() + SECONDS_TO_START
        try:
            while time.monotonic() < until:
                if self.process.poll() is not None:
                    raise InputError(self._did_not_start(f"it ended with status {self.process.returncode}"))
                with contextlib.suppress(httpx.TransportError):
                    if httpx.get(f"{self.api_url}/health", timeout=1).status_code == 200:
                        return
                time.sleep(0.1)
            raise InputError(self._did_not_start(f"no answer within {SECONDS_TO_START:.0f} s"))
        except BaseException:
            self.process.kill()
            self.process.wait()
            raise

    def _did_not_start(self, what: str) -> str:
        """Return one line that says what happened, with the server's own error, and what to do."""
        self._errors.seek(0)
        lines = [line.strip() for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if ERROR_LINE.match(line)]
        last = (errors or lines or ["it wrote no error"])[-1]
        return (
            f"the local Prefect server did not start: {what} ({last}); set PREFECT_HOME to a folder that you can write "
            "to, or PREFECT_API_URL to a server that runs"
        )

    def _keep(self) -> None:
        for restarts_left in reversed(range(RESTARTS + 1)):
            while self.process.poll() is None:
                if self._stopping.wait(0.2):
                    return
            if self._stopping.is_set() or not restarts_left:
                break
            self.process = self._start()
        self._socket.close()  # calls are refused at once from now on


@contextlib.contextmanager
def started_early(wanted: bool) -> Iterator[LocalServer | None]:
    """Start a local server while its run is planned, if none is configured; stop it at the end of the block.

    Args:
        wanted: Whether the run will need a server.

    Yields:
        The server, which may not answer yet; None if there is none.
    """
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
    """Use the configured server within the block, or one local server for this process and its workers.

    Without this every Dask worker would start a server of its own.

    Args:
        started: A local server that was started before, and that the caller stops.
        wait: Whether to wait until it answers.

    Yields:
        The local server; None if one is configured.
    """
    if has_server():
        yield None
        return
    from prefect.logging.handlers import APILogHandler
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    with _environment(LOCAL_SERVER):
        server = started or LocalServer()
        try:
            if wait:
                server.wait()
            settings = {PREFECT_API_URL: server.api_url, PREFECT_API_AUTH_STRING: server.auth_string}
            with shared(server), temporary_settings(settings):
                try:
                    yield server
                finally:
                    APILogHandler().flush()  # Prefect would retry for a minute whatever is queued when the server stops
        finally:
            if started is None:
                server.stop()


@contextlib.contextmanager
def shared(server: LocalServer) -> Iterator[None]:
    """Let the processes that are started within the block use a server."""
    with _environment(LOCAL_SERVER, server.environment):
        yield


@contextlib.contextmanager
def parents_server() -> Iterator[None]:
    """Let the workers of a flow that is called directly, or by a flow of the user's own, share its parent's server.

    If none is configured, Prefect starts one for the process that calls the flow and tells nobody its address, so each
    Dask worker would start another, and no task run would be where the flow's is. That server is Prefect's own and asks
    for no password; use a configured one, or the command, where other people log in.
    """
    if has_server():
        yield
        return
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with get_client(sync_client=True) as client:  # of the server that the flow's engine has started
        url = str(client.api_url).rstrip("/")
    with _environment(LOCAL_SERVER, {"PREFECT_API_URL": url}), temporary_settings({PREFECT_API_URL: url}):
        yield


@contextlib.contextmanager
def _environment(defaults: Mapping[str, str], needed: Mapping[str, str] | None = None) -> Iterator[None]:
    """Set environment variables for the processes started within the block.

    Args:
        defaults: Variables that the user may have set otherwise.
        needed: Variables that replace the user's.
    """
    added = {name: value for name, value in defaults.items() if name not in os.environ} | dict(needed or {})
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
