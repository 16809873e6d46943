"""The loader that is right by definition: Pillow and timm's own transform, in threads.

It is the fallback for transforms that `Preprocessing` cannot express, the yardstick for the fast loader, and, through
`Reference`, the way of the single images that DALI does not take.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from embedders.bad_images import BadImage
from embedders.errors import is_out_of_memory
from embedders.image_headers import inspect
from embedders.images import MAX_PIXELS, decode
from embedders.loader import Encoded, LoadedBatch, ModelInput
from embedders.quarantine import Reason, Rejected

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from embedders.preprocess import Preprocessing, Transform

    Rows = dict[int, torch.Tensor | Rejected]
    FutureRows = Future[Rows]

_ALONE = threading.Lock()
"""Held by a thread that decodes an image for which there was not enough memory beside others."""

LOOK_AHEAD = 2
"""Batches decoded or in work before the one that is asked for."""


@dataclass(frozen=True)
class Reference:
    """How one encoded image becomes the inputs of models: Pillow's decoding, once, then the transform of each.

    Images whose resize would need more than `max_pixels` are refused: one of 1 x 60000 grows to 600 million pixels when
    its shorter edge becomes 100.
    """

    inputs: Sequence[ModelInput]
    mode: str = "RGB"
    max_pixels: int = MAX_PIXELS
    apply_exif: bool = False

    def __call__(self, sample: Encoded, wanted: Sequence[int] | None = None) -> Rows:
        """Return the image as each transform returns it, or why there is none.

        An image for which there is not enough memory is tried again on its own, and then rejected.

        Args:
            sample: The encoded image.
            wanted: The positions in `inputs` of those to make; all of them if None.

        Returns:
            For each of `wanted` a float32 tensor of shape (channels, height, width), or the rejection.
        """
        wanted = range(len(self.inputs)) if wanted is None else wanted
        try:
            return self._rows(sample, wanted)
        except MemoryError:
            pass
        with _ALONE:
            return {number: self._alone(sample, number) for number in wanted}

    def _alone(self, sample: Encoded, number: int) -> torch.Tensor | Rejected:
        try:
            return self._rows(sample, (number,))[number]
        except MemoryError:
            header = inspect(sample.data)
            what = f"{header.width}x{header.height} pixels" if header.width else f"{len(sample.data):,} bytes"
            detail = f"there is not enough memory for this image of {what}; add some, or decode on fewer threads"
            return Rejected(sample.tag, Reason.TOO_LARGE, detail)

    def _rows(self, sample: Encoded, wanted: Sequence[int]) -> Rows:
        try:
            image = decode(sample.data, self.mode, self.max_pixels, self.apply_exif)
        except BadImage as bad:
            return dict.fromkeys(wanted, Rejected(sample.tag, bad.reason, bad.detail))
        return {number: self._row(image, sample, self.inputs[number]) for number in wanted}

    def _row(self, image: Image.Image, sample: Encoded, model_input: ModelInput) -> torch.Tensor | Rejected:
        try:
            if model_input.preprocessing is not None:
                _check_resize(model_input.preprocessing, image, self.max_pixels)
            return _transformed(model_input.transform, image)
        except BadImage as bad:
            return Rejected(sample.tag, bad.reason, bad.detail)


def _transformed(transform: Transform, image: Image.Image) -> torch.Tensor:
    try:
        return transform(image)
    except Exception as error:  # a transform may be anybody's
        if is_out_of_memory(error):
            raise MemoryError(str(error)) from error
        what = f"the transform does not take {image.width}x{image.height}: {type(error).__name__}: {error}"
        raise BadImage(Reason.UNSUPPORTED, " ".join(what.split())[:200]) from error


def _check_resize(preprocessing: Preprocessing, image: Image.Image, max_pixels: int) -> None:
    width, height = image.size
    geometry = preprocessing.geometry(height, width)
    if min(geometry.resize_h, geometry.resize_w) < 1:
        raise BadImage(Reason.UNSUPPORTED, f"{width}x{height} is too thin: nothing is left of it after the resize")
    if geometry.resize_h * geometry.resize_w > max_pixels:
        what = f"{width}x{height} becomes {geometry.resize_w}x{geometry.resize_h}"
        raise BadImage(Reason.TOO_LARGE, f"{what} in the resize, more than {max_pixels:,} pixels")


class ReferenceLoader:
    """`PIL.Image.open(...).convert(mode)` and a transform in `num_threads` threads; order is kept."""

    def __init__(
        self,
        inputs: Sequence[ModelInput],
        *,
        batch_size: int,
        num_threads: int,
        device: str | torch.device = "cpu",
        mode: str = "RGB",
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
    ) -> None:
        """Start the threads.

        Args:
            inputs: What the models want of each image of Pillow mode `mode`.
            batch_size: Images per batch.
            num_threads: Threads that decode.
            device: Where the batches are put.
            mode: The Pillow mode that images are converted to, "RGB" or "L".
            max_pixels: Images with more are rejected.
            apply_exif: Whether to turn images by their EXIF orientation.
        """
        import torch

        self._inputs = inputs
        self._row = Reference(inputs, mode, max_pixels, apply_exif)
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._empty: dict[int, torch.Tensor] = {}
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reference-loader")

    def batches(self, samples: Iterable[Encoded]) -> Iterator[tuple[LoadedBatch, ...]]:
        """Yield batches, one per input; see `embedders.loader.Loader`."""
        stream = iter(samples)
        in_flight: deque[tuple[list[Encoded], list[FutureRows]]] = deque()
        try:
            while True:
                while len(in_flight) <= LOOK_AHEAD and (chunk := list(islice(stream, self._batch_size))):
                    in_flight.append((chunk, [self._pool.submit(self._row, sample) for sample in chunk]))
                if not in_flight:
                    return
                chunk, rows = in_flight.popleft()
                yield tuple(self._batch(chunk, rows, number) for number in range(len(self._inputs)))
        finally:
            for _, rows in in_flight:
                for row in rows:
                    row.cancel()

    def close(self) -> None:
        """End the threads, once they have finished the images they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, chunk: list[Encoded], rows: list[FutureRows], number: int) -> LoadedBatch:
        images, tags, rejected = collect(chunk, rows, number)
        if not images:
            return LoadedBatch(self._no_images(number), [], rejected)
        return LoadedBatch(to_device(images, self._device, self._inputs[number].dtype), tags, rejected)

    def _no_images(self, number: int) -> torch.Tensor:
        """Return (0, channels, height, width), the sizes being what the transform makes of some image."""
        if number not in self._empty:
            import torch
            from PIL import Image

            row = self._inputs[number].transform(Image.new(self._row.mode, (64, 64)))
            empty = row.new_empty((0, *row.shape))
            self._empty[number] = empty.to(self._device, self._inputs[number].dtype or torch.float32)
        return self._empty[number]


def collect(
    chunk: list[Encoded], rows: list[FutureRows], number: int
) -> tuple[list[torch.Tensor], list[Hashable], list[Rejected]]:
    """Wait for the rows of a chunk.

    Args:
        chunk: The samples.
        rows: What `Reference` makes of each.
        number: The input to take; rows that were not asked for it are passed over.

    Returns:
        The images, their tags, and the samples that gave no image.
    """
    images: list[torch.Tensor] = []
    tags: list[Hashable] = []
    rejected: list[Rejected] = []
    for sample, row in zip(chunk, rows, strict=True):
        result = row.result().get(number)
        if isinstance(result, Rejected):
            rejected.append(result)
        elif result is not None:
            images.append(result)
            tags.append(sample.tag)
    return images, tags, rejected


def to_device(images: list[torch.Tensor], device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """Put n images (c, h, w) on the CPU into one (n, c, h, w) on `device`; the copy to a GPU does not block."""
    import torch

    batch = torch.stack(images).to(dtype or torch.float32)
    if device.type != "cuda":
        return batch
    # The pinned block goes back to torch's cache, which waits for the copy before giving it out again.
    return batch.pin_memory().to(device, non_blocking=True)
