"""Choose a model's batch size: on a GPU the smallest on the flat part of its throughput, within the GPU's memory."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

if TYPE_CHECKING:
    import torch

AUTO_BATCH_SIZE = {"cuda": 256, "cpu": 32}
"""Images per batch where nothing was asked for or measured."""

SIZES = (16, 32, 64, 128, 256, 512, 1024)
FLAT = 0.97
"""A batch size is good enough at this share of the best throughput found."""
MEMORY = 0.6
"""Share of the GPU's memory that a batch may take; decoders and the next batches need the rest."""


class Measured(NamedTuple):
    """A batch size and the images a second it gave."""

    size: int
    rate: float


def choose(measured: Sequence[Measured]) -> Measured:
    """Return the smallest batch size whose throughput is as good as the best."""
    best = max(rate for _, rate in measured)
    return next(m for m in sorted(measured) if m.rate >= FLAT * best)


def climb(rate_of: Callable[[int], float | None], sizes: Sequence[int] = SIZES) -> Iterator[Measured]:
    """Measure growing sizes until one does not fit (None) or two in a row are no faster than what came before."""
    best, no_better = 0.0, 0
    for size in sizes:
        rate = rate_of(size)
        if rate is None:
            return
        yield Measured(size, rate)
        no_better = 0 if rate * FLAT > best else no_better + 1
        best = max(best, rate)
        if no_better == 2:
            return


def halve(rate_of: Callable[[int], float | None], size: int) -> Measured:
    """Measure a size, and smaller ones where it does not fit (None), each half of the one before."""
    while (rate := rate_of(size)) is None and size > 1:
        size //= 2
    return Measured(size, rate or 0.0)


def measure(model: Callable[[torch.Tensor], Any], image: torch.Tensor, size: int | Literal["auto"]) -> Measured:
    """Return the batch size to use on a GPU and what the model alone does with it.

    Args:
        model: The model on the GPU.
        image: One input of shape (channels, height, width) on the GPU.
        size: The batch size that was asked for; "auto" measures the best one.
    """
    import torch

    if size == "auto":
        return best_batch(model, image)
    try:
        rate = images_per_second(model, image.expand(size, *image.shape).contiguous())
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        rate = 0.0
    return Measured(size, rate)


def best_batch(model: Callable[[torch.Tensor], Any], image: torch.Tensor) -> Measured:
    """Return the batch size for `model` on the GPU that `image`, (channels, height, width), is on; about a second.

    Raises:
        torch.OutOfMemoryError: Not even the smallest batch fits.
    """
    measured = list(climb(_rate_within_memory(model, image, SIZES[0])))
    return choose(measured) if measured else Measured(SIZES[0], 0.0)


def decided_batch(model: Callable[[torch.Tensor], Any], image: torch.Tensor, size: int) -> Measured:
    """Return what `model` does with the batch size of another GPU; with half of it, and so on, if this one is smaller.

    Args:
        model: The model on the GPU.
        image: One input of shape (channels, height, width) on the GPU.
        size: The batch size that was decided on.

    Raises:
        torch.OutOfMemoryError: Not even a single image fits.
    """
    return halve(_rate_within_memory(model, image, 1), size)


def _rate_within_memory(
    model: Callable[[torch.Tensor], Any], image: torch.Tensor, smallest: int
) -> Callable[[int], float | None]:
    """Return a function from a batch size to images per second, None where it needs too much of the GPU's memory.

    The function raises torch.OutOfMemoryError if the `smallest` size does not fit at all.
    """
    import torch

    limit = MEMORY * torch.cuda.get_device_properties(image.device).total_memory

    def rate_of(size: int) -> float | None:
        try:
            torch.cuda.reset_peak_memory_stats(image.device)
            rate = images_per_second(model, image.expand(size, *image.shape).contiguous())
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            if size == smallest:
                raise
            return None
        return rate if torch.cuda.max_memory_allocated(image.device) < limit else None

    return rate_of


def images_per_second(
    model: Callable[[torch.Tensor], Any], images: torch.Tensor, warm_up: int = 2, batches: int = 3
) -> float:
    """Time `model` on `images`, (n, channels, height, width), after `warm_up` batches, in `batches` or more."""
    import torch

    def wait() -> None:
        if images.is_cuda:
            torch.cuda.synchronize()

    with torch.inference_mode():
        for _ in range(warm_up):
            model(images)
        wait()
        started, done = time.perf_counter(), 0
        while done < batches or time.perf_counter() - started < 0.05:
            model(images)
            done += 1
            wait()
        return done * len(images) / (time.perf_counter() - started)
