"""A Prefect server, a worker and the deployments, as `make up` starts them, in a folder of their own."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.servers import free_port

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Prefect:
    """A server that is up."""

    url: str

    def ask(self, path: str, body: object = None) -> Any:
        """What the API answers; a POST if there is a body."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def deployment(self, name: str) -> str:
        """A deployment's id."""
        return str(self.ask(f"/deployments/name/{name}")["id"])

    def start(self, deployment: str, **parameters: Any) -> str:
        """Start a deployment as the form does; the run's id."""
        path = f"/deployments/{self.deployment(deployment)}/create_flow_run"
        return str(self.ask(path, {"parameters": parameters})["id"])

    def ended(self, run: str, seconds: float = 180) -> Any:
        """The run once it has ended."""
        until = time.monotonic() + seconds
        while (found := self.ask(f"/flow_runs/{run}"))["state_type"] not in ENDED:
            assert time.monotonic() < until, found["state"]
            time.sleep(0.5)
        return found

    def runs(self, flow: str) -> list[Any]:
        """All runs of a flow, the newest first."""
        return list(
            self.ask("/flow_runs/filter", {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_DESC"})
        )

    def artifacts(self, run: str) -> dict[str, Any]:
        """The artifacts of a run by the kind that their key begins with."""
        found = self.ask("/artifacts/filter", {"artifacts": {"flow_run_id": {"any_": [run]}}})
        return {artifact["key"].partition("-")[0]: artifact for artifact in found}


@contextlib.contextmanager
def up(home: Path, *options: str, **environment: str) -> Iterator[Prefect]:
    """`make up` and, at the end, `make down`."""
    port = str(free_port())
    command = [sys.executable, "-m", "deployments.local"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    try:
        subprocess.run(
            [*command, "up", "--home", str(home), "--port", port, *options],
            cwd=ROOT,
            env=clean | {"PREFECT_WORKER_QUERY_SECONDS": "1"} | environment,
            check=True,
        )
        yield Prefect(f"http://127.0.0.1:{port}")
    finally:
        subprocess.run([*command, "down", "--home", str(home)], cwd=ROOT, check=True)


@pytest.fixture(scope="module")
def told() -> Iterator[tuple[str, list[str]]]:
    """A place on loopback that takes JSON, and what was posted there."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    posted: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(self.rfile.read(int(self.headers["Content-Length"])).decode())
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", posted
    server.shutdown()


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, told: tuple[str, list[str]]) -> Iterator[Prefect]:
    with up(tmp_path_factory.mktemp("prefect"), "--notify", told[0]) as server:
        yield server
