"""`make up` and `make down`: run a Prefect server, a worker and the deployments on this machine."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

POOL = "shard-embed"
START_SECONDS = 90.0
STOP_SECONDS = 30.0


def up(home: Path, port: int, notify: str | None) -> int:
    """Start whatever does not run yet, print the UI's address, and return the exit status.

    Args:
        home: Folder for the database, logs and process ids.
        port: Port of the server on loopback.
        notify: URL to post failed runs to; None for none.
    """
    home.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home.resolve()),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    if _running(home / "server.pid") is None:
        _start(home / "server", ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], environment)
    _wait(f"{url}/api/health", home)
    once = [
        ["prefect", "work-pool", "create", "--type", "process", "--overwrite", POOL],
        ["prefect", "--no-prompt", "deploy", "--all", "--prefect-file", "deployments/prefect.yaml"],
        ["deployments.automations", *(["--notify", notify] if notify else [])],
    ]
    for module, *arguments in once:
        done = subprocess.run(
            [sys.executable, "-m", module, *arguments], env=environment, capture_output=True, text=True
        )
        if done.returncode:
            print(f"error: {module} {' '.join(arguments)}: {done.stdout}{done.stderr}", file=sys.stderr)
            return 1
    if _running(home / "worker.pid") is None:
        _start(home / "worker", ["prefect", "worker", "start", "--pool", POOL], environment)
    print(f"Prefect UI: {url}/deployments    logs: {home}/*.log    stop it: make down")
    return 0


def down(home: Path) -> int:
    """Stop what `up` has started, the worker with its runs before the server; return the exit status."""
    for name in ("worker", "server"):
        file = home / f"{name}.pid"
        pid = _running(file)
        if pid is not None:
            os.killpg(pid, signal.SIGTERM)
            until = time.monotonic() + STOP_SECONDS
            while _running(file) is not None and time.monotonic() < until:
                time.sleep(0.2)
            if _running(file) is not None:
                os.killpg(pid, signal.SIGKILL)
            print(f"{name} stopped")
        file.unlink(missing_ok=True)
    return 0


def _start(place: Path, command: Sequence[str], environment: dict[str, str]) -> None:
    """Start a Python module in a session of its own; its output goes to `place`.log, its process id to `place`.pid."""
    with place.with_suffix(".log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    place.with_suffix(".pid").write_text(f"{process.pid}\n")


def _running(file: Path) -> int | None:
    """Return the process id in a file if that process runs and is one of Prefect's; else None."""
    try:
        pid = int(file.read_text())
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return pid if status != "Z" and b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError):
        return None


def _wait(url: str, home: Path) -> None:
    """Return once the server answers; exit if it dies or stays silent for too long."""
    until = time.monotonic() + START_SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until or _running(home / "server.pid") is None:
                raise SystemExit(f"error: the server does not answer ({error}); see {home}/server.log") from error
            time.sleep(0.5)


def main(arguments: Sequence[str]) -> int:
    """Start or stop it all; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("what", choices=("up", "down"), help="start or stop it all")
    parser.add_argument("--port", type=int, default=4200, help="port of the server")
    parser.add_argument("--home", type=Path, default=Path(".prefect"), help="folder for database, logs and process ids")
    parser.add_argument("--notify", metavar="URL", help="post failed runs there as JSON")
    args = parser.parse_args(arguments)
    return up(args.home, args.port, args.notify) if args.what == "up" else down(args.home)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
