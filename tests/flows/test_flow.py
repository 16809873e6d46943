"""`embed(...)` as a flow: called directly, as a subflow, through a deployment; runs that share an output."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter

import tasks.run_lock
from flows.artifacts import artifact_key
from flows.config import ModelOptions, RunOptions
from flows.embed import embed
from flows.lost_lock import LockLost, stoppable
from flows.output_queue import limit_name, turn
from flows.report_link import BASE_VARIABLE, KEY_VARIABLE, linked_output, report_link
from tasks.manifest import Manifest
from tasks.run_lock import LOCK

from .conftest import ROOT, TINY

OPTIONS: dict[str, Any] = {
    "model": ModelOptions(model_name=(TINY,), pretrained=False),
    "work": RunOptions(device="cpu", workers=2),
}


def one_server_for_all(script: str, tmp_path: Path) -> list[str]:
    """Run a script without a configured server, and return what it printed; a second server of its processes fails."""
    home = tmp_path / "home"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(home), "PYTHONPATH": str(ROOT), "PREFECT_LOGGING_LEVEL": "WARNING"}
    (tmp_path / "script.py").write_text(script)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "script.py"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    )
    servers = set()
    with process, contextlib.suppress(psutil.NoSuchProcess):
        while process.poll() is None:
            for child in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if any("server.api.server:create_app" in word for word in child.cmdline()):
                        servers.add(child.pid)
            time.sleep(0.1)
        assert process.stdout is not None
        printed = process.stdout.read().splitlines()
    assert process.returncode == 0
    assert len(servers) == 1
    return printed


SCRIPT = """
from prefect import flow, task
from prefect.client.orchestration import get_client
from flows.config import ModelOptions, RunOptions
from flows.embed import embed

OPTIONS = dict(model=ModelOptions(model_name=("{tiny}",), pretrained=False), work=RunOptions(device="cpu", workers=2))

@flow
def curate(dataset, output):
    return embed(dataset, output, **OPTIONS)

if __name__ == "__main__":
    manifest = {call}("{dataset}", "{output}"{more})
    with get_client(sync_client=True) as client:
        tasks = client.read_task_runs()
    print(manifest.embedded, len([run for run in tasks if run.name.startswith("embed 0")]))
