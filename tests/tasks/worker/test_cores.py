"""A worker's share of the machine's cores, with real Dask workers started by hand."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from distributed import Client

from tasks.worker import cores
from tasks.worker.cores import divide, share_of_cores
from tests.servers import free_port

ROOT = Path(__file__).parents[3]


@contextlib.contextmanager
def process(*command: str, folder: Path, affinity: set[int] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a folder, which may use some cores; with all it has started it ends with the block."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(ROOT)
    pinned = ["taskset", "-c", ",".join(map(str, sorted(affinity)))] if affinity else []
    with subprocess.Popen([*pinned, *command], cwd=folder, env=environment, stderr=subprocess.DEVNULL) as started:
        try:
            yield started
        finally:
            started.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                started.wait(10)
            started.kill()


@contextlib.contextmanager
def cluster(folder: Path, *affinities: set[int]) -> Iterator[Client]:
    """A scheduler, and a worker with each affinity, named w0, w1 and so on; a client of theirs."""
    address = f"tcp://127.0.0.1:{(port := free_port())}"
    scheduler = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--host", "127.0.0.1", "--port", str(port)]
    worker = [sys.executable, "-m", "distributed.cli.dask_worker", address, "--host", "127.0.0.1", "--no-dashboard"]
    with contextlib.ExitStack() as stack:
        stack.enter_context(process(*scheduler, "--no-dashboard", folder=folder))
        for number, affinity in enumerate(affinities):
            command = [*worker, "--nthreads", "2", "--name", f"w{number}"]
            stack.enter_context(process(*command, folder=folder, affinity=affinity))
        with Client(address, timeout=60, set_as_default=False) as client:
            client.wait_for_workers(len(affinities), 60)
            yield client


def shares(client: Client, workers: int) -> list[int]:
    """The share of each worker, by itself."""
    named = [f"w{number}" for number in range(workers)]
    return [client.submit(share_of_cores, workers=name, pure=False).result(60) for name in named]


def threads_of_an_engine() -> tuple[int, int, str]:
    """The cores of a session that an engine opens in this worker, torch's threads there, and what Dask's nanny says."""
    import torch

    from embedders import TimmImageEmbedder
    from embedders.recipe import recipes_of
    from tasks.worker.shared_engine import shared_engine

    recipes = recipes_of(TimmImageEmbedder("test_vit", pretrained=False))
    with shared_engine(recipes, "cpu") as engine:
        threads = engine._call_inside(lambda engine: torch.get_num_threads())
        return engine.sessions[0].num_threads, threads, os.environ["OMP_NUM_THREADS"]  # type: ignore[attr-defined]


ALL = os.sched_getaffinity(0)
FIRST = {min(ALL)}


@pytest.mark.skipif(len(ALL) < 2, reason="one core cannot be shared")
def test_workers_started_by_hand_share_the_cores_whatever_the_nanny_says(tmp_path: Path) -> None:
    with cluster(tmp_path, ALL) as client:
        assert client.submit(threads_of_an_engine).result(120) == (len(ALL), len(ALL), "1")
    with cluster(tmp_path, ALL, ALL) as client:
        assert shares(client, 2) == [len(ALL) // 2] * 2


@pytest.mark.skipif(len(ALL) < 2, reason="one core cannot be shared")
def test_workers_that_may_use_other_cores_have_other_shares(tmp_path: Path) -> None:
    """As dask-cuda pins workers to the cores near their GPUs, or where a node has two kinds of workers."""
    with cluster(tmp_path, ALL, FIRST) as client:
        assert shares(client, 2) == [max(1, len(ALL) - 1), 1]
    with cluster(tmp_path, FIRST, ALL - FIRST) as client:
        assert shares(client, 2) == [1, len(ALL) - 1]


def test_outside_of_a_worker_all_cores_are_ones_own() -> None:
    assert share_of_cores() == divide(os.getpid(), [])


class Machine:
    """Processes on a machine with many cores: the cores that each may use, and its cgroups' limits."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **affinities: range) -> None:
        self.pids = {name: os.getpid() if not number else os.getppid() for number, name in enumerate(affinities)}
        self.quotas: dict[int, dict[str, float]] = {}
        masks = {self.pids[name]: set(allowed) for name, allowed in affinities.items()}
        monkeypatch.setattr(cores, "_affinity", masks.__getitem__)
        monkeypatch.setattr(cores, "cpu_quotas", lambda pid: self.quotas.get(pid, {}))

    def shares(self) -> dict[str, int]:
        return {name: divide(pid, [*self.pids.values()]) for name, pid in self.pids.items()}


def test_each_core_is_divided_among_those_that_may_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Machine(monkeypatch, a=range(16), b=range(16)).shares() == {"a": 8, "b": 8}
    assert Machine(monkeypatch, a=range(16), b=range(16, 32)).shares() == {"a": 16, "b": 16}
    assert Machine(monkeypatch, a=range(32), b=range(16)).shares() == {"a": 24, "b": 8}


def test_a_cgroups_limit_is_divided_among_its_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, a=range(64), b=range(64))
    a, b = machine.pids.values()
    machine.quotas = {a: {"/pod": 6.0, "/": 100.0}, b: {"/pod": 6.0}}
    assert machine.shares() == {"a": 3, "b": 3}
    machine.quotas = {a: {"/pod-a": 6.0}, b: {"/pod-b": 0.5}}
    assert machine.shares() == {"a": 6, "b": 1}


def test_a_worker_that_is_gone_takes_no_cores() -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    assert divide(os.getpid(), [ended.pid]) == divide(os.getpid(), [])
