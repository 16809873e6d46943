"""The servers that a run starts for itself: nobody else can use them, and what is wrong with them is said."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.server import LocalServer, check_server
from tasks.own_cluster import own_cluster

from .conftest import ROOT, TINY

EMBED_TINY = ("--model-name", TINY, "--no-pretrained", "--device", "cpu", "--workers", "1")


def listening() -> dict[int, list[int]]:
    """The ports that this process and those it has started listen on, by process."""
    me = psutil.Process()
    found = {}
    for process in [me, *me.children(recursive=True)]:
        found[process.pid] = [c.laddr.port for c in process.net_connections("inet") if c.status == "LISTEN"]
    return found


def test_another_user_can_neither_run_nor_read_anything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scheduler, the nanny, the worker, their web pages and the Prefect server, as user "nobody"."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    before = {port for ports in listening().values() for port in ports}
    server = LocalServer()
    try:
        with own_cluster("cpu", 1) as cluster:
            assert cluster.address().startswith("tls://")
            server.wait()
            held = listening()
            ports = sorted({port for ports in held.values() for port in ports} - before)
            assert len(ports) >= 6
            secret = server.auth_string.encode()
            for process in held:
                assert secret not in Path(f"/proc/{process}/cmdline").read_bytes()
            stranger = [sys.executable, str(Path(__file__).with_name("stranger.py")), json.dumps(ports)]
            started = [server.process.pid, *(process for process in held if process != os.getpid())]
            done = subprocess.run(
                [*stranger, json.dumps(started)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True
            )
    finally:
        server.stop()
    assert json.loads(done.stdout) == []


def test_a_dead_server_comes_back_on_its_port_with_its_password(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    server = LocalServer()
    try:
        server.wait()
        before, process = server.port, server.process
        process.kill()
        with temporary_settings({PREFECT_API_URL: server.api_url, PREFECT_API_AUTH_STRING: server.auth_string}):
            check_server()
        assert server.port == before
        assert server.process is not process
    finally:
        server.stop()


def test_a_server_that_does_not_answer_ends_in_one_line(
    demo_dataset: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    call = (demo_dataset, "--output", tmp_path / "out", *EMBED_TINY)
    done = command(*call, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert "PREFECT_API_URL=http://127.0.0.1:9/api: this Prefect server cannot be used ([Errno 111]" in done.stderr
    assert not list((tmp_path / "out").glob("*"))


def test_a_wrong_password_ends_in_one_line(
    server: str, demo_dataset: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    done = command(demo_dataset, "--output", tmp_path / "out", *EMBED_TINY, PREFECT_API_AUTH_STRING="wrong")
    assert done.status == 2
    assert done.stderr.count("\n") == 1
    assert "401 Unauthorized" in done.stderr


def test_a_user_without_a_home_gets_a_temporary_one(tmp_path: Path) -> None:
    """Its folder is gone afterwards; a child process uses the same."""
    (tmp_path / "tmp").mkdir()
    script = """
import os, flows, subprocess, sys
from prefect.settings import get_current_settings
home = get_current_settings().home
assert home.is_dir() and str(home) == os.environ["PREFECT_HOME"], home
subprocess.run([sys.executable, "-c", "import flows"], check=True)
assert home.is_dir()
print(home)
"""
    variables = {name: value for name, value in os.environ.items() if name != "PREFECT_HOME"}
    variables |= {"HOME": "/proc/nobody", "TMPDIR": str(tmp_path / "tmp"), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=variables, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{tmp_path}/tmp/")
    assert not list((tmp_path / "tmp").iterdir())


def test_a_local_server_that_does_not_start_says_why_at_once(
    demo_dataset: Path, tmp_path: Path, command: Callable[..., Any]
) -> None:
    begun = time.monotonic()
    variables = {"PREFECT_API_URL": "", "PREFECT_HOME": "/proc/nobody"}
    variables["PREFECT_API_DATABASE_CONNECTION_URL"] = "sqlite+aiosqlite:////proc/nobody/prefect.db"
    done = command(demo_dataset, "--output", tmp_path / "out", *EMBED_TINY, **variables)
    assert done.status == 2
    assert time.monotonic() - begun < 50
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: the local Prefect server did not start: it ended with status")
    assert "unable to open database file" in last
    assert "set PREFECT_HOME" in last
