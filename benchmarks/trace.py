"""When each batch ran on its device: loaded into the workers of a measured run by Dask's preload.

    DASK_DISTRIBUTED__WORKER__PRELOAD='["benchmarks.trace"]' SHARD_EMBED_TRACE=FOLDER python -m flows.embed …

Each worker leaves a file in FOLDER, a line a batch: start and end in seconds of the device's own clock, and its images.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = "SHARD_EMBED_TRACE"
_marks: list[tuple[Any, Any, int]] = []


class Busy(NamedTuple):
    """How busy the device of one worker was between its first batch and its last."""

    images_per_second: float
    share: float
    longest_gap: float
    """Seconds between two batches."""
    mean_gap: float


def dask_setup(worker: Any) -> None:
    """Dask calls this when a worker starts."""
    if FOLDER in os.environ:
        watch()


def dask_teardown(worker: Any) -> None:
    """Dask calls this when a worker ends."""
    if FOLDER in os.environ:
        save(Path(os.environ[FOLDER], f"{os.getpid()}.jsonl"))


def watch() -> None:
    """Note from now on when each batch of this process starts and ends."""
    from embedders.engine import Engine

    original = Engine._forward

    def forward(self: Engine, batch: Any) -> Any:
        start = _mark(self.device)
        result = original(self, batch)
        _marks.append((start, _mark(self.device), len(batch.rows)))
        return result

    Engine._forward = forward  # type: ignore[method-assign]


def _mark(device: str) -> Any:
    """Now, on the host's clock, or once the device comes to it."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def times() -> list[tuple[float, float, int]]:
    """Start and end of each batch, in seconds from the first one's start, and its images; forgets them."""
    marks = list(_marks)
    _marks.clear()
    if not marks:
        return []
    first, last = marks[0][0], marks[-1][1]
    if isinstance(first, float):
        return [(start - first, end - first, images) for start, end, images in marks]
    last.synchronize()
    return [(first.elapsed_time(s) / 1000, first.elapsed_time(e) / 1000, images) for s, e, images in marks]


def save(path: Path) -> None:
    """Write what was noted."""
    path.write_text("".join(json.dumps(line) + "\n" for line in times()))


def load(folder: Path) -> list[list[tuple[float, float, int]]]:
    """What each worker left, workers without a batch left out."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))]
    return [[(s, e, n) for s, e, n in map(json.loads, lines)] for lines in files if lines]


def busy(batches: Sequence[tuple[float, float, int]], skip: int = 0) -> Busy:
    """The summary of one worker's batches after the first `skip`, in which a loader chooses and a cache warms."""
    batches = batches[skip:]
    if len(batches) < 2:
        return Busy(0.0, 0.0, 0.0, 0.0)
    gaps = [max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(batches)]
    whole = batches[-1][1] - batches[0][0]
    images = sum(images for _, _, images in batches)
    return Busy(images / whole, 1 - sum(gaps) / whole, max(gaps), sum(gaps) / len(gaps))
