"""A Prefect server, a worker and the deployments, as `make up` starts them, in a folder of their own."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from base64 import b64encode
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Prefect:
    """A server that is up, and what `make up` has said."""

    url: str
    home: Path
    said: str

    @property
    def password(self) -> str:
        """What the server asks for."""
        return (self.home / "password").read_text()

    @property
    def settings(self) -> dict[str, str]:
        """The variables of a shell that uses it."""
        return {"PREFECT_API_URL": f"{self.url}/api", "PREFECT_API_AUTH_STRING": self.password}

    def ask(self, path: str, body: object = None, method: str | None = None) -> Any:
        """What the API answers; a POST if there is a body, unless another method is given."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        headers["Authorization"] = "Basic " + b64encode(self.password.encode()).decode()
        request = urllib.request.Request(f"{self.url}/api{path}", data, headers, method=method)
        until = time.monotonic() + 60
        while True:
            try:
                with urllib.request.urlopen(request, timeout=30) as answer:
                    return json.loads(answer.read() or b"null")
            except urllib.error.HTTPError as error:  # SQLite is busy; Prefect's own client tries again, too
                if error.code != 503 or time.monotonic() > until:
                    raise
            time.sleep(1)

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
        return {artifact["key"].partition("-")[0]: artifact for artifact in found if artifact["key"]}


def run_up(home: Path, port: int, *options: str, **environment: str) -> Prefect:
    """`make up`."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(
        [sys.executable, "-m", "deployments.local", "up", "--home", str(home), "--port", str(port), *options],
        cwd=ROOT,
        env=clean | {"PREFECT_WORKER_QUERY_SECONDS": "1"} | environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    line = re.search(r"export PREFECT_API_URL=(\S+)/api PREFECT_API_AUTH_STRING=", done.stdout)
    assert line is not None, done.stdout
    return Prefect(line[1], home, done.stdout)


@contextlib.contextmanager
def up(home: Path, *options: str, **environment: str) -> Iterator[Prefect]:
    """`make up` while another process has the port that it wants and, at the end, `make down`."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = int(other.getsockname()[1])
        try:
            server = run_up(home, port, *options, **environment)
            assert f"port {port} belongs to another process" in server.said
            yield server
        finally:
            down = [sys.executable, "-m", "deployments.local", "down", "--home", str(home)]
            subprocess.run(down, cwd=ROOT, check=True)


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


BRANCH = "as-cloned"


def cloneable(folder: Path) -> Path:
    """A git repository with this project, whose runs have another name."""
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    flow = folder / "flows/embed.py"
    flow.write_text(flow.read_text().replace('return f"embed {last_name', 'return f"cloned {last_name'))
    who = ["-c", "user.name=test", "-c", "user.email=test@localhost"]
    for command in (["init", "-q", "-b", BRANCH], ["add", "-A"], [*who, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    return folder


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A datasets.yaml with one entry."""
    file = tmp_path_factory.mktemp("datasets") / "datasets.yaml"
    file.write_text("- {name: second, dataset: /data/second, output: /data/out, model: resnet50, cron: '0 4 * * *'}\n")
    return file


@pytest.fixture(scope="module")
def prefect(tmp_path_factory: pytest.TempPathFactory, told: tuple[str, list[str]], datasets: Path) -> Iterator[Prefect]:
    repository = cloneable(tmp_path_factory.mktemp("repository"))
    variables = {"SHARD_EMBED_REPOSITORY": str(repository), "SHARD_EMBED_BRANCH": BRANCH}
    variables["SHARD_EMBED_TIMEZONE"] = "Europe/Berlin"
    home = tmp_path_factory.mktemp("prefect")
    with up(home, "--notify", told[0], "--datasets", str(datasets), **variables) as server:
        yield server
