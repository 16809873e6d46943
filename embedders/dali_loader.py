"""The fast loader: one DALI pipeline that lives as long as its owner and gives Pillow's pixels.

Building a pipeline with a GPU decoder takes 1.7 s, so it is built once, and fed batch by batch from whatever shards the
samples come from. Three things make its output timm's (mean pixel difference 0.003 of 255 for bicubic):

- sizes and origins are computed beforehand from the image headers, with torchvision's rounding (`Preprocessing`);
- the resize is Pillow's (`embedders.dali_operators`);
- what DALI's decoder does not do as Pillow does it is left to Pillow (`embedders.image_headers.inspect`): those images
  go through the reference transform in threads, and become rows of the same batch.
"""

from __future__ import annotations

import io
import logging
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from embedders.dali_operators import (
    DEPTH,
    Decode,
    Windows,
    build_pipeline,
    distinct_resizes,
    known,
    windows,
    without_normalisation,
)
from embedders.image_headers import inspect
from embedders.images import MAX_PIXELS, is_rotated
from embedders.loader import Encoded, LoadedBatch, ModelInput
from embedders.preprocess import Preprocessing
from embedders.reference_loader import Reference, collect, to_device

if TYPE_CHECKING:
    import torch

    from embedders.reference_loader import FutureRows

logger = logging.getLogger(__name__)

DECODERS = 2
"""Pipelines that take turns where nvJPEG decodes. A decoder prepares a batch for the hardware only when its last one is
through, colours converted; while the model has the GPU that takes long, and the hardware would stand idle meanwhile."""

TINY = 16
"""The side, in pixels, up to which an image is Pillow's. DALI's resize of those is up to 14 levels off."""


@dataclass
class _Scheduled:
    """A batch under way: `samples` are in DALI's `pipeline`, `others` with Pillow, as `rows`.

    `sizes` are the heights and widths of `samples`, shape (n, 2). `fits`, shape (inputs, n), says for which inputs DALI
    resizes them; for the rest they are among `others` too.
    """

    samples: list[Encoded]
    sizes: np.ndarray
    fits: np.ndarray
    others: list[Encoded] = field(default_factory=list)
    rows: list[FutureRows] = field(default_factory=list)
    pipeline: Any = None


