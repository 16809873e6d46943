"""What Prefect sees of a run, through its API; retries; a Dask cluster that is there already."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterName

from embedders import ImageEmbedder, TimmImageEmbedder
from flows.embed import embed_dataset

TINY = "test_vit.r160_in1k"


class FailsOnce(ImageEmbedder):
    """Fails the first time it opens each shard, with an error that passes or with one that does not."""

    def __init__(self, folder: Path, error: type[Exception]) -> None:
        self.folder = folder
        self.error = error

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        from embedders.webdataset import open_shard

        mark = self.folder / Path(tar_path).name
        if not mark.exists():
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


def task_runs(flow_run_name: str) -> list[Any]:
    return asyncio.run(task_runs_of(flow_run_name))


def test_runs_and_tasks_say_what_they_do(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embed_dataset(str(demo_dataset), str(tmp_path / "out"), TimmImageEmbedder(TINY, pretrained=False), device="cpu")
    names = [run.name for run in task_runs(f"embed demo-data with {TINY}")]
    assert names == [*(f"embed 0000{i}" for i in range(4)), *(f"index 0000{i}" for i in range(4)), "merge 00000–00003"]


def test_what_can_pass_is_tried_again(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = FailsOnce(tmp_path, OSError)
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=2)
    assert (manifest.shards_failed, manifest.embedded) == (0, 256)  # this one looks at no image
    runs = task_runs("embed demo-data with FailsOnce")
    assert {run.run_count for run in runs if run.name.startswith("embed")} == {2}


def test_what_cannot_pass_is_not_tried_again(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    embedder = FailsOnce(tmp_path, ValueError)
    manifest = embed_dataset(str(demo_dataset), str(tmp_path / "out"), embedder, device="cpu", workers=2)
    assert set(manifest.failures) == {f"0000{i}" for i in range(4)}
    assert manifest.failures["00000"] == "ValueError: the first time"
    assert {run.run_count for run in task_runs("embed demo-data with FailsOnce") if run.name[:5] == "embed"} == {1}


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
