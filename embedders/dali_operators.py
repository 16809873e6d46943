"""timm's transform as DALI operators: decode, resize in two passes, crop and normalise, with Pillow's pixels.

The resize is Pillow's: one pass per axis, rounded to 8 bits after each, in Pillow's order (`vertical_first`). Each pass
is given the region of the crop only, which leaves the pixels as they are and saves a third of the work. What is
different for each image, its `Windows`, is computed from the image headers and fed beside the encoded bytes.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import PIL

from embedders.loader import ModelInput
from embedders.preprocess import CropMode, Interpolation, Preprocessing

if TYPE_CHECKING:
    import torch

DEPTH = 3
"""Batches in a pipeline at once: one being waited for, the others decoding while the caller computes."""

HARDWARE_SHARE = 0.9
"""The part of a full batch that goes to the GPU's JPEG decoder; the rest, and what that decoder cannot do (progressive
images), goes to its other cores. On an H100 that is as fast as 0.65 and takes half the processor time."""

FANCY_UPSAMPLING = True
"""Whether nvJPEG smooths subsampled chroma, as Pillow does, instead of repeating it."""


class Decode(enum.StrEnum):
    """Who decodes JPEGs."""

    EXACT = "exact"
    """libjpeg-turbo on the CPU: Pillow's pixels, bit for bit."""
    FAST = "fast"
    """nvJPEG on the GPU and its hardware decoder: about three times as fast, cosine to timm's vectors 0.9993."""


class Windows(NamedTuple):
    """What DALI is told about n images: arrays of shape (n, 2), (y, x) in pixels, float32 but for `origin`.

    The first pass takes the window `start1` to `end1` of the image to `size1`, the second takes `start2` to `end2` of
    that to `size2`. Each changes the scale of one axis only. `origin` (int32) is where the crop begins in the result:
    zero, or negative where there is padding.
    """

    start1: np.ndarray
    end1: np.ndarray
    size1: np.ndarray
    start2: np.ndarray
    end2: np.ndarray
    size2: np.ndarray
    origin: np.ndarray


class _Axis(NamedTuple):
    """One axis of n images, arrays of shape (n,): the part that the crop shows, before and after the resize."""

    start: np.ndarray
    """Where it starts in the source, a fraction of a pixel included."""
    end: np.ndarray
    shown: np.ndarray
    """Its size after the resize."""
    first: np.ndarray
    """The first row (or column) of the source that the filter touches for it."""
    last: np.ndarray
    """The row after the last one."""


def windows(preprocessing: Preprocessing, heights: np.ndarray, widths: np.ndarray) -> Windows:
    """Return the windows for n images of heights x widths (shape (n,))."""
    resize_h, resize_w, crop_top, crop_left = preprocessing.geometries(heights, widths)
    support = preprocessing.interpolation.support
    y = _axis(heights, resize_h, crop_top, preprocessing.height, support)
    x = _axis(widths, resize_w, crop_left, preprocessing.width, support)
    zero = np.zeros_like(y.first)
    upright = vertical_first(heights, widths, resize_h, resize_w)
    # In its pass an axis goes from start..end to its final size. In the first pass the other axis is only cut, to
    # what the second pass needs; in the second one the axis that is done stays as it is.
    return Windows(
        start1=_pairs(np.where(upright, y.start, y.first), np.where(upright, x.first, x.start)),
        end1=_pairs(np.where(upright, y.end, y.last), np.where(upright, x.last, x.end)),
        size1=_pairs(np.where(upright, y.shown, y.last - y.first), np.where(upright, x.last - x.first, x.shown)),
        start2=_pairs(np.where(upright, zero, y.start - y.first), np.where(upright, x.start - x.first, zero)),
        end2=_pairs(np.where(upright, y.shown, y.end - y.first), np.where(upright, x.end - x.first, x.shown)),
        size2=_pairs(y.shown, x.shown),
        origin=_pairs(np.minimum(crop_top, 0), np.minimum(crop_left, 0), np.int32),
    )


def vertical_first(heights: np.ndarray, widths: np.ndarray, resize_h: np.ndarray, resize_w: np.ndarray) -> np.ndarray:
    """Return whether Pillow makes the vertical pass before the horizontal one, for n images: bool of shape (n,).

    Up to Pillow 12 it never does. Pillow 13 does if the height shrinks much more than the width
    (python-pillow/Pillow#9549). The order shows, because the result of the first pass is rounded to 8 bits.
    """
    if int(PIL.__version__.split(".")[0]) < 13:
        return np.zeros(heights.shape, bool)
    return (resize_h < heights) & (heights - resize_h > 2 * (widths - resize_w))


def _axis(size: np.ndarray, resized: np.ndarray, origin: np.ndarray, crop: int, support: float) -> _Axis:
    """Return one axis of n images of `size` pixels; `support` is the filter's radius at scale 1."""
    low, high = np.maximum(origin, 0), np.minimum(origin + crop, resized)
    scale = size / resized
    reach = support * np.maximum(scale, 1) + 2  # two to spare
    start, end = low * scale, high * scale
    first, last = np.maximum(np.floor(start - reach), 0), np.minimum(np.ceil(end + reach), size)
    return _Axis(start, end, high - low, first, last)