class DaliLoader:
    """Decodes with DALI what DALI decodes as Pillow does, and the rest with Pillow."""

    def __init__(
        self,
        inputs: Sequence[ModelInput],
        *,
        decode: Decode = Decode.EXACT,
        batch_size: int,
        num_threads: int,
        device: str | torch.device = "cpu",
        max_pixels: int = MAX_PIXELS,
        apply_exif: bool = False,
        decoders: int | None = None,
    ) -> None:
        """Start the threads; the pipelines are built at the first batch.

        Args:
            inputs: What the models want, each with the `preprocessing` that its transform stands for, and all with the
                same number of channels. The transforms serve the images that DALI does not.
            decode: Who decodes JPEGs.
            batch_size: Images per batch.
            num_threads: Threads that decode.
            device: "cpu" or "cuda", where the batches are put; a GPU is always the first one that the process sees.
            max_pixels: Images with more are rejected.
            apply_exif: Whether to turn images by their EXIF orientation.
            decoders: How many pipelines take turns; by default as many as are best.

        Raises:
            ValueError: Decode.FAST on the CPU.
        """
        import torch

        self._device = torch.device(device)
        if decode is Decode.FAST and self._device.type != "cuda":
            raise ValueError("Decode.FAST decodes on a GPU: use Decode.EXACT on the CPU")
        self._inputs = inputs
        self._preprocessings = [known(each.preprocessing) for each in inputs]
        self._resizes = distinct_resizes(self._preprocessings)
        self._decode = decode
        self._batch_size = batch_size
        self._num_threads = num_threads
        self._max_pixels = max_pixels
        self._apply_exif = apply_exif
        self._row = Reference(inputs, self._preprocessings[0].mode, max_pixels, apply_exif)
        self._pool = ThreadPoolExecutor(num_threads, thread_name_prefix="dali-loader")
        self._decoders = decoders or (DECODERS if decode is Decode.FAST else 1)
        self._pipelines: list[Any] = []
        self._turn = 0

    def batches(self, samples: Iterable[Encoded]) -> Iterator[tuple[LoadedBatch, ...]]:
        """Yield batches, one per input; see `embedders.loader.Loader`.

        Within a batch the rows of the images that Pillow decoded come after the others.
        """
        stream = iter(samples)
        in_flight: deque[_Scheduled] = deque()
        try:
            while True:
                while len(in_flight) < self._decoders * DEPTH and (chunk := list(islice(stream, self._batch_size))):
                    in_flight.append(self._route(chunk))
                    self._schedule(in_flight)
                if not in_flight:
                    return
                images = self._outputs(in_flight)
                yield self._join(in_flight.popleft(), images)
        finally:
            self._drain(in_flight)

    def close(self) -> None:
        """Free the pipelines with their device memory, and end the threads."""
        self._pipelines = []
        self._pool.shutdown(wait=True, cancel_futures=True)

    def _route(self, chunk: list[Encoded]) -> _Scheduled:
        """Divide a batch between DALI and Pillow, and start Pillow's part."""
        headers = [sample.header or inspect(sample.data) for sample in chunk]
        sizes = np.array([(header.height, header.width) for header in headers])
        fits = self._fits(sizes)
        fits &= [header.dali for header in headers]
        if self._apply_exif:
            fits &= [not (h.metadata and is_rotated(s.data)) for h, s in zip(headers, chunk, strict=True)]
        ours: np.ndarray = np.logical_or.reduce(fits, axis=0)
        samples = [sample for sample, is_ours in zip(chunk, ours, strict=True) if is_ours]
        batch = _Scheduled(samples, sizes[ours], fits[:, ours])
        for i in np.flatnonzero(~fits.all(axis=0)):
            self._give_to_pillow(batch, chunk[i], ~fits[:, i])
        return batch

    def _give_to_pillow(self, batch: _Scheduled, sample: Encoded, wanted: np.ndarray) -> None:
        """Start Pillow's part of one sample, for the inputs that `wanted`, bool of shape (inputs,), says."""
        batch.others.append(sample)
        batch.rows.append(self._pool.submit(self._row, sample, np.flatnonzero(wanted).tolist()))

    def _fits(self, sizes: np.ndarray) -> np.ndarray:
        """Return which images of sizes (n, 2) DALI can resize for which input: bool of shape (inputs, n).

        They are within the limits before and after the resize; see `Reference`. DALI does not survive a resize to
        nothing: it crashes the process. Tiny images are left to Pillow, because much of them is border, where the two
        cut the filter off differently.
        """
        tiny = sizes.min(axis=1) <= TINY
        # Sizes that are not known are 0, those that a header claims may not fit a product; neither is DALI's.
        sizes = sizes.clip(1, 1 << 31)
        fits = ~tiny & (sizes.prod(axis=1) <= self._max_pixels)
        resized = [each.geometries(sizes[:, 0], sizes[:, 1]) for each in self._preprocessings]
        after = np.stack([each.resize_h * each.resize_w for each in resized])
        return fits & (after >= 1) & (after <= self._max_pixels)

    def _schedule(self, in_flight: deque[_Scheduled]) -> None:
        """Feed the newest batch to the pipeline whose turn it is and let it run."""
        batch = in_flight[-1]
        if not batch.samples:
            return
        if not self._pipelines:
            self._pipelines = [self._build() for _ in range(self._decoders)]
        batch.pipeline = self._pipelines[self._turn]
        self._turn = (self._turn + 1) % self._decoders
        try:
            self._feed(batch.pipeline, [sample.data for sample in batch.samples], batch.sizes, batch.fits)
            batch.pipeline.schedule_run()
        except RuntimeError as error:
            self._recover(in_flight, error)

    def _outputs(self, in_flight: deque[_Scheduled]) -> list[torch.Tensor]:
        """Wait for DALI's part of the oldest batch: (n, channels, height, width) per input; [] without such a part."""
        if not in_flight[0].samples:
            return []
        try:
            return self._take(in_flight[0].pipeline)
        except RuntimeError as error:
            self._recover(in_flight, error)
            return []

    def _take(self, pipeline: Any) -> list[torch.Tensor]:
        """Return the next outputs of a pipeline, one per input, without a copy.

        The tensors own their memory: DALI's default executor does not touch what was handed out until it is freed, and
        then in the order of the stream that it was asked for on.
        """
        import torch
        from torch.utils.dlpack import from_dlpack

        stream = torch.cuda.current_stream() if self._device.type == "cuda" else None
        outputs = pipeline.share_outputs(cuda_stream=stream)
        pipeline.release_outputs()
        return [from_dlpack(output.as_tensor()) for output in outputs]

    def _recover(self, in_flight: deque[_Scheduled], error: RuntimeError) -> None:
        """Give every image that is in a pipeline to Pillow, and the pipelines up.

        DALI does not say which image it failed on, and after an error in a CPU operator the pipeline is dead. This
        costs seconds, but only images that look sound and are not come here.
        """
        count = sum(len(batch.samples) for batch in in_flight)
        logger.warning("DALI failed on one of %d images; Pillow takes them: %s", count, _cause(error))
        self._pipelines = []
        for batch in in_flight:
            for sample, fits in zip(batch.samples, batch.fits.T, strict=True):
                self._give_to_pillow(batch, sample, fits)
            batch.samples, batch.pipeline = [], None

    def _join(self, batch: _Scheduled, images: list[torch.Tensor]) -> tuple[LoadedBatch, ...]:
        """Put DALI's part and Pillow's part of a batch together, per input."""
        numbers = range(len(self._inputs))
        return tuple(self._joined(batch, number, images[number] if images else None) for number in numbers)

    def _joined(self, batch: _Scheduled, number: int, images: torch.Tensor | None) -> LoadedBatch:
        import torch

        dtype = self._inputs[number].dtype or torch.float32
        more, tags, rejected = collect(batch.others, batch.rows, number)
        own: list[Hashable] = [sample.tag for sample in batch.samples]
        fits = batch.fits[number]
        if images is not None and not fits.all():
            kept = np.flatnonzero(fits)
            own, images = [own[i] for i in kept], images[torch.from_numpy(kept).to(self._device)]
        parts = [] if images is None or not len(images) else [images]
        if more:
            parts.append(to_device(more, self._device, dtype))
        if not parts:
            preprocessing = self._preprocessings[number]
            shape = (0, preprocessing.channels, preprocessing.height, preprocessing.width)
            return LoadedBatch(torch.empty(shape, device=self._device, dtype=dtype), [], rejected)
        return LoadedBatch(parts[0] if len(parts) == 1 else torch.cat(parts), own + tags, rejected)

    def _drain(self, in_flight: deque[_Scheduled]) -> None:
        """Wait for what a caller that stopped early left behind, so that the next call begins with idle pipelines."""
        for batch in in_flight:
            for row in batch.rows:
                row.cancel()
        try:
            for batch in in_flight:
                if batch.samples and batch.pipeline is not None:
                    self._take(batch.pipeline)
        except RuntimeError as error:
            logger.warning("DALI failed on an image that nobody waits for: %s", _cause(error))
            self._pipelines = []

    def _build(self) -> Any:
        """Build a pipeline and run it once.

        The first `schedule_run` of a pipeline starts DEPTH iterations, the later ones one each. So the first is spent
        here on tiny images, which also brings an error in the installation to light where it can be understood. They
        are full batches: the decoder takes the first one as the measure of how many images the hardware gets, ever.
        """
        threads = max(1, self._num_threads // self._decoders)
        pipeline = build_pipeline(self._inputs, self._decode, self._batch_size, threads, self._device)
        pipeline.build()
        tiny = _tiny_jpeg(_START_SIDE)
        sizes = np.full((self._batch_size, 2), _START_SIDE)
        fits = np.ones((len(self._inputs), self._batch_size), bool)
        for _ in range(DEPTH):
            self._feed(pipeline, [tiny] * self._batch_size, sizes, fits)
        pipeline.schedule_run()
        for _ in range(DEPTH):
            self._take(pipeline)
        return pipeline

    def _feed(self, pipeline: Any, images: list[np.ndarray], sizes: np.ndarray, fits: np.ndarray) -> None:
        """Hand one batch to a pipeline. `images` are not copied: they must outlive the iteration."""
        pipeline.feed_input("encoded", images)
        for number, resize in enumerate(self._resizes):
            # Inputs of one resize fit alike, since only the resize decides it.
            fit = next(
                fit
                for fit, each in zip(fits, self._preprocessings, strict=True)
                if without_normalisation(each) == resize
            )
            heights, widths = np.where(fit[:, None], sizes, _START_SIDE).T
            where = windows(resize, heights, widths)
            if not fit.all():
                where = _first_pixel_instead(where, resize, ~fit)
            for name, values in where._asdict().items():
                if name != "origin" or resize.pads:
                    pipeline.feed_input(f"{name}_{number}", values)


_START_SIDE = 64
"""Side of the image that a pipeline is started with, in pixels."""


def _first_pixel_instead(where: Windows, preprocessing: Preprocessing, unfit: np.ndarray) -> Windows:
    """Have images that an input cannot take, bool of shape (n,), show their first pixel; that row is thrown away.

    They are in the pipeline for another input, and DALI crashes the process on a resize to nothing.
    """
    height, width = preprocessing.height, preprocessing.width
    harmless = Windows((0, 0), (1, 1), (1, width), (0, 0), (1, width), (height, width), (0, 0))  # type: ignore[arg-type]
    return Windows(
        *(
            np.where(unfit[:, None], np.array(instead, values.dtype), values)
            for instead, values in zip(harmless, where, strict=True)
        )
    )


def _tiny_jpeg(side: int) -> np.ndarray:
    buffer = io.BytesIO()
    Image.new("RGB", (side, side)).save(buffer, "JPEG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def _cause(error: RuntimeError) -> str:
    """Return the line of DALI's message that says what is wrong."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    after = lines[lines.index("encountered:") + 1 :] if "encountered:" in lines else lines
    return after[0][:200] if after else type(error).__name__
