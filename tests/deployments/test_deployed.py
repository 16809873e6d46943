"""The deployments on a real server with a real worker: runs from the API, shards that come and go, bad input."""

from __future__ import annotations

import json
import os
import pwd
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from deployments.declared import DECLARED
from flows.server import prefect_server
from tasks.run_lock import LOCK
from tests.flows.conftest import processes_with
from tests.servers import free_port

from .conftest import ROOT, Prefect, run_up, up

pytestmark = pytest.mark.deployed
PULL = re.compile("# (pull:|  - prefect|      (repository|branch):)")
"""The lines of prefect.yaml that have the flows fetched from git, as comments."""
TINY = {"model": {"model_name": "test_vit.r160_in1k", "pretrained": False}, "work": {"device": "cpu"}}


def written(output: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (output / "layers/image_embedding").glob("*.parquet")}


def test_the_server_is_ours_and_others_need_a_password(prefect: Prefect) -> None:
    assert (prefect.home / "password").stat().st_mode & 0o777 == 0o600
    assert (prefect.home / "reports.key").stat().st_mode & 0o777 == 0o600
    for path in ("/api/flows/count", "/api/admin/settings"):
        with pytest.raises(OSError, match=r"401|405"):
            urllib.request.urlopen(f"{prefect.url}{path}", timeout=30)


