"""A Dask cluster that a run starts on this machine for itself: one worker per GPU, or processes on the CPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from tasks.existing_cluster import task_runner
from tasks.worker import start
from tasks.worker.spawn import main_module_hidden
from tasks.worker_count import TASKS_PER_GPU_WORKER, TASKS_PER_WORKER, choose_threads

if TYPE_CHECKING:
    from distributed.security import Security
    from prefect_dask import DaskTaskRunner

LOOPBACK = "127.0.0.1"

GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""DALI's decoders use dozens of streams. With the driver's default of 8 hardware queues some of them wait behind the
model's, and so does decoding."""
CPU_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""Only glibc's main heap keeps freed memory, as `embedders.engine` asks it to; it unmaps a thread's as soon as that is
empty."""

DEATHS_FORGIVEN = 1
"""Workers that may die over a task before it fails. Its shards are then tried one by one, and each may do so again."""


class OwnCluster:
    """A cluster of our own, which starts in the background while the run prepares other things.

    Anyone who can send messages to a scheduler or a worker can run code as its owner, and every user of a machine can
    connect to its loopback. So these speak TLS only, with certificates made for this cluster and held in memory.
    """

    def __init__(self, device: str, workers: int) -> None:
        """Begin to start it.

        Args:
            device: "cuda" or "cpu".
            workers: How many worker processes.
        """
        from distributed.security import Security

        self._security = Security.temporary()
        self._pool = ThreadPoolExecutor(1, "cluster")
        self._cluster = self._pool.submit(_start, device, workers, self._security)
        self._pool.submit(self._import_early)

    def address(self) -> str:
        """Wait for the workers and return the scheduler's address."""
        return str(self._cluster.result().scheduler_address)

    def task_runner(self) -> DaskTaskRunner:
        """Wait for the workers and return Prefect's task runner on them."""
        return task_runner(self.address(), self._security)

    def close(self) -> None:
        """End the scheduler and the workers."""
        if self._cluster.exception() is None:
            self._cluster.result().close()
        self._pool.shutdown()

    def _import_early(self) -> None:
        """Have the workers import the packages that every task needs before the first task."""
        from distributed import Client

        with (
            contextlib.suppress(Exception),
            Client(self.address(), security=self._security, set_as_default=False) as client,
        ):
            client.run(start.import_early)


@contextlib.contextmanager
def own_cluster(device: str, workers: int) -> Iterator[OwnCluster]:
    """Run a cluster of our own for the time of the block.

    Args:
        device: "cuda" for one worker per GPU, "cpu" for processes without one.
        workers: How many workers.

    Example:
        >>> with own_cluster("cpu", workers=2) as cluster, cluster.task_runner() as runner:
        ...     future = runner.submit(embed_shards, parameters=parameters)
    """
    with main_module_hidden():
        cluster = OwnCluster(device, workers)
        try:
            yield cluster
        finally:
            cluster.close()


def _start(device: str, workers: int, security: Security) -> Any:
    import dask

    threads = _thread_variables(choose_threads(workers))
    environment = threads | GPU_ENVIRONMENT if device == "cuda" else CPU_ENVIRONMENT
    with dask.config.set(_dask_settings(environment)):
        if device == "cuda":
            from dask_cuda import LocalCUDACluster

            return LocalCUDACluster(**_gpu_cluster(workers), security=security)
        from distributed import LocalCluster

        return LocalCluster(**_cpu_cluster(workers, threads), security=security)


def _gpu_cluster(workers: int) -> dict[str, Any]:
    """Return the arguments of a LocalCUDACluster.

    torch, DALI and cuDF each allocate GPU memory for themselves, so there is no pool and no spilling.
    """
    return {
        "n_workers": workers,
        "threads_per_worker": TASKS_PER_GPU_WORKER,
        "protocol": "tls",
        "device_memory_limit": 0,
        "memory_limit": 0,
        "rmm_pool_size": None,
        "scheduler_kwargs": {"allowed_failures": DEATHS_FORGIVEN, "dashboard": False},
        "host": LOOPBACK,
        "dashboard_address": f"{LOOPBACK}:0",
        "silence_logs": 50,
    }


def _cpu_cluster(workers: int, threads: dict[str, str]) -> dict[str, Any]:
    """Return the arguments of a LocalCluster.

    There is no memory limit: a mapped tar counts as a worker's memory though the system can drop it at any time.
    """
    return {
        "n_workers": workers,
        "threads_per_worker": TASKS_PER_WORKER,
        "processes": True,
        "preload": [start.__name__],
        "scheduler_kwargs": {"allowed_failures": DEATHS_FORGIVEN, "dashboard": False},
        "memory_limit": 0,
        "host": LOOPBACK,
        "dashboard_address": f"{LOOPBACK}:0",
        "silence_logs": 50,
        "env": threads | {"CUDA_VISIBLE_DEVICES": ""},
    }


def _thread_variables(count: int) -> dict[str, str]:
    """Return the variables that set how many threads numerical libraries use. Dask would set them to 1."""
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def _dask_settings(environment: dict[str, str]) -> dict[str, Any]:
    """Return Dask's settings for a cluster of our own.

    They hold the environment that workers need before they begin, because dask-cuda replaces the workers' `env` by its
    own. Web pages are off: they show logs and code, and anyone on the machine could read them.
    """
    variables = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in environment.items()}
    return {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": [], **variables}
