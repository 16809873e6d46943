"""Choose between exact and fast decoding: time the first batches, and decode on the GPU only if the model is faster.

If the model is the bottleneck, exact decoding costs nothing.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from embedders.loader import Encoded, LoadedBatch, ModelInput
from embedders.open_loader import DecodeOptions, open_loader

logger = logging.getLogger(__name__)

TRIAL = 6
"""Batches by which exact decoding is timed against the model, the first one not counted."""

NO_CORE_DECODES = 1000
"""Images a second that no core decodes exactly, unless they are thumbnails: 330 to 420 photographs of 500x375."""


class ChosenLoader:
    """A loader whose decoder follows from how fast the models are."""

    def __init__(
        self,
        options: DecodeOptions,
        inputs: Sequence[ModelInput],
        *,
        batch_size: int,
        num_threads: int,
        device: str,
        model_rate: float = 0.0,
    ) -> None:
        """Open the loader.

        Args:
            options: How to decode.
            inputs: What the models want, one entry per kind of input.
            batch_size: Images per batch.
            num_threads: Threads that decode.
            device: "cuda" or "cpu".
            model_rate: Images per second that all models together take; 0 if unknown.
        """
        on_gpu = device.startswith("cuda")
        rate = model_rate if on_gpu and options.decode == "auto" else 0.0
        fast = rate > NO_CORE_DECODES * num_threads or (on_gpu and options.decode == "fast")
        self._open = functools.partial(
            open_loader, options, inputs, batch_size=batch_size, num_threads=num_threads, device=device
        )
        self._batch_size = batch_size
        self._model_rate = model_rate
        self._loader, self.decoder = self._open(fast=fast)
        self.undecided = bool(rate) and self.decoder == "exact"

    def batches(self, samples: Iterable[Encoded]) -> Iterator[tuple[LoadedBatch, ...]]:
        """Yield batches, one per input; see `embedders.loader.Loader`."""
        stream = iter(samples)
        if self.undecided:
            yield from self._trial(stream)
        yield from self._loader.batches(stream)

    def _trial(self, samples: Iterator[Encoded]) -> Iterator[tuple[LoadedBatch, ...]]:
        """Yield the first batches, decoded exactly; if the model turns out to be faster, switch to the fast decoder."""
        batches, times = [], []
        for batch in self._loader.batches(itertools.islice(samples, TRIAL * self._batch_size)):
            # A loader's memory is valid until the next batch only.
            batches.append(tuple(replace(each, images=each.images.clone()) for each in batch))
            times.append(time.perf_counter())
        yield from batches
        if len(batches) < TRIAL:
            return  # too few to tell; they are done anyway
        exact = (TRIAL - 1) * self._batch_size / (times[-1] - times[0])
        self.undecided = False
        logger.info("exact decoding gives %.0f images/s, the model takes %.0f", exact, self._model_rate)
        if exact < self._model_rate:
            self._loader.close()
            self._loader, self.decoder = self._open(fast=True)

    def close(self) -> None:
        """Free threads and device memory."""
        self._loader.close()