def without_normalisation(preprocessing: Preprocessing) -> Preprocessing:
    """Return a preprocessing without its normalisation: those that are equal then share one resize and crop."""
    zero, one = (0.0,) * preprocessing.channels, (1.0,) * preprocessing.channels
    mean = preprocessing.mean if preprocessing.crop_mode is CropMode.BORDER else zero  # it is the colour of the border
    return replace(preprocessing, mean=mean, std=one)


def distinct_resizes(preprocessings: Sequence[Preprocessing]) -> list[Preprocessing]:
    """Return the different resizes of some preprocessings."""
    return list(dict.fromkeys(map(without_normalisation, preprocessings)))


def known(preprocessing: Preprocessing | None) -> Preprocessing:
    """Return a preprocessing; raise ValueError if there is none."""
    if preprocessing is None:
        raise ValueError("DALI needs the preprocessing of every input")
    return preprocessing


def build_pipeline(
    inputs: Sequence[ModelInput], decode: Decode, batch_size: int, num_threads: int, device: torch.device
) -> Any:
    """Build a pipeline: encoded bytes and the `Windows` of each input in; per input an output on `device`.

    An output is (channels, height, width) of the input's dtype, normalised.
    """
    import nvidia.dali.types as dali_types
    from nvidia.dali import fn
    from nvidia.dali.pipeline import Pipeline

    types: Any = dali_types  # its constants are made at run time
    make_pipeline: Any = Pipeline  # its type stub lacks exec_dynamic
    on_gpu = device.type == "cuda"
    pipeline = make_pipeline(
        batch_size=batch_size,
        num_threads=num_threads,
        device_id=0 if on_gpu else None,
        prefetch_queue_depth=DEPTH,
        exec_dynamic=True,
    )
    with pipeline:
        images = _decoded(decode, on_gpu)
        if known(inputs[0].preprocessing).channels == 1:
            images = fn.color_space_conversion(images, image_type=types.RGB, output_type=types.GRAY)
        resizes = distinct_resizes([known(each.preprocessing) for each in inputs])
        resized = {resize: _resized(images, number, resize) for number, resize in enumerate(resizes)}
        outputs = [_normalised(resized[without_normalisation(known(each.preprocessing))], each) for each in inputs]
        pipeline.set_outputs(*outputs)
    return pipeline


def _decoded(decode: Decode, on_gpu: bool) -> Any:
    """Add to the current pipeline: the input "encoded", decoded to RGB on the device that resizes."""
    import nvidia.dali.types as dali_types
    from nvidia.dali import fn

    types: Any = dali_types
    encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1, no_copy=True)
    nvjpeg: dict[str, Any] = {"hw_decoder_load": HARDWARE_SHARE, "jpeg_fancy_upsampling": FANCY_UPSAMPLING}
    fast = decode is Decode.FAST
    images = fn.decoders.image(
        encoded,
        device="mixed" if fast else "cpu",
        output_type=types.RGB,
        adjust_orientation=False,
        **(nvjpeg if fast else {}),
    )
    return images.gpu() if on_gpu and not fast else images


def _resized(images: Any, number: int, preprocessing: Preprocessing) -> Any:
    """Add to the current pipeline: timm's resize and crop, told per image by its `Windows`; 8-bit pixels."""
    import nvidia.dali.types as dali_types
    from nvidia.dali import fn

    types: Any = dali_types
    interpolation = getattr(types, _INTERPOLATION[preprocessing.interpolation])

    def told(name: str, kind: Any = types.FLOAT) -> Any:
        return fn.external_source(name=f"{name}_{number}", dtype=kind, ndim=1)

    for step in ("1", "2"):
        images = fn.resize(
            images,
            size=told(f"size{step}"),
            roi_start=told(f"start{step}"),
            roi_end=told(f"end{step}"),
            interp_type=interpolation,
            antialias=True,
            dtype=types.UINT8,
        )
    if not preprocessing.pads:
        return images
    return fn.slice(
        images,
        start=told("origin", types.INT32),
        shape=(preprocessing.height, preprocessing.width),
        axes=(0, 1),
        out_of_bounds_policy="pad",
        fill_values=preprocessing.fill,
    )


def _normalised(images: Any, model_input: ModelInput) -> Any:
    """Add to the current pipeline: the images as one input wants them, (channels, height, width) of its dtype."""
    import nvidia.dali.types as dali_types
    import torch
    from nvidia.dali import fn

    types: Any = dali_types
    preprocessing = known(model_input.preprocessing)
    return fn.crop_mirror_normalize(
        images,
        dtype=types.FLOAT16 if model_input.dtype == torch.float16 else types.FLOAT,
        output_layout="CHW",
        mean=[255 * value for value in preprocessing.mean],
        std=[255 * value for value in preprocessing.std],
    )


_INTERPOLATION = {
    Interpolation.BILINEAR: "INTERP_LINEAR",
    Interpolation.BICUBIC: "INTERP_CUBIC",
    Interpolation.LANCZOS: "INTERP_LANCZOS3",
}
"""DALI's filters of Pillow's shapes: the cubic is Keys' with a = -0.5 in both."""


def _pairs(y: np.ndarray, x: np.ndarray, dtype: Any = np.float32) -> np.ndarray:
    return np.stack([y, x], axis=1).astype(dtype)