def test_a_run_is_watched_and_accounted_for(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> None:
    """The caller gets the manifest, and the report opens by its link."""
    given = {"dataset": str(demo_dataset), "output": str(tmp_path / "out")}
    settings = {PREFECT_API_URL: f"{prefect.url}/api", PREFECT_API_AUTH_STRING: prefect.password}
    with temporary_settings(settings):
        started: Any = run_deployment("embed/smoke", parameters=given, timeout=180, poll_interval=1)
        assert started.state.result()["embedded"] == 254
    run = prefect.ended(str(started.id))
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["name"] == "embed demo-data with test_vit.r160_in1k"
    assert set(run["tags"]) == {"shard-embed", "smoke", "dataset:demo-data", "model:test_vit.r160_in1k"}
    artifacts = prefect.artifacts(run["id"])
    assert artifacts.keys() == {"progress", "summary", "shards", "quarantine", "pictures", "report"}
    assert artifacts["progress"]["data"] == 100
    assert "256 = 254 embedded + 2 quarantined" in artifacts["summary"]["data"]
    link = re.search(r"http://127\S+(?=\))", artifacts["report"]["data"])
    assert link is not None
    with urllib.request.urlopen(link[0], timeout=30) as report:
        assert report.read() == (tmp_path / "out/report.html").read_bytes()
    with pytest.raises(OSError, match="404"):
        urllib.request.urlopen(link[0].replace("%2Fout", "%2F"), timeout=30)


def test_a_second_up_keeps_what_was_set_in_the_ui(prefect: Prefect, datasets: Path) -> None:
    nightly = prefect.deployment("embed/nightly")
    (schedule,) = prefect.ask(f"/deployments/{nightly}")["schedules"]
    assert (schedule["schedule"]["timezone"], schedule["active"]) == ("Europe/Berlin", False)
    prefect.ask(f"/deployments/{nightly}", {"parameters": {"dataset": "/mine", "output": "/out"}}, "PATCH")
    prefect.ask(f"/deployments/{nightly}/schedules/{schedule['id']}", {"active": True}, "PATCH")
    dead = next(one for one in prefect.ask("/automations/filter", {}) if "dead" in one["name"])
    prefect.ask(f"/automations/{dead['id']}", {"enabled": False}, "PATCH")
    again = run_up(prefect.home, 4200, "--datasets", str(datasets))
    assert again.url == prefect.url
    assert "embed/nightly: kept" in again.said  # the time zone's variable is not set now
    assert "embed/smoke" not in again.said
    kept = prefect.ask(f"/deployments/{nightly}")
    assert (kept["parameters"]["dataset"], kept["schedules"][0]["active"]) == ("/mine", True)
    assert not prefect.ask(f"/automations/{dead['id']}")["enabled"]
    prefect.ask(f"/automations/{dead['id']}", {"enabled": True}, "PATCH")
    prefect.ask(f"/deployments/{nightly}/schedules/{schedule['id']}", {"active": False}, "PATCH")
    assert prefect.ask(f"/deployments/{prefect.deployment('embed/second')}")["parameters"]["dataset"] == "/data/second"


def test_no_two_runs_share_the_gpus(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> None:
    """Of different deployments and outputs."""
    asked = [("embed/smoke", "a"), ("embed/on-demand", "b")]
    runs = [
        prefect.start(deployment, dataset=str(demo_dataset), output=str(tmp_path / output), **TINY)
        for deployment, output in asked
    ]
    ended = [prefect.ended(run, seconds=300) for run in runs]
    assert {run["state_type"] for run in ended} == {"COMPLETED"}
    first, second = sorted(ended, key=lambda run: str(run["start_time"]))
    assert first["end_time"] <= second["start_time"]


def test_the_flow_comes_from_git_if_prefect_yaml_says_so(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> None:
    """As its comment says, with `prefect deploy` and variables of the shell."""
    text = DECLARED.read_text().replace("\npull: []\n", "\n")
    lines = [line.removeprefix("# ") if PULL.match(line) else line for line in text.splitlines()]
    (tmp_path / "prefect.yaml").write_text("\n".join(lines).replace("name: smoke", "name: from-git"))
    variables = {name: str(value) for name, value in yaml.safe_load(text)["definitions"]["variables"].items()}
    command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--name", "from-git"]
    command += ["--prefect-file", str(tmp_path / "prefect.yaml")]
    environment = os.environ | variables | prefect.settings | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    run = prefect.ended(prefect.start("embed/from-git", dataset=str(demo_dataset), output=str(tmp_path / "out")))
    assert run["state_type"] == "COMPLETED", run["state"]
    assert run["name"] == "cloned demo-data with test_vit.r160_in1k"


def test_one_process_serves_all(demo_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a work pool: a sensor runs while an embedding run goes on, and both end."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PREFECT_RUNNER_POLL_FREQUENCY", "1")
    places = {"dataset": str(demo_dataset), "output": str(tmp_path / "out")}
    (tmp_path / "empty").mkdir()
    nothing = {"dataset": str(tmp_path / "empty"), "output": str(tmp_path / "no")}
    with prefect_server(), get_client(sync_client=True) as client, (tmp_path / "serve.log").open("wb") as log:
        command = [sys.executable, "-m", "deployments.serve"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, start_new_session=True)
        try:
            until = time.monotonic() + 120
            while len(client.read_deployments()) < 4:
                assert process.poll() is None, (tmp_path / "serve.log").read_text()
                assert time.monotonic() < until, (tmp_path / "serve.log").read_text()
                time.sleep(0.5)
            embedding = client.read_deployment_by_name("embed/smoke").id
            run = client.create_flow_run_from_deployment(embedding, parameters=places)
            while (state := client.read_flow_run(run.id).state) is None or not state.is_running():
                assert time.monotonic() < until, (tmp_path / "serve.log").read_text()
                time.sleep(0.2)
            sensor = run_deployment("new-shards/new-shards", parameters=nothing, poll_interval=1)
            assert sensor.state.is_completed(), sensor.state  # type: ignore[union-attr]
            while (state := client.read_flow_run(run.id).state) is None or not state.is_final():
                time.sleep(0.5)
            assert state.is_completed(), state
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


@dataclass
class Sensed:
    """The sensor on a dataset that grows, and the runs that it has started."""

    prefect: Prefect
    source: Path
    dataset: Path
    output: Path

    def add(self, shard: str) -> None:
        """Add a shard."""
        for end in ("parquet", "tar"):
            shutil.copy(self.source / f"{shard}.{end}", self.dataset)

    def sense(self, **parameters: Any) -> list[Any]:
        """Run the sensor once; what it has started so far, once that has ended, the newest first."""
        places = {"dataset": str(self.dataset), "output": str(self.output)}
        run = self.prefect.ended(self.prefect.start("new-shards/new-shards", **places, **parameters))
        assert run["state_type"] == "COMPLETED", run["state"]
        runs = [run for run in self.prefect.runs("embed") if run["parameters"]["dataset"] == str(self.dataset)]
        return [self.prefect.ended(run["id"]) for run in runs]

    def said(self) -> list[str]:
        """What the sensor's last run has said about its finding."""
        last = self.prefect.runs("new-shards")[0]["id"]
        until = time.monotonic() + 60
        while True:
            logs = self.prefect.ask("/logs/filter", {"logs": {"flow_run_id": {"any_": [last]}}})
            found = [log["message"] for log in logs if "new shard" in log["message"] and "flow" not in log["message"]]
            if found:
                return found
            assert time.monotonic() < until, logs
            time.sleep(0.5)

    def events(self) -> int:
        """How many events it has emitted."""
        resource = {"id": [f"shard-embed.dataset.{self.dataset}"]}
        found = self.prefect.ask("/events/filter", {"filter": {"resource": resource}})
        return len(found["events"])


@pytest.fixture
def sensed(prefect: Prefect, demo_dataset: Path, tmp_path: Path) -> Sensed:
    (tmp_path / "growing").mkdir()
    return Sensed(prefect, demo_dataset, tmp_path / "growing", tmp_path / "out")


def test_shards_that_come_and_go(sensed: Sensed) -> None:
    """The sensor starts one run for what is new; only that is embedded, by the same model; what has gone is named."""
    sensed.add("00000")
    (first,) = sensed.sense(parameters=TINY)
    assert first["state_type"] == "COMPLETED", first["state"]
    before = written(sensed.output)
    assert before.keys() == {"00000.parquet"}
    assert len(sensed.sense(parameters=TINY)) == 1
    sensed.add("00001")
    second, _ = sensed.sense()  # the deployment's own model is another one
    assert second["state_type"] == "COMPLETED", second["state"]
    assert second["name"] == "embed growing with test_vit.r160_in1k"
    after = written(sensed.output)
    assert after.keys() == {"00000.parquet", "00001.parquet"}
    assert after["00000.parquet"] == before["00000.parquet"]
    (sensed.dataset / "00000.tar").unlink()
    sensed.add("00002")
    third, *_ = sensed.sense()
    summary = sensed.prefect.artifacts(third["id"])["summary"]["data"]
    assert "1 shard of the output no longer in the dataset, such as 00000" in summary
    assert sensed.events() == 3


def test_what_failed_is_started_again_until_it_is_hopeless(sensed: Sensed) -> None:
    wrong = {"model": {"model_name": "resnet5x", "pretrained": False}, "work": {"device": "cpu"}}
    sensed.add("00000")
    assert [run["state_type"] for run in sensed.sense(parameters=wrong, attempts=2)] == ["FAILED"]
    assert [run["state_type"] for run in sensed.sense(parameters=wrong, attempts=2)] == ["FAILED"] * 2
    (started,) = sensed.said()
    assert started.startswith("1 new shard, 00000.tar to 00000.tar: started embed/nightly as ")
    assert len(sensed.sense(parameters=wrong, attempts=2)) == 2
    (hopeless,) = sensed.said()
    assert "2 runs failed, the last one with:" in hopeless
    assert "no timm model is named 'resnet5x'" in hopeless
    assert sensed.events() == 2
    run, *_ = sensed.sense(parameters=TINY, attempts=2)  # other parameters are another run
    assert run["state_type"] == "COMPLETED", run["state"]


@flow(name="embed")
def of_another_team() -> None:
    """Fail, on the same server, under the same name, without the tag."""
    raise ValueError("not ours")


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
    with temporary_settings({PREFECT_API_URL: f"{prefect.url}/api", PREFECT_API_AUTH_STRING: prefect.password}):
        of_another_team(return_state=True)
    given: dict[str, Any] = {"dataset": str(demo_dataset), "output": str(tmp_path / "out"), **TINY, **change}
    run = prefect.ended(prefect.start("embed/on-demand", **given), seconds=60)
    assert run["state_type"] == "FAILED"
    assert sentence in run["state"]["message"]
    assert "\n" not in run["state"]["message"]
    until = time.monotonic() + 60
    while not any(sentence in json.loads(post)["text"] for post in told[1]):
        assert time.monotonic() < until, told[1]
        time.sleep(0.5)
    assert not any("not ours" in post for post in told[1])


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


def test_a_run_that_is_cancelled_and_one_whose_machine_died(demo_dataset: Path, tmp_path: Path) -> None:
    """Both say what they leave, and Retry does the rest.

    The second one's worker and all of its processes are gone without a word, as after a power cut.
    """
    home, mark, output = tmp_path / "home", f"DIED={tmp_path.name}", tmp_path / "out"
    given: dict[str, Any] = {"model": {"embedder": "tests.faulty:Faulty"}, "work": {"device": "cpu"}}

    def hanging(prefect: Prefect) -> str:
        run = prefect.start("embed/on-demand", dataset=str(demo_dataset), output=str(output), **given)
        until = time.monotonic() + 300
        while "progress" not in prefect.artifacts(run) or len(written(output)) < 2:
            assert time.monotonic() < until, prefect.ask(f"/flow_runs/{run}")["state"]
            time.sleep(0.5)
        return run

    with up(home, FAULT="hangs:00003", **dict([mark.split("=")])) as prefect:
        run = hanging(prefect)
        prefect.ask(f"/flow_runs/{run}/set_state", {"state": {"type": "CANCELLING"}})
        ended = prefect.ended(run)
        assert ended["state_type"] == "CANCELLED", ended["state"]
        assert not (output / LOCK).exists()
        page = prefect.artifacts(run)["stopped"]["data"]
        assert f"{len(written(output))} of 4 shards embedded and kept in `{output}`" in page.replace("\n", " ")
        run = hanging(prefect)
        server = int((home / "server.pid").read_text().split()[0])
        for pid, _ in processes_with(mark):
            if os.getsid(pid) != server:
                os.kill(pid, signal.SIGKILL)
        ended = prefect.ended(run, seconds=240)
    assert ended["state_type"] == "CRASHED"
    assert ended["state"]["message"] == "its process is gone; Retry does only what it left unfinished"
