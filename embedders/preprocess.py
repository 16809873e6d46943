"""A timm evaluation transform as one plain value, and the arithmetic of where its pixels come from.

timm describes how a model wants its images as a small dictionary (`timm.data.resolve_data_config`) and builds a
chain of torchvision transforms from it. `Preprocessing` is that dictionary checked and frozen, so that it can be
compared, fingerprinted and built into other operators than torchvision's: `embedders.dali_operators` needs the size
after the resize and the origin of the crop of every image, to the pixel, before anything is decoded.

Importing this module is cheap: timm, torch and torchvision are imported by the functions that need them.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

if TYPE_CHECKING:
    import torch
    from PIL import Image

    Transform = Callable[[Image.Image], torch.Tensor]

_Enum = TypeVar("_Enum", bound=enum.StrEnum)

DEFAULT_CROP_PCT = 0.875
"""timm.data.constants.DEFAULT_CROP_PCT."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class NotConvertible(ValueError):
    """The transform cannot be expressed as a `Preprocessing`; the message is one line that says why."""


class CropMode(enum.StrEnum):
    """How the image is brought to the input size, with timm's names."""

    CENTER = "center"
    """Shortest edge to size / crop_pct, aspect kept, centre cut out: the edges of the image are lost."""
    SQUASH = "squash"
    """Both edges to size / crop_pct, aspect not kept, centre cut out."""
    BORDER = "border"
    """Longest edge to size / crop_pct, aspect kept, the rest filled with the mean colour."""


class Interpolation(enum.StrEnum):
    """Pillow's convolution filters that DALI has as well. All of them are antialiased when they reduce.

    Nearest is left out on purpose: where a sample lies on the border of two pixels Pillow and DALI choose
    differently and whole rows move. Box and Hamming have no counterpart in DALI.
    """

    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"

    @property
    def support(self) -> float:
        """Radius of the filter in source pixels at scale 1 (Pillow's Resample.c)."""
        return _SUPPORT[self]


_SUPPORT = {Interpolation.BILINEAR: 1.0, Interpolation.BICUBIC: 2.0, Interpolation.LANCZOS: 3.0}


class Geometry(NamedTuple):
    """Where the pixels of one input come from: resize to (resize_h, resize_w), then cut the crop at (top, left).

    A negative `crop_top` or `crop_left` is padding: that many rows above, or columns left of, the resized image.
    """

    resize_h: int
    resize_w: int
    crop_top: int
    crop_left: int


class Geometries(NamedTuple):
    """`Geometry` of n images: four int64 arrays of shape (n,)."""

    resize_h: np.ndarray
    resize_w: np.ndarray
    crop_top: np.ndarray
    crop_left: np.ndarray


