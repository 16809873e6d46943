"""A cluster that somebody else has started: an external scheduler, and workers started by hand, one a GPU.

`python -m benchmarks.cluster --workers 1 2 --shards 64` embeds a dataset on each number of workers, and prints what
their files say: images per second, how far apart the workers ended, how many threads each had, and which decoder.
Without a GPU the workers are processes with a share of the cores.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.throughput import make_shards
from embedders import TimmImageEmbedder
from flows.embed import embed_dataset
from tasks.hardware import available_cores, count_gpus
from tasks.records import LayerRecord, read_layer_record
from tasks.storage.folder import Folder
from tasks.worker.cores import share_of_cores

LAYER = "image_embedding"


@dataclass(frozen=True)
class Result:
    """What the files of a run say. Times are in seconds, rates in images per second.

    Attributes:
        rate: From the begin of the first shard to the end of the last.
        together: While all workers were at work: after the last of them had begun, and before the first had ended.
        tail: From the end of the first worker to that of the last.
    """

    workers: int
    images: int
    rate: float
    together: float
    tail: float
    seconds: float
    threads: dict[str, int]
    decoders: dict[str, int]


@contextlib.contextmanager
def cluster(workers: int, folder: Path) -> Iterator[str]:
    """Start a scheduler and workers as their documentation has it; yield the scheduler's address."""
    from distributed import Client

    file, gpus, processes = folder / "scheduler.json", count_gpus(), []
    environment = {k: v for k, v in os.environ.items() if k not in {"OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES"}}

    def start(*command: str, **variables: str) -> None:
        with (folder / "dask.log").open("ab") as log:
            options: Any = {"stdout": log, "stderr": log, "env": environment | variables}
            processes.append(subprocess.Popen([sys.executable, "-m", *command], **options))

    common = ["--nthreads", "3", "--memory-limit", "0", "--no-dashboard", "--scheduler-file", str(file)]
    try:
        start(
            "dask", "scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", "--scheduler-file", str(file)
        )
        while not file.exists():
            time.sleep(0.1)
        if gpus:
            devices = ",".join(str(n) for n in range(workers))
            settings = {"CUDA_VISIBLE_DEVICES": devices, "CUDA_DEVICE_MAX_CONNECTIONS": "32"}
            start("dask_cuda.cli", "worker", *common, "--device-memory-limit", "0", **settings)
        else:
            for _ in range(workers):
                start("dask", "worker", *common)
        with Client(scheduler_file=str(file), set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=120)
            yield str(client.scheduler.address)
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(20)
            process.kill()


def threads(address: str) -> dict[str, int]:
    """Return how many threads each worker takes for itself."""
    from distributed import Client

    with Client(address, set_as_default=False) as client:
        workers = [*client.nthreads()]
        futures = [client.submit(share_of_cores, workers=[worker], pure=False) for worker in workers]
        return dict(zip(workers, client.gather(futures), strict=True))


def run(dataset: Path, workers: int, model: str) -> Result:
    """Embed a dataset on so many workers."""
    with tempfile.TemporaryDirectory(dir=dataset) as folder, cluster(workers, Path(folder)) as address:
        output = f"{folder}/output"
        began = time.monotonic()
        embedder = TimmImageEmbedder(model, pretrained=False)
        manifest = embed_dataset(str(dataset / "shards"), output, embedder, scheduler=address)
        seconds = time.monotonic() - began
        assert not manifest.failures, manifest.failures
        layers = Folder(f"{output}/layers/{LAYER}")
        records = [read_layer_record(layers, file.name) for file in layers.list(".parquet")]
        found = [record for record in records if record is not None]
        return result_of(found, workers, seconds, threads(address))


def result_of(records: Sequence[LayerRecord], workers: int, seconds: float, threads: dict[str, int]) -> Result:
    """Work out what the records say."""
    by_worker: dict[str, list[LayerRecord]] = {}
    for record in records:
        by_worker.setdefault(record.worker, []).append(record)
    begins = [min(r.work["began"] for r in of) for of in by_worker.values()]
    ends = [max(r.work["ended"] for r in of) for of in by_worker.values()]
    images = sum(record.samples for record in records)
    start, stop = max(begins), min(ends)
    inside = sum(_share(record, start, stop) * record.samples for record in records)
    together = inside / (stop - start) if stop > start else 0.0
    rate = images / (max(ends) - min(begins))
    decoders = dict(Counter(record.decoder for record in records))
    return Result(workers, images, rate, together, max(ends) - min(ends), seconds, threads, decoders)


def _share(record: LayerRecord, start: float, stop: float) -> float:
    """Return the share of a shard's time that lies within a span."""
    began, ended = record.work["began"], record.work["ended"]
    return max(0.0, min(ended, stop) - max(began, start)) / max(ended - began, 1e-6)


def _part_of(whole: Path, shards: int, dataset: Path) -> Path:
    """Return a dataset of the first shards of another, made of links."""
    (dataset / "shards").mkdir(parents=True, exist_ok=True)
    for number in range(shards):
        for ending in ("tar", "parquet"):
            name = f"{number:05}.{ending}"
            if not (dataset / "shards" / name).exists():
                os.link(whole / "shards" / name, dataset / "shards" / name)
    return dataset


def main(arguments: Sequence[str]) -> int:
    """Measure each number of workers, and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cluster", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", default="vit_large_patch14_clip_quickgelu_224.openai")
    parser.add_argument("--workers", type=int, nargs="+", default=[1, max(2, count_gpus())])
    parser.add_argument("--shards", type=int, default=32, help="for each worker")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--photos", help="folder with photographs, instead of scikit-image's")
    parser.add_argument("--folder", type=Path, help="where shards are made and kept; by default a temporary folder")
    args = parser.parse_args(arguments)
    with contextlib.ExitStack() as stack:
        folder = args.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        results = []
        most = max(args.workers) * args.shards
        whole = folder / f"{most}x{args.samples}"
        make_shards(whole / "shards", most, args.samples, args.photos, available_cores())
        for workers in args.workers:
            dataset = _part_of(whole, workers * args.shards, folder / f"{workers * args.shards}x{args.samples}")
            results.append(result := run(dataset, workers, args.model))
            print(
                f"{workers} workers: {result.images:,} images, {result.rate:,.0f} a second by files, "
                f"{result.together:,.0f} while all were at work, the last ended {result.tail:.1f} s after the first; "
                f"{result.seconds:.1f} s in all; threads {sorted(result.threads.values())}; decoders {result.decoders}",
                flush=True,
            )
    first = results[0]
    for other in results[1:]:
        by_files, together = other.rate / first.rate, other.together / (first.together or first.rate)
        print(f"{other.workers} to {first.workers}: {by_files:.2f} by files, {together:.2f} while all were at work")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
