"""Where tasks run: one worker a GPU, processes on the CPU, or a Dask cluster that is there already."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from embedders.errors import InputError

if TYPE_CHECKING:
    from distributed.security import Security
    from prefect_dask import DaskTaskRunner

LOOPBACK = "127.0.0.1"
TASKS_A_WORKER = 2
TASKS_A_GPU = 3
"""Task threads of a worker: while one task's shards are computed, the next one is under way (see tasks/worker.py).
A GPU may be through with a group of small shards before Prefect has told the end of the one before."""

GPU_ENVIRONMENT = {"CUDA_DEVICE_MAX_CONNECTIONS": "32"}
"""DALI's decoders use dozens of streams. With the driver's 8 hardware queues some of them lie behind the model's, and
decoding waits for it."""
CPU_ENVIRONMENT = {"MALLOC_ARENA_MAX": "1"}
"""glibc unmaps a thread's heap as soon as it is empty, whatever `embedders.engine` tells it; the main one stays."""

DEATHS_FORGIVEN = 1
"""Workers that may die over a task before it fails. Its shards are then tried one by one, and each may do so again."""


def count_gpus() -> int:
    """GPUs that this process may use, without opening a CUDA context."""
    try:
        import pynvml

        pynvml.nvmlInit()
        installed = int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no NVML, or no driver behind it: either way there is no GPU to use
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return installed if visible is None else len([v for v in visible.split(",") if v.strip() not in {"", "-1"}])


def available_cores() -> int:
    """Processor cores this process may run on."""
    return len(os.sched_getaffinity(0))


def choose_device(device: str) -> str:
    """ "auto", "gpu" or "cpu" as "cuda" or "cpu".

    :raises InputError: a GPU is asked for and there is none, or the packages to use it are missing.
    """
    gpus = 0 if device == "cpu" else count_gpus()
    if device == "gpu" and not gpus:
        raise InputError("no GPU is visible here; give --device cpu, or check nvidia-smi and CUDA_VISIBLE_DEVICES")
    if not gpus:
        return "cpu"
    try:
        import dask_cuda  # noqa: F401
    except ImportError as error:
        raise InputError("dask-cuda is missing: pip install 'shard-embed[gpu]', or give --device cpu") from error
    return "cuda"


