"""What a worker does before its first task: ignore Ctrl-C, import what tasks need, and initialise its GPU."""

from __future__ import annotations

import contextlib
import gc
import importlib
import signal
import threading
from typing import Any

MODULES = ("torch", "timm", "nvidia.dali", "tasks.embed")
"""What the first task needs. The imports take seconds; no task begins before they are done."""


def dask_setup(worker: Any) -> None:
    """Ignore SIGINT; Dask calls this in each worker that preloads this module.

    A terminal sends Ctrl-C to all processes, but only the run should act on it: it stops its workers itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def import_early() -> None:
    """Import in a worker what its first task will need, and initialise its GPU meanwhile."""
    gc.disable()  # modules are no garbage
    try:
        gpu = threading.Thread(target=_initialise_gpu, daemon=True)
        for name in MODULES:
            with contextlib.suppress(ImportError):
                importlib.import_module(name)
            if name == "torch":
                gpu.start()
        gpu.join()
    finally:
        gc.enable()


def _initialise_gpu() -> None:
    """Load the driver and the libraries that every model uses, which takes seconds and holds no Python lock."""
    import torch

    if torch.cuda.is_available():
        images = torch.zeros(1, 16, 16, 16, device="cuda", dtype=torch.float16)
        torch.nn.functional.conv2d(images, images) @ images[0, 0, :1]
        torch.cuda.synchronize()
