"""The loader that is right by definition: Pillow and timm's own transform, in threads.

It is the fallback for transforms that `Preprocessing` cannot express, the yardstick for the fast loader, and, through
`Reference`, the way of the single images that DALI does not take.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

from embedders.errors import is_out_of_memory
from embedders.image_headers import inspect
from embedders.images import MAX_PIXELS, BadImage, decode
from embedders.loader import Encoded, LoadedBatch
from embedders.quarantine import Reason, Rejected

if TYPE_CHECKING:
    import torch
    from PIL import Image

    from embedders.preprocess import Preprocessing, Transform

    Row = Future[torch.Tensor | Rejected]

_ALONE = threading.Lock()
"""Held by a thread that decodes an image for which there was not enough memory beside others."""

LOOK_AHEAD = 2
"""Batches decoded or in work before the one that is asked for."""


@dataclass(frozen=True)
class Reference:
    """How one encoded image becomes one input: Pillow's decoding, then `transform`.

    `preprocessing` is only used to refuse images whose resize would need more than `max_pixels`: one of 1 x 60000 grows
    to 600 million pixels when its shorter edge becomes 100. Of a transform that is no `Preprocessing` give the
    `embedders.preprocess.sizes` of its data config.
    """

    transform: Transform
    mode: str = "RGB"
    max_pixels: int = MAX_PIXELS
    apply_exif: bool = False
    preprocessing: Preprocessing | None = None

    def __call__(self, sample: Encoded) -> torch.Tensor | Rejected:
        """The image as the transform returns it, float32 (channels, height, width), or why there is none.

        An image for which there is not enough memory is tried again on its own, and then rejected.
        """
        try:
            return self._row(sample)
        except MemoryError:
            pass
        with _ALONE:
            try:
                return self._row(sample)
            except MemoryError:
                header = inspect(sample.data)
                what = f"{header.width}x{header.height} pixels" if header.width else f"{len(sample.data):,} bytes"
                detail = f"there is not enough memory for this image of {what}; add some, or decode on fewer threads"
                return Rejected(sample.tag, Reason.TOO_LARGE, detail)

    def _row(self, sample: Encoded) -> torch.Tensor | Rejected:
        try:
            image = decode(sample.data, self.mode, self.max_pixels, self.apply_exif)
            self._check_resize(*image.size)
            return self._transformed(image)
        except BadImage as bad:
            return Rejected(sample.tag, bad.reason, bad.detail)

    def _transformed(self, image: Image.Image) -> torch.Tensor:
        try:
            return self.transform(image)
        except Exception as error:  # a transform may be anybody's
            if is_out_of_memory(error):
                raise MemoryError(str(error)) from error
            what = f"the transform does not take {image.width}x{image.height}: {type(error).__name__}: {error}"
            raise BadImage(Reason.UNSUPPORTED, " ".join(what.split())[:200]) from error

    def _check_resize(self, width: int, height: int) -> None:
        if self.preprocessing is None:
            return
        geometry = self.preprocessing.geometry(height, width)
        if min(geometry.resize_h, geometry.resize_w) < 1:
            raise BadImage(Reason.UNSUPPORTED, f"{width}x{height} is too thin: nothing is left of it after the resize")
        if geometry.resize_h * geometry.resize_w > self.max_pixels:
            what = f"{width}x{height} becomes {geometry.resize_w}x{geometry.resize_h}"
            raise BadImage(Reason.TOO_LARGE, f"{what} in the resize, more than {self.max_pixels:,} pixels")


class ReferenceLoader:
    """`PIL.Image.open(...).convert(mode)` and a transform in `num_threads` threads; order is kept."""

    def __init__(
        self,
        transform: Transform,
        *,
        batch_size: int,
        num_threads: int,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        mode: str = "RGB",
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        """`transform` takes a PIL image of mode `mode` and returns (channels, height, width), float.

        Batches are `dtype` (float32 if None) on `device`. `preprocessing` guards against images that explode in the
        resize (see `Reference`).
        """
        import torch

        self._row = Reference(transform, mode, max_pixels, apply_exif, preprocessing)
        self._batch_size = batch_size
        self._device = torch.device(device)
        self._dtype = dtype or torch.float32
        self._empty: torch.Tensor | None = None
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="reference-loader")

    def batches(self, samples: Iterable[Encoded]) -> Iterator[LoadedBatch]:
        """Yield batches of at most the batch size; see `embedders.loader.Loader`."""
        stream = iter(samples)
        in_flight: deque[tuple[list[Encoded], list[Row]]] = deque()
        try:
            while True:
                while len(in_flight) <= LOOK_AHEAD and (chunk := list(islice(stream, self._batch_size))):
                    in_flight.append((chunk, [self._pool.submit(self._row, sample) for sample in chunk]))
                if not in_flight:
                    return
                chunk, rows = in_flight.popleft()
                yield self._batch(chunk, rows)
        finally:
            for _, rows in in_flight:
                for row in rows:
                    row.cancel()

    def close(self) -> None:
        """End the threads, once they have finished the images they are at."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _batch(self, chunk: list[Encoded], rows: list[Row]) -> LoadedBatch:
        images, tags, rejected = collect(chunk, rows)
        if not images:
            return LoadedBatch(self._no_images(), [], rejected)
        return LoadedBatch(to_device(images, self._device, self._dtype), tags, rejected)

    def _no_images(self) -> torch.Tensor:
        """(0, channels, height, width), the sizes being what the transform makes of some image."""
        if self._empty is None:
            from PIL import Image

            row = self._row.transform(Image.new(self._row.mode, (64, 64)))
            self._empty = row.new_empty((0, *row.shape)).to(self._device, self._dtype)
        return self._empty


def collect(chunk: list[Encoded], rows: list[Row]) -> tuple[list[torch.Tensor], list[Hashable], list[Rejected]]:
    """Wait for the rows of a chunk: the images, their tags, and the samples that gave no image."""
    images: list[torch.Tensor] = []
    tags: list[Hashable] = []
    rejected: list[Rejected] = []
    for sample, row in zip(chunk, rows, strict=True):
        result = row.result()
        if isinstance(result, Rejected):
            rejected.append(result)
        else:
            images.append(result)
            tags.append(sample.tag)
    return images, tags, rejected


def to_device(images: list[torch.Tensor], device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """n images (c, h, w) on the CPU as one (n, c, h, w) on `device`; the copy to a GPU does not block."""
    import torch

    batch = torch.stack(images).to(dtype)
    if device.type != "cuda":
        return batch
    # The pinned block goes back to torch's cache, which waits for the copy before giving it out again.
    return batch.pin_memory().to(device, non_blocking=True)
