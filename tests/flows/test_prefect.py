"""What Prefect sees of a run, through its API; retries; a Dask cluster that is there already."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName, LogFilter, LogFilterFlowRunId
from prefect.exceptions import ObjectNotFound
from prefect.states import AwaitingRetry

from embedders import ImageEmbedder, TimmImageEmbedder
from flows.embed import embed_dataset

TINY = "test_vit.r160_in1k"


class FailsOnce(ImageEmbedder):
    """Fails the first time it opens each shard, with an error that passes or with one that does not; or always, at
    shards whose names begin with something."""

    def __init__(self, folder: Path, error: type[Exception], always_at: str | None = None) -> None:
        self.folder = folder
        self.error = error
        self.always_at = always_at

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        from embedders.webdataset import open_shard

        mark = self.folder / Path(tar_path).name
        if not mark.exists() if self.always_at is None else mark.name.startswith(self.always_at):
            mark.touch()
            raise self.error("the first time")
        for sample_id in open_shard(tar_path).ids:
            yield [[1.0, 2.0]], [{"key": sample_id}]

    def load_embedding_model(self, device: str) -> Any:
        return lambda batch: batch


async def task_runs_of(flow_run_name: str) -> list[Any]:
    """The task runs of the newest flow run with a name."""
    async with get_client() as client:
        flow_runs = await client.read_flow_runs(
            flow_run_filter=FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
        )
        found = await client.read_task_runs(
            flow_run_filter=FlowRunFilter.model_validate(
                {"id": {"any_": [sorted(flow_runs, key=lambda r: str(r.created))[-1].id]}}
            )
        )
    return sorted(found, key=lambda run: run.name)


async def shown(flow_run_name: str) -> tuple[dict[str, Any], list[str]]:
    """The artifacts by their kind, and the log, of the newest flow run with a name."""
    async with get_client() as client:
        named = FlowRunFilter(name=FlowRunFilterName(any_=[flow_run_name]))
        run = sorted(await client.read_flow_runs(flow_run_filter=named), key=lambda run: str(run.created))[-1]
        artifacts = await client.read_artifacts(
            flow_run_filter=FlowRunFilter.model_validate({"id": {"any_": [run.id]}})
        )
        logs = await client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
    return {str(artifact.key).partition("-")[0]: artifact for artifact in artifacts}, [log.message for log in logs]


def task_runs(flow_run_name: str) -> list[Any]:
    return asyncio.run(task_runs_of(flow_run_name))


def after(run: Any) -> set[Any]:
    """The task runs that one follows."""
    return {it.id for it in run.task_inputs.get("wait_for", [])}


def test_runs_and_tasks_say_what_they_do(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = TimmImageEmbedder(TINY, pretrained=False)
    embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=2)
    runs = {run.name: run for run in task_runs(f"embed demo-data with {TINY}")}
    assert list(runs) == [f"{stage} 0000{i}" for stage in ("embed", "index", "merge") for i in range(4)]
    for i in range(4):  # the edges of the graph: index → embed → merge
        assert after(runs[f"embed 0000{i}"]) == {runs[f"index 0000{i}"].id}
        assert after(runs[f"merge 0000{i}"]) == {runs[f"embed 0000{i}"].id}
    artifacts, logs = asyncio.run(shown(f"embed demo-data with {TINY}"))
    assert artifacts["progress"].data == 100
    assert artifacts["progress"].description.startswith("256 of about 256 images, 4 of 4 shards; ")
    assert "256 = 254 embedded + 2 quarantined" in artifacts["summary"].data
    assert sum(row["samples"] for row in json.loads(artifacts["shards"].data)) == 256
    assert {row["reason"] for row in json.loads(artifacts["quarantine"].data)} == {
        "not_an_image",
        "truncated",
    }
    assert artifacts["report"].type == "markdown"
    assert f"`{(tmp_path / 'out/report.html').as_uri()}`" in artifacts["report"].data
    picture = base64.b64decode(artifacts["pictures"].data.partition("base64,")[2])
    assert picture.count(b"<image ") == 16 + 1  # the truncated one can be shown, the web page cannot
    groups = [log for log in logs if log.startswith("0000")]
    assert len(groups) == 4
    assert all(re.fullmatch(r"0000\d: 64 images in [\d.]+ s, [\d.]+ images/s, [01] quarantined", log) for log in groups)


def test_what_can_pass_is_tried_again(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = FailsOnce(tmp_path, OSError)
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=2)
    assert (manifest.shards_failed, manifest.embedded) == (0, 256)  # this one looks at no image
    runs = task_runs("embed demo-data with FailsOnce")
    # A worker's shards share one engine: a shard may also have to wait for the second try of another.
    assert {run.run_count for run in runs if run.name.startswith("embed")} <= {2, 3}


def test_what_cannot_pass_is_not_tried_again(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = FailsOnce(tmp_path, ValueError, always_at="")
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=2)
    assert set(manifest.failures) == {f"0000{i}" for i in range(4)}
    assert manifest.failures["00000"] == "ValueError: the first time"
    assert {run.run_count for run in task_runs("embed demo-data with FailsOnce") if run.name[:5] == "embed"} == {1}


@pytest.mark.chaos
def test_what_one_shard_does_to_another_is_undone(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    """An error of a custom embedder ends the engine for all shards in hand; each is then tried by itself."""
    embedder = FailsOnce(tmp_path, ValueError, always_at="00001")
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=1)
    assert manifest.failures == {"00001": "ValueError: the first time"}
    assert manifest.samples == 3 * 64
    assert manifest.finish_with.startswith("embed_dataset(")


def test_what_was_done_shows_as_cached(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    """Prefect shows what the files say, by the same key: of outputs that are gone or damaged, nothing is cached."""
    output = tmp_path / "out"

    def states() -> list[tuple[str, str]]:
        embedder = TimmImageEmbedder(TINY, pretrained=False)
        embed_dataset(str(demo_dataset), str(output), embedder, device="cpu", workers=2)
        return sorted((run.name, run.state.name) for run in task_runs(f"embed demo-data with {TINY}"))

    assert {state for _, state in states()} == {"Completed"}
    assert states() == [("4 shards done before", "Cached")]
    (output / "layers/image_embedding/00001.parquet").unlink()
    damaged = output / "layers/image_embedding/00002.parquet"
    content = bytearray(damaged.read_bytes())
    content[9000] ^= 1  # in a vector: the footer still opens
    damaged.write_bytes(content)
    (output / "metadata/00002.parquet").unlink()
    assert states() == [
        ("3 shards done before", "Cached"),
        ("embed 00001", "Completed"),
        ("embed 00002", "Completed"),
        ("index 00001", "Cached"),
        ("index 00002", "Cached"),
        ("merge 00001", "Cached"),
        ("merge 00002", "Completed"),
        ("merge 00002", "Failed"),
    ]
    assert states() == [("4 shards done before", "Cached")]


def served(server: str, folder: Path) -> subprocess.Popen[bytes]:
    """A process that runs the flow when the API says so, as a deployment is run."""
    code = "from flows.embed import embed; embed.serve(name='nightly')"
    environment = {**os.environ, "PREFECT_API_URL": server, "PREFECT_RUNNER_POLL_FREQUENCY": "1"}
    with (folder / "serve.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


async def finished(flow_run_id: Any, count: int, seconds: float = 180) -> Any:
    """A flow run once it has ended for the count-th time."""
    async with get_client() as client:
        for _ in range(int(seconds * 2)):
            run = await client.read_flow_run(flow_run_id)
            if run.state and run.state.is_final() and run.run_count >= count:
                return run
            await asyncio.sleep(0.5)
    raise TimeoutError(run.state)


async def start_deployed(config: dict[str, Any]) -> Any:
    """Start the deployment; the id of its flow run."""
    async with get_client() as client:
        for _ in range(120):
            try:
                deployment = await client.read_deployment_by_name("embed/nightly")
                break
            except ObjectNotFound:
                await asyncio.sleep(0.5)
        return (await client.create_flow_run_from_deployment(deployment.id, parameters=config)).id


async def retry(flow_run_id: Any) -> None:
    """What the Retry button of the UI does."""
    async with get_client() as client:
        await client.set_flow_run_state(flow_run_id, AwaitingRetry(), force=True)


@pytest.mark.chaos
def test_retry_does_only_what_is_missing(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    dataset, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(demo_dataset, dataset)
    whole = (dataset / "00001.tar").read_bytes()
    (dataset / "00001.tar").write_bytes(whole[: len(whole) // 2])
    config = {
        "dataset": str(dataset),
        "output": str(output),
        "model": {"model_name": TINY, "pretrained": False},
        "work": {"device": "cpu"},
    }
    process = served(server, tmp_path)
    try:
        flow_run = asyncio.run(start_deployed(config))
        run = asyncio.run(finished(flow_run, 1))
        assert run.state.is_failed()
        assert "00001.tar: after 32 samples: cut short" in run.state.message
        before = {path.name: path.stat().st_mtime_ns for path in (output / "layers/image_embedding").glob("*.parquet")}
        assert set(before) == {"00000.parquet", "00002.parquet", "00003.parquet"}
        (dataset / "00001.tar").write_bytes(whole)
        asyncio.run(retry(flow_run))
        assert asyncio.run(finished(flow_run, 2)).state.is_completed()
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(30)
    after = {path.name: path.stat().st_mtime_ns for path in (output / "layers/image_embedding").glob("*.parquet")}
    assert after.keys() - before.keys() == {"00001.parquet"}
    assert {name: after[name] for name in before} == before
    assert not (output / "run.locks").exists()


@pytest.fixture
def scheduler(server: str, tmp_path: Path) -> Iterator[str]:
    """A Dask scheduler with two workers, each a process of its own; its address."""
    file = tmp_path / "scheduler.json"
    loopback = ["--host", "127.0.0.1", "--scheduler-file", str(file)]
    commands = {
        "scheduler": ["dask_scheduler", *loopback, "--port", "0", "--dashboard-address", "127.0.0.1:0"],
        "one": ["dask_worker", *loopback, "--nthreads", "1", "--no-dashboard"],
        "two": ["dask_worker", *loopback, "--nthreads", "1", "--no-dashboard"],
    }
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    started = []
    for name, (module, *arguments) in commands.items():
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", f"distributed.cli.{module}", *arguments]
        started.append(subprocess.Popen(command, cwd=tmp_path / name, env=environment))
    try:
        from distributed import Client

        with Client(scheduler_file=str(file), timeout=60) as client:
            client.wait_for_workers(2, timeout=60)
            yield client.scheduler.address
    finally:
        for process in started:
            process.terminate()
        for process in started:
            process.wait(timeout=30)


def test_a_cluster_that_is_there_is_used(scheduler: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = TimmImageEmbedder(TINY, pretrained=False)
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, scheduler=scheduler)
    assert (manifest.shards_failed, manifest.embedded) == (0, 254)
