"""Another user of the machine, during a real run: no port or socket answers, and no temporary file tells a secret."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import s3fs

from tests.servers import s3_server

from .conftest import ROOT, processes_with

SECRET = "a-key-of-the-store"
STORE = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
MODEL = ("--embedder", "tests.faulty:Faulty", "--device", "cpu", "--workers", "2")
PRIVATE_KEY = "PRIVATE KEY-----"
FIRST_MEMBER = "000000000.jpg"
"""The name of a member of the dataset's tars: what a file shows that holds the dataset's data."""

pytestmark = pytest.mark.skipif(os.getuid() != 0, reason='only root can become another user, "nobody"')


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files as /tmp is: everybody may enter it and write there."""
    folder = Path(tempfile.mkdtemp(prefix="shard-embed-test-"))
    folder.chmod(0o1777)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def store(demo_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An S3 server with the demo's dataset in s3://bucket/data; its URL."""
    with s3_server() as url:
        fs = s3fs.S3FileSystem(key="testing", secret=SECRET, endpoint_url=url, skip_instance_cache=True)
        fs.mkdir("bucket")
        fs.put([str(path) for path in sorted(demo_dataset.glob("0*"))], "bucket/data/")
        yield url


def start(store: str, temporary: Path, output: Path) -> subprocess.Popen[bytes]:
    """A run that takes seconds per shard, by a user without a home: Prefect's database is a temporary file too."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= STORE | {"AWS_ENDPOINT_URL": store, "TMPDIR": str(temporary), "HOME": "/nonexistent"}
    call = [sys.executable, "-m", "flows.embed", "s3://bucket/data", "--output", str(output), *MODEL]
    return subprocess.Popen(call, cwd=ROOT, env=environment | {"FAULT": "slow:4"}, stderr=subprocess.DEVNULL)


def attack(processes: list[int], temporary: Path) -> list[str]:
    """What user "nobody" can do to some processes and see in the temporary folders."""
    running = [psutil.Process(process) for process in processes]
    ports = {c.laddr.port for p in running for c in p.net_connections("inet") if c.status == "LISTEN"}
    assert len(ports) >= 6  # Prefect, the scheduler, two nannies, two workers
    sockets = {str(c.laddr) for p in running for c in p.net_connections("unix") if c.laddr}
    password = {p.environ()["PREFECT_API_AUTH_STRING"] for p in running if "PREFECT_API_AUTH_STRING" in p.environ()}
    assert len(password) == 1
    secrets = [*password, SECRET, PRIVATE_KEY, FIRST_MEMBER]
    arguments = [sorted(ports), processes, sorted(sockets), [str(temporary), "/dev/shm"], secrets]
    command = [sys.executable, str(Path(__file__).with_name("stranger.py")), *map(json.dumps, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stderr == ""
    return list(json.loads(done.stdout))


def test_another_user_gets_nothing_of_a_run(store: str, temporary: Path, tmp_path: Path) -> None:
    process = start(store, temporary, tmp_path / "out")
    try:
        until = time.monotonic() + 240
        while not list(tmp_path.glob("out/layers/*/*.parquet")):
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.1)
        found = [number for number, _ in processes_with(f"TMPDIR={temporary}")]
        assert {path.name.rpartition("-")[0] for path in temporary.iterdir()} >= {"shard-embed", "shard-embed-prefect"}
        decoy = temporary / "decoy"
        decoy.write_text(f"secret={SECRET}")
        assert attack(found, temporary) == [f"{decoy}: shows {SECRET}"]
        assert process.poll() is None
    finally:
        process.terminate()
        process.wait(60)
