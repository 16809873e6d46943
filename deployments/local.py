"""`make up` and `make down`: run a Prefect server, a worker and the deployments on this machine."""

from __future__ import annotations

import argparse
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

from deployments.deploy import POOL
from flows.report_link import BASE_VARIABLE, KEY_VARIABLE
from tasks.own_cluster import LOOPBACK

PORT, REPORTS_PORT = 4200, 4201
START_SECONDS = 90.0
STOP_SECONDS = 30.0
PROCESSES = ("worker", "reports", "server")
"""In the order in which they are stopped: the worker with its runs before the server."""


@dataclass(frozen=True)
class Home:
    """The folder with the database, the logs, the password and what says which processes run. Only its owner reads it.

    Attributes:
        path: The folder.
    """

    path: Path

    @classmethod
    def make(cls, path: Path) -> Home:
        """Create the folder, unless it is there."""
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        return cls(path.resolve())

    def secret(self, name: str, prefix: str = "") -> str:
        """Return a secret that is kept in a file with mode 600; it is made on first use."""
        file = self.path / name
        if not file.exists():
            descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "w") as opened:
                opened.write(prefix + secrets.token_urlsafe(24))
        return file.read_text()

    @property
    def password(self) -> str:
        """Return what the server asks for, in Prefect's form NAME:PASSWORD."""
        return self.secret("password", prefix="shard-embed:")

    def process(self, name: str) -> psutil.Process | None:
        """Return a process that `start` has started, if it still runs."""
        try:
            pid, created = (self.path / f"{name}.pid").read_text().split()
            process = psutil.Process(int(pid))
            same = abs(process.create_time() - float(created)) < 2  # else its id was given to another one
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (OSError, ValueError, psutil.Error):
            return None

    def port(self, name: str) -> int | None:
        """Return the port that one of our processes listens on; None if it does not, or does not run."""
        process = self.process(name)
        if process is None:
            return None
        try:
            family = [process, *process.children(recursive=True)]
            sockets = [socket for one in family for socket in one.net_connections("tcp")]
        except psutil.Error:
            return None
        return next((s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN), None)

    def start(self, name: str, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start a Python module in a session of its own; its output goes to NAME.log, its process id to NAME.pid."""
        with (self.path / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        (self.path / f"{name}.pid").write_text(f"{process.pid} {psutil.Process(process.pid).create_time()}\n")


def up(path: Path, port: int, options: Sequence[str]) -> int:
    """Start whatever does not run yet, print the UI's address, and return the exit status.

    Args:
        path: Folder for the database, logs, password and process ids.
        port: Port of the server on loopback. If another process has it, the next free one is taken.
        options: Of `deployments.deploy`.
    """
    home = Home.make(path)
    reports = home.port("reports") or free_port(REPORTS_PORT)
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home.path),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_API_AUTH_STRING": home.password,
        "PREFECT_API_AUTH_STRING": home.password,
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")])),
        BASE_VARIABLE: f"http://{LOOPBACK}:{reports}",
        KEY_VARIABLE: home.secret("reports.key"),
    }
    url = _server(home, port, environment)
    environment["PREFECT_API_URL"] = f"{url}/api"
    deployed = subprocess.run([sys.executable, "-m", "deployments.deploy", *options], env=environment)
    if deployed.returncode:
        return deployed.returncode
    if home.process("reports") is None:
        home.start("reports", ["deployments.reports", str(reports)], environment)
    if home.process("worker") is None:
        home.start("worker", ["prefect", "worker", "start", "--pool", POOL], environment)
    print(f"Prefect UI: {url}/deployments    its password: {home.path}/password    logs: {home.path}/*.log")
    print("For commands such as `prefect deployment run` in a shell:")
    print(f'    export PREFECT_API_URL={url}/api PREFECT_API_AUTH_STRING="$(cat {home.path}/password)"')
    print("Stop it: make down")
    return 0


def _server(home: Home, port: int, environment: dict[str, str]) -> str:
    """Return the address of our own server, which is started if it does not run.

    Raises:
        SystemExit: It does not start, or does not answer.
    """
    if home.process("server") is None:
        free = free_port(port)
        if free != port:
            print(f"port {port} belongs to another process; this server takes {free}")
        command = ["prefect", "server", "start", "--host", LOOPBACK, "--port", str(free)]
        api = {"PREFECT_API_URL": f"http://{LOOPBACK}:{free}/api"}  # the pages of its UI ask there
        home.start("server", command, environment | api)
    until = time.monotonic() + START_SECONDS
    while True:
        # The port is the one that our process listens on, whoever listens elsewhere: our password goes nowhere else.
        found = home.port("server")
        problem = "it does not listen yet" if found is None else _refusal(f"http://{LOOPBACK}:{found}", home.password)
        if not problem:
            return f"http://{LOOPBACK}:{found}"
        if time.monotonic() > until or home.process("server") is None:
            raise SystemExit(f"error: the server does not answer ({problem}); see {home.path}/server.log")
        time.sleep(0.3)


def _refusal(url: str, password: str) -> str:
    """Return why a server does not serve us; "" if it does."""
    request = urllib.request.Request(f"{url}/api/admin/version")
    request.add_header("Authorization", "Basic " + b64encode(password.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=5):
            return ""
    except OSError as error:
        return str(error)


def free_port(wanted: int) -> int:
    """Return a port of loopback that nobody listens on: the one that is wanted, or the next free one above it."""
    for port in range(wanted, 65536):
        with socket.socket() as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                tried.bind((LOOPBACK, port))
            except OSError:
                continue
            return port
    raise SystemExit(f"error: no free port from {wanted} on; give another --port")


def down(path: Path) -> int:
    """Stop what `up` has started; return the exit status."""
    home = Home(path.resolve())
    for name in PROCESSES:
        process = home.process(name)
        if process is not None:
            os.killpg(process.pid, signal.SIGTERM)
            until = time.monotonic() + STOP_SECONDS
            while home.process(name) is not None and time.monotonic() < until:
                time.sleep(0.2)
            if home.process(name) is not None:
                os.killpg(process.pid, signal.SIGKILL)
            print(f"{name} stopped")
        (home.path / f"{name}.pid").unlink(missing_ok=True)
    return 0


def main(arguments: Sequence[str]) -> int:
    """Start or stop it all; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("what", choices=("up", "down"), help="start or stop it all")
    parser.add_argument("--port", type=int, default=PORT, help="port of the server, unless another process has it")
    parser.add_argument("--home", type=Path, default=Path(".prefect"), help="folder for database, logs and password")
    parser.add_argument("--notify", metavar="URL", help="post failed runs there as JSON")
    parser.add_argument("--redeploy", action="store_true", help="replace what was set in the UI by what is declared")
    parser.add_argument("--datasets", metavar="FILE", help="more datasets, in the form of deployments/datasets.yaml")
    args = parser.parse_args(arguments)
    if args.what == "down":
        return down(args.home)
    options = ["--redeploy"] * args.redeploy
    options += ["--notify", args.notify] if args.notify else []
    options += ["--datasets", args.datasets] if args.datasets else []
    return up(args.home, args.port, options)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
