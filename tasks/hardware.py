"""What this machine has: its GPUs, its cores, and which of them a run uses."""

from __future__ import annotations

import os

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
    """Return the number of processor cores this process may run on."""
    return len(os.sched_getaffinity(0))


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
