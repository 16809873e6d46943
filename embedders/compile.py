"""Make a model fast for one batch size: compiled where the run is long enough, recorded as a CUDA graph on a GPU.

A vision transformer's forward pass starts some two hundred kernels. Beside a decoder that uses the same driver each
start waits its turn, and the GPU waits with it; a graph is one start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from embedders.errors import is_out_of_memory, one_line

if TYPE_CHECKING:
    import torch

    Forward = Callable[[torch.Tensor], torch.Tensor]

logger = logging.getLogger(__name__)

COMPILE_SECONDS = {"cuda": 120.0, "cpu": 300.0}
"""Seconds of work, without compiling, from which on it pays: compiling takes 16 s (8 from the cache on disk) and makes
ViT-L/14 on an H100 1.23 times as fast; for EfficientNet-Lite0 on two cores it is 47 s and 1.8 times."""

ALIKE = 0.999
"""Cosine that the prepared model's vectors must have to the plain one's; half precision leaves about 0.99999."""


class Prepared:
    """A model with a faster way for batches of up to the prepared size: `buffer`, (size, channels, height, width)."""

    def __init__(self, model: Forward, run: Callable[[], torch.Tensor], buffer: torch.Tensor) -> None:
        """Take `run`, which gives the model's output for what is in `buffer`, in memory that it may use again."""
        self._model = model
        self._run = run
        self._buffer = buffer

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """Return the model's output, one row per image, in memory of its own."""
        count, size = len(images), len(self._buffer)
        if count > size or 2 * count < size:
            return self._model(images)
        self._buffer[:count].copy_(images)  # what is left of the last batch fills it up
        return self._run()[:count].clone()


def prepare(model: torch.nn.Module, images: torch.Tensor, compiled: bool, alike: float = ALIKE) -> Forward:
    """Return the fastest form of a model that gives the same vectors, for batches like `images`.

    `images` is (size, channels, height, width).

    What does not work for a model (no compiler, an operator that cannot be recorded, other vectors) is left out with a
    warning. Vectors are the same if their cosine is at least `alike`.
    """
    import torch

    with torch.no_grad():
        expected = model(images).float()
        buffer = images.clone()  # keeps the memory format
        forward: Forward = model
        run: Callable[[], torch.Tensor] | None = None
        if compiled:
            try:
                forward = torch.compile(model, dynamic=False)
                forward(buffer)
                run = _calling(forward, buffer)
            except Exception as error:  # no C compiler, no Triton, an operator it does not know …
                if is_out_of_memory(error):
                    raise
                logger.warning("the model is not compiled: %s", one_line(error, limit=200))
                forward = model
        if images.is_cuda:
            try:
                run = _recorded(forward, buffer)
            except torch.OutOfMemoryError:
                torch.cuda.empty_cache()
                logger.warning("the model is not recorded as a CUDA graph: its memory is not there twice")
            except Exception as error:  # it waits for the GPU, or allocates by what it finds there
                torch.cuda.synchronize()
                logger.warning("the model is not recorded as a CUDA graph: %s", one_line(error, limit=200))
        if run is None:
            return model
        agreement = torch.nn.functional.cosine_similarity(run().float().flatten(1), expected.flatten(1)).min()
        if not agreement >= alike:
            logger.warning("the model runs as it is: made quicker, its vectors have a cosine of %.4f", float(agreement))
            return model
        return Prepared(model, run, buffer)


def _calling(forward: Forward, buffer: torch.Tensor) -> Callable[[], torch.Tensor]:
    import torch

    def run() -> torch.Tensor:
        with torch.no_grad():
            return forward(buffer)

    return run


def _recorded(forward: Forward, buffer: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Record the kernels that `forward` starts for `buffer` as one CUDA graph."""
    import torch

    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(3):  # what libraries make at the first call is made before the recording
            forward(buffer)
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    # thread_local: DALI's threads go on allocating meanwhile, and that is no part of the recording.
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = forward(buffer)

    def run() -> torch.Tensor:
        graph.replay()
        return output

    return run
