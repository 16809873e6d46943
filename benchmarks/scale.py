"""The control plane at scale: a real scheduler and a real Prefect server, and many workers that only pretend to embed.

`python -m benchmarks.scale --shards 100000 --workers 1 16 256` plans a dataset, submits it, and reads what was done, as
`flows.embed` does. What a worker does for a shard is to write a small layer file with a real record, and to sleep; all
workers live in one process. Indexing and merging, which the workers' machines would do, are as small.

It prints for each number of workers: shards per second that are planned, that go through Prefect and Dask, and that are
read again at the end; the memory of client and scheduler; and the share of their time that workers had nothing to do.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import flow, task
from prefect.cache_policies import NO_CACHE

from embedders.base import ImageEmbedder
from embedders.recipe import Recipe
from flows.server import prefect_server
from flows.submission import Stages, Submission
from flows.tasks_in_flight import SettingsOnce, TasksInFlight
from tasks.embed import EmbedOptions, Records
from tasks.existing_cluster import task_runner
from tasks.group_size import GroupSize
from tasks.keys import layer_key
from tasks.layers import LayerWriter
from tasks.manifest import Timing, account, write_manifest
from tasks.merge_options import MergeOptions
from tasks.plan import Plan, make_plan, merged_key
from tasks.records import LayerRecord, MergeRecord, seal_footer, with_record
from tasks.retries import RETRIES, ShardFailure
from tasks.run_names import run_name
from tasks.shards import Shard, find_shards

LAYER, DIMENSIONS, SAMPLES = "image_embedding", 8, 2
LINKS = 50_000
"""Names that one file may have on most file systems."""


# --- what a worker pretends to do -------------------------------------------------------------------------------------


@task(name="index-generation", task_run_name=run_name("index"), cache_policy=NO_CACHE, persist_result=False)
def pretend_to_index(shards: Sequence[Shard], id_col: str, span: str = "") -> int:
    """Do nothing."""
    return len(shards)


@task(name="shard-embedding", task_run_name=run_name("embed"), cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def pretend_to_embed(
    shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions, span: str = "", decision: Any = None
) -> Records:
    """Write a small layer file for each shard, and sleep for the rest of the time that it should take."""
    seconds = float(os.environ["SCALE_SECONDS"])
    return {shard.name: {LAYER: _embed(shard, recipes[0], options, seconds)} for shard in shards}


def _embed(shard: Shard, recipe: Recipe, options: EmbedOptions, seconds: float) -> LayerRecord:
    began = time.time()
    with LayerWriter(shard, LAYER) as writer:
        vectors = np.full((SAMPLES, DIMENSIONS), DIMENSIONS**-0.5, np.float32)
        writer.add(np.arange(SAMPLES), pa.array([f"{shard.name}{i}" for i in range(SAMPLES)]), {LAYER: vectors})
        writer.flush()
        time.sleep(max(0.0, began + seconds - time.time()))
        key = layer_key(shard, LAYER, recipe.digest, options.id_col)
        record = LayerRecord(
            key,
            LAYER,
            recipe.digest,
            SAMPLES,
            SAMPLES,
            {},
            SAMPLES,
            writer.columns,
            dict(recipe.fingerprint),
            decoder="exact",
            statistics=writer.statistics,
            work={"began": began, "ended": began + seconds},
        )
        writer.finish(record, [])
    return record


@task(name="metadata-merge", task_run_name=run_name("merge"), cache_policy=NO_CACHE, persist_result=False, **RETRIES)
def pretend_to_merge(
    shards: Sequence[Shard], records: Records, options: MergeOptions, span: str = "", there: Collection[str] = ()
) -> int:
    """Write a small file with a record for each shard."""
    for shard in shards:
        record = MergeRecord(merged_key(shard, records[shard.name], options), SAMPLES, 0, 0)
        table = pa.table({"key": [f"{shard.name}{i}" for i in range(SAMPLES)]})
        folder, name = options.place(shard)
        with folder.replacing(name) as path:
            pq.write_table(table.cast(with_record(table.schema, record)), path)
            seal_footer(path)
    return len(shards)


STAGES = Stages(index=pretend_to_index, embed=pretend_to_embed, merge=pretend_to_merge)


def host_workers(address: str, count: int) -> None:
    """Run so many workers of one thread each in this process, until it is ended."""
    from distributed import Worker

    async def run() -> None:
        workers = []
        for start in range(0, count, 50):  # a scheduler has a queue for new connections
            names = range(start, min(start + 50, count))
            workers += await asyncio.gather(
                *(
                    Worker(address, nthreads=1, name=f"worker-{n}", host="127.0.0.1", dashboard=False, memory_limit=0)
                    for n in names
                )
            )
        await asyncio.gather(*(worker.finished() for worker in workers))

    asyncio.run(run())


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """What one run cost. Times are in seconds, memory in bytes."""

    workers: int
    planned: float
    submitted: float
    finished: float
    idle: float
    client: int
    scheduler: int
    groups: int

    def row(self, shards: int) -> str:
        """Return a line of the table."""
        whole = self.planned + self.submitted + self.finished
        rates = [shards / seconds for seconds in (self.planned, self.submitted, self.finished, whole)]
        memory = f"{100 * self.idle:>6.1f}  {self.client / 1e9:>6.2f}  {self.scheduler / 1e9:>6.2f}"
        return "  ".join([f"{self.workers:>7,}", f"{self.groups:>6,}", *(f"{rate:>8,.0f}" for rate in rates), memory])


HEADER = "workers  groups  planned  through  finished    all/s  idle %  client  scheduler (GB)"


def make_dataset(folder: Path, shards: int) -> None:
    """Make tars with one tiny member, and Parquets with one row, all of them links to a few."""
    folder.mkdir(parents=True)
    for number in range(shards):
        first = folder / f"{number - number % LINKS:07}"
        if number % LINKS == 0:
            with tarfile.open(f"{first}.tar", "w") as tar:
                info = tarfile.TarInfo("0.jpg")
                tar.addfile(info)
            pq.write_table(pa.table({"key": ["0"]}), f"{first}.parquet")
            continue
        for ending in ("tar", "parquet"):
            os.link(f"{first}.{ending}", folder / f"{number:07}.{ending}")


@contextlib.contextmanager
def cluster(workers: int, seconds: float) -> Iterator[tuple[str, int]]:
    """Start a scheduler and workers; yield its address and process id."""
    import psutil
    from distributed import Client

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "scheduler.json"
        quiet: Any = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        options = ["--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)]
        scheduler = subprocess.Popen([sys.executable, "-m", "dask", "scheduler", *options], **quiet)
        host: subprocess.Popen[bytes] | None = None
        try:
            while not file.exists():
                time.sleep(0.1)
            with Client(scheduler_file=str(file), set_as_default=False) as client:
                address = str(client.scheduler.address)
                environment = os.environ | {"SCALE_SECONDS": str(seconds), "OMP_NUM_THREADS": "1"}
                command = [sys.executable, "-m", "benchmarks.scale", "--host-workers", address, str(workers)]
                host = subprocess.Popen(command, env=environment, **quiet)
                client.wait_for_workers(workers, timeout=600)
            yield address, psutil.Process(scheduler.pid).pid
        finally:
            for process in (host, scheduler):
                if process is not None:
                    process.kill()
                    process.wait()


def run(folder: Path, shards: int, workers: int, seconds: float) -> Result:
    """Plan, submit and finish a run over so many shards."""
    output = folder / f"out-{workers}"
    shutil.rmtree(output, ignore_errors=True)
    recipe = Recipe(LAYER, _Pretended(), {"embedder": "pretended"}, "pretended", "pretended", (LAYER,))
    with prefect_server(), cluster(workers, seconds) as (address, scheduler):
        began = time.perf_counter()
        found = find_shards(str(folder / "data"), str(output))
        plan = make_plan(found, (recipe,), MergeOptions("key"))
        planned = time.perf_counter() - began
        failures: dict[str, Any] = {}
        counted = {"groups": 0, "busy": 0.0, "first": float("inf"), "last": 0.0}

        def embedded(group: Sequence[Shard], records: Sequence[LayerRecord]) -> None:
            counted["groups"] += 1
            counted["busy"] += seconds * len(records)
            counted["first"] = min(counted["first"], *(record.work["began"] for record in records))
            counted["last"] = max(counted["last"], *(record.work["ended"] for record in records))

        began = time.perf_counter()
        _through(address, plan, seconds, embedded, failures)
        submitted = time.perf_counter() - began
        memory = _peak(scheduler)
    began = time.perf_counter()
    plan = make_plan(plan.shards, (recipe,), plan.options)
    write_manifest(manifest := account(plan, 0, list(failures.values()), Timing(submitted), plan_samples(plan)))
    finished = time.perf_counter() - began
    assert manifest.embedded == shards * SAMPLES, (manifest.embedded, list(failures.items())[:3])
    idle = 1 - counted["busy"] / (workers * (counted["last"] - counted["first"]))
    client = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Result(workers, planned, submitted, finished, idle, client, memory, int(counted["groups"]))


def plan_samples(plan: Plan) -> int:
    """Return how many samples are done."""
    return sum(record.samples for record in plan.embedded.values())


def _through(address: str, plan: Plan, seconds: float, embedded: Any, failures: dict[str, ShardFailure]) -> None:
    """Do everything that goes through Prefect and Dask, as `flows.embed` does."""

    @flow(name="scale", persist_result=False)
    def through() -> None:
        with task_runner(address) as runner, SettingsOnce.now():
            tasks = TasksInFlight(runner, 60.0, print)
            options = EmbedOptions("key", "cpu")
            submission = Submission(tasks, plan, options, GroupSize(seconds), embedded, failures, STAGES)
            submission.embed_all()

    through()


class _Pretended(ImageEmbedder):
    """Stands for an embedder in a recipe."""

    def load_dataset_shard(self, tar_path: str) -> Any:
        raise NotImplementedError

    def load_embedding_model(self, device: str) -> Any:
        raise NotImplementedError


def _peak(pid: int) -> int:
    """Return the most memory that a process took so far."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def main(arguments: Sequence[str]) -> int:
    """Measure each number of workers in a process of its own, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shards", type=int, default=100_000)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rate", type=float, default=400.0, help="shards a second that all workers together could do")
    parser.add_argument("--folder", type=Path, help="where to make the dataset; kept, so it is made only once")
    parser.add_argument("--host-workers", nargs=2, metavar=("ADDRESS", "COUNT"), help=argparse.SUPPRESS)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.host_workers:
        host_workers(args.host_workers[0], int(args.host_workers[1]))
        return 0
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if not (folder / "data").exists():
            make_dataset(folder / "data", args.shards)
        if args.one:
            (workers,) = args.workers
            print(run(folder, args.shards, workers, workers / args.rate).row(args.shards), flush=True)
            return 0
        print(f"{args.shards:,} shards; workers could do {args.rate:g} a second\n{HEADER}", flush=True)
        for workers in args.workers:
            one = ["--shards", str(args.shards), "--workers", str(workers), "--rate", str(args.rate)]
            command = [sys.executable, "-m", "benchmarks.scale", "--one", "--folder", str(folder), *one]
            subprocess.run(command, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