def choose_workers(device: str, workers: int | None, shards: int) -> int:
    """How many worker processes: one a GPU; on the CPU one for every four cores, never more than shards."""
    default = count_gpus() if device == "cuda" else max(1, available_cores() // 4)
    return max(1, min(workers or default, shards))


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Let worker processes start without running the user's script again.

    multiprocessing's spawn re-runs the parent's main module in every child, which a script without the
    `if __name__ == "__main__"` guard does not survive. Workers need nothing of it: what a script defines reaches
    them by value, through cloudpickle.
    """
    main = sys.modules["__main__"]
    names = ("__file__", "__spec__")
    hidden = {name: getattr(main, name) for name in names if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in hidden:
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)


class OwnCluster:
    """A cluster of our own, which starts in the background: a run has other things to wait for meanwhile.

    Who can send messages to a scheduler or a worker can run code as its owner, and every user of a machine can connect
    to its loopback. So these speak TLS only, by certificates made for this cluster, which are held in memory.
    """

    def __init__(self, device: str, workers: int) -> None:
        from distributed.security import Security

        self._security = Security.temporary()
        self._pool = ThreadPoolExecutor(1, "cluster")
        self._cluster = self._pool.submit(_start, device, workers, self._security)
        self._pool.submit(self._import_early)

    def address(self) -> str:
        """The scheduler's address, once the workers are there."""
        return str(self._cluster.result().scheduler_address)

    def task_runner(self) -> DaskTaskRunner:
        """Prefect's task runner on it, once the workers are there."""
        return task_runner(self.address(), self._security)

    def close(self) -> None:
        """End its processes."""
        if self._cluster.exception() is None:
            self._cluster.result().close()
        self._pool.shutdown()

    def _import_early(self) -> None:
        """Have the packages that every task needs imported before there is one."""
        from distributed import Client

        with (
            contextlib.suppress(Exception),
            Client(self.address(), security=self._security, set_as_default=False) as client,
        ):
            client.run(import_early)


@contextlib.contextmanager
def own_cluster(device: str, workers: int) -> Iterator[OwnCluster]:
    """One worker a GPU, or processes on the CPU, for the time of the block."""
    with main_module_hidden():
        cluster = OwnCluster(device, workers)
        try:
            yield cluster
        finally:
            cluster.close()


def _start(device: str, workers: int, security: Security) -> Any:
    import dask

    threads = _threads(max(1, available_cores() // workers))
    environment = threads | GPU_ENVIRONMENT if device == "cuda" else CPU_ENVIRONMENT
    with dask.config.set(_settings(environment)):
        if device == "cuda":
            from dask_cuda import LocalCUDACluster

            return LocalCUDACluster(**_gpu_cluster(workers), security=security)
        from distributed import LocalCluster

        return LocalCluster(**_cpu_cluster(workers, threads), security=security)


def import_early() -> None:
    """Import in a worker what its first task will need, and wake its GPU; no task begins there before that is done."""
    gc.disable()  # modules are no garbage
    try:
        gpu = threading.Thread(target=_wake_gpu, daemon=True)
        for name in ("torch", "timm", "nvidia.dali", "tasks.embed"):
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
            if name == "torch":
                gpu.start()
        gpu.join()
    finally:
        gc.enable()


def _wake_gpu() -> None:
    """Load the driver and the libraries that every model uses, which takes seconds and no Python."""
    import torch

    if torch.cuda.is_available():
        images = torch.zeros(1, 16, 16, 16, device="cuda", dtype=torch.float16)
        torch.nn.functional.conv2d(images, images) @ images[0, 0, :1]
        torch.cuda.synchronize()


def task_runner(address: str, security: Security | None = None) -> DaskTaskRunner:
    """Prefect's task runner on the cluster with this scheduler; its certificates are by default Dask's configured."""
    from prefect_dask import DaskTaskRunner

    return DaskTaskRunner(address=address, client_kwargs={"security": security})


def _gpu_cluster(workers: int) -> dict[str, Any]:
    """torch, DALI and cuDF each allocate GPU memory for themselves, so no pool and no spilling is set up here."""
    return {
        "n_workers": workers,
        "threads_per_worker": TASKS_A_GPU,
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
    """No memory limit: a mapped tar counts as a worker's memory though the system can drop it at any time."""
    return {
        "n_workers": workers,
        "threads_per_worker": TASKS_A_WORKER,
        "processes": True,
        "preload": [__name__],
        "scheduler_kwargs": {"allowed_failures": DEATHS_FORGIVEN, "dashboard": False},
        "memory_limit": 0,
        "host": LOOPBACK,
        "dashboard_address": f"{LOOPBACK}:0",
        "silence_logs": 50,
        "env": threads | {"CUDA_VISIBLE_DEVICES": ""},
    }


def dask_setup(worker: Any) -> None:
    """Dask calls it in each worker. The Ctrl-C that a terminal sends to all is for the run, which ends its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _threads(count: int) -> dict[str, str]:
    """Dask sets these to 1; a worker here is the only one to use its share of the cores."""
    return {name: str(count) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}


def _settings(environment: dict[str, str]) -> dict[str, Any]:
    """Dask's settings for a cluster of our own.

    What workers need in their environment before they begin stands here, since dask-cuda replaces their `env` by its
    own. Their web pages are left out: they show logs and code, and anyone on the machine could read them.
    """
    variables = {f"distributed.nanny.pre-spawn-environ.{name}": value for name, value in environment.items()}
    return {"distributed.scheduler.http.routes": [], "distributed.worker.http.routes": [], **variables}
