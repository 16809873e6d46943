"""`make up` and `make down`: a Prefect server, a worker and the deployments on this machine."""

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

HOME = Path(".prefect")
POOL = "shard-embed"
SECONDS = 90.0


def up(port: int, notify: str | None) -> int:
    """Start what does not run yet, and print where the UI is."""
    HOME.mkdir(exist_ok=True)
    url = f"http://127.0.0.1:{port}"
    environment = {
        **os.environ,
        "PREFECT_HOME": str(HOME.resolve()),
        "PREFECT_API_URL": f"{url}/api",
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PYTHONPATH": os.pathsep.join(filter(None, [os.getcwd(), os.environ.get("PYTHONPATH")])),
    }
    if _running("server") is None:
        _start("server", ["prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)], environment)
    _wait(f"{url}/api/health")
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
    if _running("worker") is None:
        _start("worker", ["prefect", "worker", "start", "--pool", POOL], environment)
    print(f"Prefect UI: {url}/deployments    logs: {HOME}/*.log    make down ends it")
    return 0


def down() -> int:
    """End what `up` has started: the worker with the runs it has in hand, then the server."""
    for name in ("worker", "server"):
        pid = _running(name)
        if pid is not None:
            os.killpg(pid, signal.SIGTERM)
            until = time.monotonic() + 30
            while _running(name) is not None and time.monotonic() < until:
                time.sleep(0.2)
            if _running(name) is not None:
                os.killpg(pid, signal.SIGKILL)
            print(f"{name} ended")
        (HOME / f"{name}.pid").unlink(missing_ok=True)
    return 0


def _start(name: str, command: Sequence[str], environment: dict[str, str]) -> None:
    with (HOME / f"{name}.log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    (HOME / f"{name}.pid").write_text(f"{process.pid}\n")


def _running(name: str) -> int | None:
    """The process that was started under a name, if it is still that one."""
    try:
        pid = int((HOME / f"{name}.pid").read_text())
        status = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return pid if status != "Z" and b"prefect" in Path(f"/proc/{pid}/cmdline").read_bytes() else None
    except (OSError, ValueError):
        return None


def _wait(url: str) -> None:
    until = time.monotonic() + SECONDS
    while True:
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except OSError as error:
            if time.monotonic() > until or _running("server") is None:
                raise SystemExit(f"error: the server does not answer ({error}); see {HOME}/server.log") from error
            time.sleep(0.5)


def main(arguments: Sequence[str]) -> int:
    """Up or down."""
    parser = argparse.ArgumentParser(prog="python -m deployments.local", description=__doc__)
    parser.add_argument("what", choices=("up", "down"))
    parser.add_argument("--port", type=int, default=4200)
    parser.add_argument("--notify", metavar="URL", help="where failed runs are posted as JSON")
    args = parser.parse_args(arguments)
    return up(args.port, args.notify) if args.what == "up" else down()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
