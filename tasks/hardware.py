"""What this machine has: its GPUs, its cores, and which of them a run uses."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from embedders.errors import InputError


def count_gpus() -> int:
    """Return the number of GPUs that this process may use, without opening a CUDA context."""
    try:
        import pynvml

        pynvml.nvmlInit()
        installed = int(pynvml.nvmlDeviceGetCount())
    except Exception:  # no NVML, or no driver behind it: either way there is no GPU to use
        return 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return installed
    return len([device for device in visible.split(",") if device.strip() not in {"", "-1"}])


def available_cores() -> int:
    """Return the number of processor cores that this process may use, within its cgroup's limits; at least 1."""
    return max(1, int(min([len(os.sched_getaffinity(0)), *cpu_quotas().values()])))


def cpu_quotas(pid: int | str = "self", root: str = "/") -> dict[str, float]:
    """Return the limits on processor time that cgroups set for a process, in cores, by the cgroup's folder.

    A limit holds for all processes of a cgroup and of those below it. Containers, systemd and Slurm set such limits.

    Args:
        pid: The process.
        root: Where the file system begins.
    """
    try:
        lines = Path(root, f"proc/{pid}/cgroup").read_text().splitlines()
    except OSError:  # the process has ended, or another system than Linux
        return {}
    found = {}
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for folder in _cgroup_folders(Path(root, "sys/fs/cgroup"), controllers, path):
            if (quota := _quota(folder)) is not None:
                found[str(folder)] = quota
    return found


def _cgroup_folders(mount: Path, controllers: str, path: str) -> Iterator[Path]:
    """Yield the folders of a cgroup and of those above it, in version 2 (no controllers are named) or 1."""
    if controllers and "cpu" not in controllers.split(","):
        return
    # In a container the path may be the host's, and only its root is found.
    inner = PurePosixPath(path.strip("/"))
    for name in {controllers, "cpu"} if controllers else {""}:
        for part in (inner, *inner.parents):
            yield mount / name / part


def _quota(folder: Path) -> float | None:
    """Return the limit of a cgroup in cores; None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        return float(quota) / float(period) if float(quota) > 0 else None
    except (OSError, ValueError):  # "max" is no number
        return None


def choose_device(device: str) -> str:
    """Return the device that workers compute on: "cuda" or "cpu".

    Args:
        device: What the user asked for: "auto", "gpu" or "cpu".

    Raises:
        InputError: The user asked for a GPU and there is none, or the packages that use it are missing.
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