"""


@pytest.mark.parametrize(
    ("call", "more"), [pytest.param("embed", ", **OPTIONS", marks=pytest.mark.slow), ("curate", "")]
)
def test_workers_share_the_server_of_the_flow_that_calls(
    call: str, more: str, demo_dataset: Path, tmp_path: Path
) -> None:
    script = SCRIPT.format(tiny=TINY, call=call, more=more, dataset=demo_dataset, output=tmp_path / "out")
    assert one_server_for_all(script, tmp_path)[-1] == "254 4"


def test_runs_and_tasks_are_tagged(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    state = embed(str(demo_dataset), str(tmp_path / "out"), **OPTIONS, return_state=True)
    run, tasks_of_run = asyncio.run(run_and_tasks(state.state_details.flow_run_id))
    expected = {"shard-embed", "dataset:demo-data", f"model:{TINY}"}
    assert set(run.tags) == expected
    assert [set(task.tags) for task in tasks_of_run] == [expected] * 12
    assert isinstance(state.result(), Manifest)


async def run_and_tasks(flow_run_id: Any) -> tuple[Any, list[Any]]:
    async with get_client() as client:
        run_filter = FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}})
        return await client.read_flow_run(flow_run_id), await client.read_task_runs(flow_run_filter=run_filter)


def test_artifacts_of_folders_of_one_name_have_keys_of_their_own() -> None:
    folders = [("/a/images", "/out"), ("/b/images", "/out"), ("/a/images", "/out2"), ("s3://a/images", "/out")]
    keys = {artifact_key("summary", *folder) for folder in folders}
    assert len(keys) == len(folders)
    assert all(key.startswith("summary-images-") for key in keys)
    assert artifact_key("summary", "/a/images/", "/out") == artifact_key("summary", "/a/../a/images", "/out/")


def test_a_link_opens_the_report_of_its_output_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert report_link(str(tmp_path)) is None
    monkeypatch.setenv(BASE_VARIABLE, "http://127.0.0.1:4201")
    monkeypatch.setenv(KEY_VARIABLE, "secret")
    for output in (str(tmp_path / "a b%2F?#ü"), "s3://vectors/laion"):
        link = report_link(output)
        assert link is not None
        path = link.removeprefix("http://127.0.0.1:4201")
        assert linked_output(path, "secret") == output
        assert linked_output(path, "another") is None
        assert linked_output(path + "x", "secret") is None


@flow
def hold(folders: list[str], seconds: float, log: str) -> None:
    with turn(*folders):
        began = time.monotonic()
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write(json.dumps([began, time.monotonic()]) + "\n")


def test_runs_over_one_output_take_turns(server: str, tmp_path: Path) -> None:
    log, both = tmp_path / "log", [str(tmp_path / "a"), str(tmp_path / "b")]
    code = "import sys, json; from tests.flows.test_flow import hold; hold(*json.loads(sys.argv[1]))"
    runs = [
        subprocess.Popen([sys.executable, "-c", code, json.dumps([folders, 2, str(log)])], cwd=ROOT)
        for folders in (both, both[:1])
    ]
    assert [run.wait(120) for run in runs] == [0, 0]
    first, second = sorted(json.loads(line) for line in log.read_text().splitlines())
    assert first[1] <= second[0]


def test_another_writing_of_a_folder_is_the_same_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert limit_name("out") == limit_name(f"{tmp_path}/out/") != limit_name("/elsewhere/out")


HALF_WRITTEN = ".manifest.json.0123456789abcdef0123456789abcdef.tmp"


@contextlib.contextmanager
def taken_over_after(seconds: float, output: Path) -> Iterator[None]:
    """Another machine's run takes the lock of an output meanwhile."""
    theirs = {"token": "theirs", "host": "elsewhere", "machine": "another", "pid": 1, "born": 0.0, "run": "embed x"}

    def take() -> None:
        until = time.monotonic() + 120
        while not (output / LOCK).exists() and time.monotonic() < until:
            time.sleep(0.1)
        time.sleep(seconds)
        (output / HALF_WRITTEN).write_text("theirs")
        (output / LOCK).write_text(json.dumps(theirs | {"started": time.time(), "renewed": time.time()}))

    thief = threading.Thread(target=take)
    thief.start()
    try:
        yield
    finally:
        thief.join()


def test_a_lost_lock_stops_the_run_and_nothing_else(
    server: str, demo_dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The main thread waits for a worker that never answers; the run ends all the same, this process goes on."""
    monkeypatch.setattr(tasks.run_lock, "RENEWED_EVERY", 0.5)
    monkeypatch.setenv("FAULT", "hangs:00000")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    output = tmp_path / "out"
    options = OPTIONS | {"model": ModelOptions(embedder="tests.faulty:Faulty")}
    with taken_over_after(12, output):
        state = embed(str(demo_dataset), str(output), **options, return_state=True)
        ended = time.monotonic()
    assert time.monotonic() - ended < 30
    assert state.is_failed()
    assert state.message is not None
    assert f"{output}: another run took over: 'embed x', process 1 on elsewhere" in state.message
    assert "what it has finished is kept" in state.message
    with pytest.raises(LockLost):
        state.result()
    assert json.loads((output / LOCK).read_text())["token"] == "theirs"
    assert (output / HALF_WRITTEN).exists()
    assert not [child for child in psutil.Process().children(recursive=True) if "dask" in " ".join(child.cmdline())]


def test_a_thread_can_be_stopped_too() -> None:
    reached: list[str] = []

    def work(hand_over: Callable[[Any], None]) -> None:
        with stoppable() as stop:
            hand_over(stop)
            while True:
                time.sleep(0.01)

    def stopped(hand_over: Callable[[Any], None]) -> None:
        with pytest.raises(LockLost, match="taken"):
            work(hand_over)
        time.sleep(0.5)
        reached.append("end")

    stops: list[Callable[[str], None]] = []
    thread = threading.Thread(target=stopped, args=(stops.append,))
    thread.start()
    while not stops:
        time.sleep(0.01)
    stops[0]("taken")
    stops[0]("again")  # once is enough
    thread.join(10)
    assert reached == ["end"]
