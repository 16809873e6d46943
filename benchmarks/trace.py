"""Note when each batch ran on its device, by the device's own clock.

Each worker writes a file with one line per batch: its start and end, in seconds after the first batch's start, and the
number of its images. The last few batches may be missing.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

LINES = 16
"""Batches that are written at once."""
_marks: list[tuple[Any, Any, int]] = []


class Busy(NamedTuple):
    """How busy the device of one worker was between its first batch and its last."""

    images_per_second: float
    share: float
    longest_gap: float
    """Return the seconds between two batches."""
    mean_gap: float


def watch(folder: Path | None = None) -> None:
    """Begin to note when each batch of this process starts and ends; write it to a file of `folder` if given."""
    from embedders import engine

    original = engine._forward
    first: list[Any] = []

    def forward(session: Any, batch: Any) -> Any:
        start = _mark(session.device)
        result = original(session, batch)
        _marks.append((start, _mark(session.device), len(batch.rows)))
        first[:] = first or [start]
        if folder is not None and len(_marks) >= 2 * LINES:  # the first of them have long ended
            with open(folder / f"{os.getpid()}.jsonl", "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in _seconds(_marks[:LINES], first[0]))
            with open(folder / f"{os.getpid()}.memory", "a") as file:
                file.write("{:.3f} {:.3f}\n".format(*memory()))
            del _marks[:LINES]
        return result

    engine._forward = forward


def _mark(device: str) -> Any:
    """Return the time on the host's clock, or an event that records the device's."""
    if not device.startswith("cuda"):
        return time.perf_counter()
    import torch

    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def times() -> list[tuple[float, float, int]]:
    """Return and forget the notes that are not written yet."""
    marks = list(_marks)
    _marks.clear()
    return _seconds(marks, marks[0][0]) if marks else []


def _seconds(marks: Sequence[tuple[Any, Any, int]], first: Any) -> list[tuple[float, float, int]]:
    if isinstance(first, float):
        return [(start - first, end - first, images) for start, end, images in marks]
    marks[-1][1].synchronize()
    return [(first.elapsed_time(s) / 1000, first.elapsed_time(e) / 1000, images) for s, e, images in marks]


def load(folder: Path) -> list[list[tuple[float, float, int]]]:
    """Return the notes of each worker that had a batch."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("*.jsonl"))]
    return [[(s, e, n) for s, e, n in map(json.loads, lines)] for lines in files if lines]


def memory() -> tuple[float, float]:
    """Return the GB of this process: its own memory, and pages of mapped files, which the system can drop."""
    lines = Path("/proc/self/status").read_text().splitlines()
    sizes = {name: int(value.split()[0]) / 1e6 for name, value in (line.split(":") for line in lines if "kB" in line)}
    return sizes["RssAnon"] + sizes["RssShmem"], sizes["RssFile"]


def load_memory(folder: Path) -> list[list[tuple[float, float]]]:
    """Return each worker's memory, as `memory` gives it, every LINES batches."""
    files = [path.read_text().splitlines() for path in sorted(folder.glob("*.memory"))]
    return [[(float(own), float(mapped)) for own, mapped in map(str.split, lines)] for lines in files]


def busy(batches: Sequence[tuple[float, float, int]], skip: int = 0) -> Busy:
    """Summarise one worker's batches after the first `skip`, in which the loader chooses and caches fill."""
    batches = batches[skip:]
    if len(batches) < 2:
        return Busy(0.0, 0.0, 0.0, 0.0)
    gaps = [max(0.0, later[0] - earlier[1]) for earlier, later in itertools.pairwise(batches)]
    whole = batches[-1][1] - batches[0][0]
    images = sum(images for _, _, images in batches)
    return Busy(images / whole, 1 - sum(gaps) / whole, max(gaps), sum(gaps) / len(gaps))
