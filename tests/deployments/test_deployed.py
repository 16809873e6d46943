"""The deployments on a real server with a real worker: runs from the API, shards that come and go, bad input."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.flows.conftest import processes_with
from tests.servers import free_port

from .conftest import Prefect, up

pytestmark = pytest.mark.deployed
TINY = {"model": {"model_name": "test_vit.r160_in1k", "pretrained": False}, "work": {"device": "cpu"}}


def written(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "layers/image_embedding").glob("*.parquet")}


def test_a_run_is_watched_and_accounted_for(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> None:
    run = prefect.ended(prefect.start("embed/smoke", dataset=str(demo_dataset), output=str(tmp_path / "out")))
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["name"] == "embed demo-data with test_vit.r160_in1k"
    artifacts = prefect.artifacts(run["id"])
    assert artifacts.keys() == {"progress", "summary", "shards", "quarantine", "pictures", "report"}
    assert artifacts["progress"]["data"] == 100
    assert "256 = 254 embedded + 2 quarantined" in artifacts["summary"]["data"]


def test_shards_that_come_and_go(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> None:
    """The sensor starts a run for what is new, once; only that is embedded; what has gone is told."""
    dataset, output = tmp_path / "growing", tmp_path / "out"
    dataset.mkdir()
    places = {"dataset": str(dataset), "output": str(output)}

    def add(shard: str) -> None:
        for end in ("parquet", "tar"):
            shutil.copy(demo_dataset / f"{shard}.{end}", dataset)

    def sense() -> Any:
        run = prefect.ended(prefect.start("new-shards/new-shards", **places, parameters=TINY))
        assert run["state_type"] == "COMPLETED", run["state"]
        started = [run for run in prefect.runs("embed") if run["parameters"]["dataset"] == str(dataset)]
        return [prefect.ended(run["id"]) for run in started]

    add("00000")
    (first,) = sense()
    assert first["state_type"] == "COMPLETED", first["state"]
    before = written(output)
    assert before.keys() == {"00000.parquet"}
    assert len(sense()) == 1
    add("00001")
    second, _ = sense()
    assert second["state_type"] == "COMPLETED", second["state"]
    after = written(output)
    assert after.keys() == {"00000.parquet", "00001.parquet"}
    assert after["00000.parquet"] == before["00000.parquet"]
    (dataset / "00000.tar").unlink()
    add("00002")
    third, *_ = sense()
    summary = prefect.artifacts(third["id"])["summary"]["data"]
    assert "1 shard of the output no longer in the dataset, such as 00000" in summary


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"dataset": "/nowhere/images"}, "/nowhere/images: no such folder"),
        ({"model": {"model_name": "resnet5x", "pretrained": False}}, "no timm model is named 'resnet5x'"),
        ({"work": {"scheduler": "tcp://127.0.0.1:9"}}, "--scheduler tcp://127.0.0.1:9: cannot connect"),
    ],
)
def test_bad_input_fails_the_run_in_a_sentence(
    change: dict[str, Any],
    sentence: str,
    prefect: Prefect,
    told: tuple[str, list[str]],
    demo_dataset: Path,
    tmp_path: Path,
) -> None:
    given: dict[str, Any] = {"dataset": str(demo_dataset), "output": str(tmp_path / "out"), **TINY, **change}
    run = prefect.ended(prefect.start("embed/on-demand", **given), seconds=60)
    assert run["state_type"] == "FAILED"
    assert sentence in run["state"]["message"]
    assert "\n" not in run["state"]["message"]
    until = time.monotonic() + 60
    while not any(sentence in json.loads(post)["text"] for post in told[1]):
        assert time.monotonic() < until, told[1]
        time.sleep(0.5)


def test_a_wrong_value_is_refused_by_the_form(prefect: Prefect) -> None:
    path = f"/deployments/{prefect.deployment('embed/on-demand')}/create_flow_run"
    with pytest.raises(OSError, match="409"):
        prefect.ask(path, {"parameters": {"dataset": "d", "output": "o", "images": {"decode": "quick"}}})


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """A PostgreSQL server on loopback; its URL."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        pytest.skip("no PostgreSQL here: apt-get install postgresql")
    binaries, data, port = found[-1].parent, tmp_path / "pg", free_port()
    # It refuses to run as root.
    user = pwd.getpwnam("postgres" if os.getuid() == 0 else pwd.getpwuid(os.getuid()).pw_name)
    data.mkdir()
    for folder in (data, *list(tmp_path.parents)[:2], tmp_path):
        folder.chmod(0o755)
    data.chmod(0o700)
    if os.getuid() == 0:
        os.chown(data, user.pw_uid, user.pw_gid)
    who: dict[str, Any] = {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []} if os.getuid() == 0 else {}
    subprocess.run(
        [binaries / "initdb", "-D", data, "-U", "prefect", "-A", "trust"], check=True, stdout=subprocess.DEVNULL, **who
    )
    options = ["-h", "127.0.0.1", "-p", str(port), "-k", str(data), "-c", "fsync=off"]
    process = subprocess.Popen([binaries / "postgres", "-D", data, *options], stderr=subprocess.DEVNULL, **who)
    try:
        until = time.monotonic() + 30
        ask: list[str | Path] = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-q"]
        while subprocess.run(ask, check=False).returncode:
            assert process.poll() is None
            assert time.monotonic() < until
            time.sleep(0.2)
        yield f"postgresql+asyncpg://prefect@127.0.0.1:{port}/postgres"
    finally:
        process.terminate()
        process.wait(30)


def test_postgresql_as_the_servers_database(postgres: str, demo_dataset: Path, tmp_path: Path) -> None:
    with up(tmp_path / "home", PREFECT_SERVER_DATABASE_CONNECTION_URL=postgres) as prefect:
        run = prefect.ended(prefect.start("embed/smoke", dataset=str(demo_dataset), output=str(tmp_path / "out")))
        assert run["state_type"] == "COMPLETED", run["state"]
        assert prefect.artifacts(run["id"])["progress"]["data"] == 100
    assert not list((tmp_path / "home").glob("*.db"))


def test_a_run_whose_machine_died_is_marked(demo_dataset: Path, tmp_path: Path) -> None:
    """The worker and all of the run are gone without a word, as after a power cut; Retry would do the rest."""
    home, mark = tmp_path / "home", f"DIED={tmp_path.name}"
    with up(home, FAULT="hangs:00003", **dict([mark.split("=")])) as prefect:
        given: dict[str, Any] = {"model": {"embedder": "tests.faulty:Faulty"}, "work": {"device": "cpu"}}
        run = prefect.start("embed/on-demand", dataset=str(demo_dataset), output=str(tmp_path / "out"), **given)
        until = time.monotonic() + 120
        while len(written(tmp_path / "out")) < 3:
            assert time.monotonic() < until, prefect.ask(f"/flow_runs/{run}")["state"]
            time.sleep(0.5)
        server = int((home / "server.pid").read_text())
        for pid, _ in processes_with(mark):
            if os.getsid(pid) != server:
                os.kill(pid, signal.SIGKILL)
        ended = prefect.ended(run, seconds=180)
    assert ended["state_type"] == "CRASHED"
    assert ended["state"]["message"] == "its process is gone; Retry does only what it left unfinished"
