"""Choose between exact and fast decoding: time exact decoding, and decode on the GPU only if the model is faster.

If the model is the bottleneck, exact decoding costs nothing.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator

from embedders.loader import Encoded, Loader

TRIAL = 6
"""Batches by which exact decoding is timed, the first one not counted."""

ENOUGH = 3
"""Batches that tell enough once `TRIAL_SECONDS` are over."""

TRIAL_SECONDS = 10.0

NO_CORE_DECODES = 1000
"""Images a second that no core decodes exactly, unless they are thumbnails: 330 to 420 photographs of 500x375."""


def surely_fast(model_rate: float, num_threads: int) -> bool:
    """Return whether fast decoding needs no trial, because no exact decoder could keep up.

    Args:
        model_rate: Images per second that all models together take; 0 if unknown.
        num_threads: Threads that decode.
    """
    return model_rate > NO_CORE_DECODES * num_threads


def exact_rate(loader: Loader, images: Iterable[Encoded], batch_size: int) -> float:
    """Return how many images per second a loader decodes; 0 if there are no two batches to tell it by.

    Args:
        loader: The loader. What it decodes is thrown away.
        images: The images to decode, again and again if they are too few.
        batch_size: Images of its full batch.
    """
    counts, times = [], []
    for batch, *_ in loader.batches(_trial(images, batch_size)):
        counts.append(len(batch.tags) + len(batch.rejected))
        times.append(time.perf_counter())
    return sum(counts[1:]) / (times[-1] - times[0]) if len(times) > 1 else 0.0


def _trial(images: Iterable[Encoded], batch_size: int) -> Iterator[Encoded]:
    """Yield images for `TRIAL` batches; fewer if these take long."""
    began = time.perf_counter()
    for count, image in enumerate(itertools.islice(itertools.cycle(images), TRIAL * batch_size)):
        if count >= ENOUGH * batch_size and time.perf_counter() - began > TRIAL_SECONDS:
            return
        yield image
