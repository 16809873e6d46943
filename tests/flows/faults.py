"""Runs to which accidents happen: started as a person starts them, watched from outside, and compared in the end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
from distributed import Client

from ..servers import free_port
from .conftest import ROOT, processes_with

SHARDS, SAMPLES = 8, 64
FAULTY = ("--embedder", "tests.faulty:Faulty", "--device", "cpu", "--workers", "2")
PLAIN = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu", "--workers", "2")


@dataclass
class Run:
    """A run of the command line in a session of its own, as a terminal or a batch system starts it."""

    output: Path
    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text()

    def wait(self, timeout: float = 240) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def wait_until(self, happened: Callable[[], Any], timeout: float = 120) -> None:
        """Wait for something that it does."""
        until = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.02)

    def wait_for_shards(self, count: int) -> None:
        """Wait until it has written the embeddings of so many shards."""
        self.wait_until(lambda: len(list((self.output / "layers/image_embedding").glob("[!.]*.parquet"))) >= count)

    def wait_for_server(self) -> None:
        """Wait until it has started a Prefect server."""
        self.wait_until(lambda: self.children("local_server"))

    def signal_group(self, number: int) -> None:
        """Send a signal to all that the terminal would send it to."""
        os.killpg(self.process.pid, number)

    def children(self, word: str) -> list[int]:
        """The ids of the processes it has started, by a word of their command."""
        return [pid for pid, command in processes_with(self.mark) if word in command and pid != self.process.pid]

    def workers(self) -> list[int]:
        """The ids of its Dask workers."""
        return self.children("spawn_main")

    def wait_until_gone(self, timeout: float = 10) -> None:
        """Prove that nothing it has started is left."""
        until = time.monotonic() + timeout
        while left := processes_with(self.mark):
            assert time.monotonic() < until, left
            time.sleep(0.05)


@dataclass
class Chaos:
    """Starts runs, compares what they leave, and notes what it cost."""

    folder: Path
    dataset: Path
    reference: Path
    runs: int = 0
    started: list[Run] = field(default_factory=list)

    def start(self, output: Path, *options: str, **environment: str) -> Run:
        """Start the command line."""
        self.runs += 1
        mark = f"CHAOS={self.folder.name}-{self.runs}"
        log = self.folder / f"{self.runs}.log"
        variables = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | environment
        variables |= {"PREFECT_HOME": str(self.folder / "prefect"), "CHAOS": mark.partition("=")[2]}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.embed", str(self.dataset), "--output", str(output), *options],
                cwd=ROOT,
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(run := Run(output, process, mark, log))
        return run

    def finish(self, output: Path, *options: str, **environment: str) -> dict[str, Any]:
        """One more run of the same command; its manifest."""
        run = self.start(output, *(options or FAULTY), **environment)
        assert run.wait() == 0, run.said
        return manifest(output)

    def lost(self, output: Path) -> int:
        """The samples that differ from the undisturbed run's or are not there; none may be there that should not."""
        lost = 0
        for number in range(SHARDS):
            name = f"metadata/{number:05}.parquet"
            expected = pq.read_table(self.reference / name)
            if not (output / name).exists():
                lost += len(expected)
                continue
            found = pq.read_table(output / name)
            assert found.drop_columns("image_embedding") == expected.drop_columns("image_embedding")
            lost += int((np.abs(matrix(found) - matrix(expected)).max(axis=1) > 1e-5).sum())
        assert len(list((output / "metadata").rglob("*.parquet"))) == SHARDS
        assert leftovers(output) == []
        return lost

    def close(self) -> None:
        """Leave nothing behind, whatever has failed."""
        for run in self.started:
            for pid, _ in processes_with(run.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.process.wait()


def matrix(table: Any) -> np.ndarray:
    """The vectors of a merged table."""
    return table.column("image_embedding").combine_chunks().values.to_numpy().reshape(len(table), -1)


def manifest(output: Path) -> dict[str, Any]:
    """The account that a run has left."""
    return dict(json.loads((output / "manifest.json").read_text()))


def leftovers(output: Path) -> list[str]:
    """Temporary files and locks."""
    return [str(path) for path in output.rglob("*") if path.name.startswith(".") or path.name == "run.locks"]


def written(output: Path) -> dict[str, tuple[int, int]]:
    """Every embeddings file, by what changes when it is written again."""
    stats = {path.name: path.stat() for path in (output / "layers/image_embedding").glob("[!.]*.parquet")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def twice(before: dict[str, tuple[int, int]], output: Path) -> int:
    """The samples in files that were there, whole, and were written again."""
    after = written(output)
    return SAMPLES * sum(after.get(name) != stamp for name, stamp in before.items())


@dataclass
class ForeignCluster:
    """A scheduler and workers that somebody else has started, on loopback or another address of this machine."""

    folder: Path
    host: str = "127.0.0.1"
    environment: dict[str, str] = field(default_factory=dict)
    port: int = field(default_factory=free_port)
    scheduler: subprocess.Popen[bytes] | None = None
    workers: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def address(self) -> str:
        """The scheduler's."""
        return f"tcp://{self.host}:{self.port}"

    def start_scheduler(self) -> None:
        """Start the scheduler, and wait until it listens."""
        self.scheduler = self._start("scheduler", "--host", self.host, "--port", str(self.port), "--no-dashboard")
        until = time.monotonic() + 60
        while b"Scheduler at" not in (self.folder / "dask.log").read_bytes():
            assert time.monotonic() < until
            time.sleep(0.1)

    def start_worker(self, *before: str) -> subprocess.Popen[bytes]:
        """Start a worker that is not restarted if it dies; `before` is a command to start it with."""
        options = ["--nthreads", "2", "--no-nanny", "--no-dashboard", "--memory-limit", "0"]
        self.workers.append(worker := self._start("worker", self.address, *options, before=before))
        return worker

    def wait_for_workers(self, count: int) -> None:
        """Wait until so many have joined."""
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(count, timeout=120)

    def _start(self, *arguments: str, before: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        with (self.folder / "dask.log").open("ab") as log:
            command = [*before, sys.executable, "-m", "dask", *arguments]
            environment = os.environ | {"PYTHONPATH": str(ROOT)} | self.environment
            return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=log)

    def close(self) -> None:
        """End all that still runs."""
        for process in (*self.workers, self.scheduler):
            if process is not None and process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                process.kill()
                process.wait()