@dataclass(frozen=True)
class Preprocessing:
    """A timm data config (`timm.data.resolve_data_config`) whose meaning is known completely.

    `mean` and `std` are in units of [0, 1] and have one entry a channel; channels are RGB, or one of grey.
    """

    channels: int
    height: int
    width: int
    crop_mode: CropMode
    crop_pct: float
    interpolation: Interpolation
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_timm(cls, data_config: Mapping[str, Any]) -> Preprocessing:
        """Return the value of a data config as `timm.data.resolve_data_config` returns it.

        Raises NotConvertible if `timm.data.create_transform` would build something else from it than resize, centre
        crop and normalisation with the filters of `Interpolation`. Missing keys have `create_transform`'s defaults.
        """
        unknown = sorted(key for key, value in data_config.items() if key not in _KNOWN_KEYS and value)
        if unknown:
            raise NotConvertible(f"the data config asks for {', '.join(unknown)}")
        channels, height, width = _input_size(data_config.get("input_size", 224))
        crop_pct = float(data_config.get("crop_pct") or DEFAULT_CROP_PCT)
        if not 0 < crop_pct < math.inf:
            raise NotConvertible(f"crop_pct is {crop_pct}")
        value = cls(
            channels=channels,
            height=height,
            width=width,
            crop_mode=_member(CropMode, data_config.get("crop_mode") or CropMode.CENTER, "crop mode"),
            crop_pct=crop_pct,
            interpolation=_member(Interpolation, data_config.get("interpolation", "bilinear"), "interpolation"),
            mean=_per_channel(data_config.get("mean", IMAGENET_MEAN), channels, "mean"),
            std=_per_channel(data_config.get("std", IMAGENET_STD), channels, "std"),
        )
        if min(value.resize_size) < 1:
            raise NotConvertible(f"crop_pct {crop_pct} leaves nothing of {height}x{width}")
        if 0.0 in value.std:
            raise NotConvertible("a std is zero")
        return value

    def to_timm(self) -> dict[str, Any]:
        """Return the keyword arguments for `timm.data.create_transform`."""
        return {
            "input_size": (self.channels, self.height, self.width),
            "interpolation": str(self.interpolation),
            "mean": self.mean,
            "std": self.std,
            "crop_pct": self.crop_pct,
            "crop_mode": str(self.crop_mode),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the same as plain lists, numbers and strings; equal values give equal JSON."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in self.to_timm().items()}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Preprocessing:
        """Return the value that `to_json` wrote."""
        return cls.from_timm(plain)

    def transform(self) -> Transform:
        """Return timm's own transform: PIL image of mode `mode` in, float32 (channels, height, width) out."""
        return timm_transform(self.to_timm())

    @property
    def mode(self) -> str:
        """The Pillow mode an image is converted to before the transform."""
        return "RGB" if self.channels == 3 else "L"

    @property
    def resize_size(self) -> tuple[int, int]:
        """(height, width) the resize aims at; which edge it binds depends on the crop mode."""
        return math.floor(self.height / self.crop_pct), math.floor(self.width / self.crop_pct)

    @property
    def fill(self) -> tuple[int, ...]:
        """Colour (0 to 255, one a channel) where the crop is larger than the resized image."""
        if self.crop_mode is CropMode.BORDER:
            return tuple(round(255 * value) for value in self.mean)
        return (0,) * self.channels

    @property
    def pads(self) -> bool:
        """Whether some image can come out of the resize smaller than the crop."""
        smaller = self.resize_size[0] < self.height or self.resize_size[1] < self.width
        return smaller or self.crop_mode is CropMode.BORDER

    def geometry(self, height: int, width: int) -> Geometry:
        """Return where timm's transform takes the pixels of an image of height x width from."""
        one = self.geometries(np.array([height]), np.array([width]))
        return Geometry(*(int(values[0]) for values in one))

    def geometries(self, heights: np.ndarray, widths: np.ndarray) -> Geometries:
        """Return the `geometry` of n images at once: positive integers of shape (n,) in.

        Floats are computed in the order torchvision and timm compute them, for the same rounding:
        torchvision.transforms.functional._compute_resized_output_size and center_crop,
        timm.data.transforms.ResizeKeepRatio and center_crop_or_pad.
        """
        resize_h, resize_w = self._resized(heights.astype(np.int64), widths.astype(np.int64))
        return Geometries(resize_h, resize_w, _origin(resize_h, self.height), _origin(resize_w, self.width))

    def _resized(self, heights: np.ndarray, widths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        size_h, size_w = self.resize_size
        if self.crop_mode is CropMode.SQUASH:
            return np.full_like(heights, size_h), np.full_like(widths, size_w)
        if self.crop_mode is CropMode.CENTER and size_h == size_w:
            short, long = np.minimum(heights, widths), np.maximum(heights, widths)
            new_long = (size_h * long / short).astype(np.int64)  # truncated, as int() does
            upright = widths <= heights
            return np.where(upright, new_long, size_h), np.where(upright, size_h, new_long)
        ratio_h, ratio_w = heights / size_h, widths / size_w
        ratio = np.maximum(ratio_h, ratio_w) if self.crop_mode is CropMode.BORDER else np.minimum(ratio_h, ratio_w)
        return np.rint(heights / ratio).astype(np.int64), np.rint(widths / ratio).astype(np.int64)


def sizes(data_config: Mapping[str, Any]) -> Preprocessing:
    """Return what is known of the sizes that a data config's transform makes, whether or not the rest can be expressed.

    Its `geometry` is the transform's as far as the number of pixels goes: that depends neither on the filter nor on the
    channels. Crop modes that are not known keep the aspect as `CropMode.CENTER` does.
    """
    size = data_config.get("input_size", 224)
    height, width = (size, size) if isinstance(size, int) else tuple(size)[-2:]
    mode = data_config.get("crop_mode")
    known = {"input_size": (3, height, width), "crop_pct": data_config.get("crop_pct")}
    return Preprocessing.from_timm(known | {"crop_mode": mode if mode in set(CropMode) else CropMode.CENTER})


def timm_transform(data_config: Mapping[str, Any]) -> Transform:
    """Return timm's own evaluation transform of a data config, whether or not it can be a `Preprocessing`."""
    from timm.data.transforms_factory import create_transform

    return create_transform(**data_config, is_training=False)


_KNOWN_KEYS = frozenset({"input_size", "interpolation", "mean", "std", "crop_pct", "crop_mode"})


def _origin(resized: np.ndarray, crop: int) -> np.ndarray:
    """First row (or column) of a centred crop; half to even as Python's round, padding as torchvision divides it."""
    return np.where(resized < crop, -((crop - resized) // 2), np.rint((resized - crop) / 2.0).astype(np.int64))


def _input_size(size: int | Sequence[int]) -> tuple[int, int, int]:
    if isinstance(size, int):
        size = (3, size, size)
    if len(size) == 2:
        size = (3, *size)
    if len(size) != 3 or min(size) < 1:
        raise NotConvertible(f"the input size is {tuple(size)}")
    channels, height, width = (int(n) for n in size)
    if channels not in (1, 3):
        raise NotConvertible(f"the model takes {channels} channels")
    return channels, height, width


def _per_channel(values: Sequence[float], channels: int, what: str) -> tuple[float, ...]:
    if len(values) != channels:
        raise NotConvertible(f"{what} has {len(values)} entries for {channels} channels")
    return tuple(float(value) for value in values)


def _member(kind: type[_Enum], value: object, what: str) -> _Enum:
    try:
        return kind(str(value))
    except ValueError:
        raise NotConvertible(f"{what} {value!r} has no exact counterpart") from None
