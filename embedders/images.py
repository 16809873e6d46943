"""Decode images with Pillow; whatever is wrong with an image raises one kind of exception.

All images of a dataset that Pillow opens are opened here, so the same formats and pixel limit apply everywhere.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import io
import logging
import warnings
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from embedders.bad_images import BadImage, bad_image, check_size
from embedders.image_headers import as_view, inspect
from embedders.quarantine import Reason

if TYPE_CHECKING:
    Buffer = np.ndarray | memoryview | bytes

MAX_PIXELS = 178_000_000
"""Just under the size from which Pillow calls an image a decompression bomb (2 x Image.MAX_IMAGE_PIXELS)."""


def decode(
    data: Buffer,
    mode: str = "RGB",
    max_pixels: int = MAX_PIXELS,
    apply_exif: bool = False,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """Decode an image, as `PIL.Image.open(...).convert(mode)` does; the first frame of several.

    Args:
        data: The bytes of the image file.
        mode: Pillow's mode of the result.
        max_pixels: An image with more pixels by its header is refused without being decoded.
        apply_exif: Turn the image as its EXIF orientation says. timm ignores it, and so does this by default.
        at_least: (width, height) that are enough, so that a JPEG may be decoded at a smaller scale.

    Raises:
        BadImage: The image cannot be decoded. Nothing else is raised but MemoryError, whatever the bytes are.
    """
    if len(data) == 0:
        raise BadImage(Reason.EMPTY, "no bytes")
    header = inspect(data)
    check_size(header.width, header.height, max_pixels)
    try:
        with _opened(data) as image:
            check_size(*image.size, max_pixels)
            if at_least is not None:
                image.draft("RGB", at_least)
            return (_upright(image) if apply_exif else image).convert(mode)
    except (BadImage, MemoryError):
        raise
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, IndexError …
        raise bad_image(error, data, header) from error


def _opened(data: Buffer) -> Image.Image:
    """Open an image in one of the formats that are read here. No other code of this project opens users' images."""
    _quieten()
    return Image.open(io.BytesIO(as_view(data)), formats=_pillow_formats())


@functools.cache
def _quieten() -> None:
    """Keep Pillow and its libtiff from writing to standard error in this process.

    Their lines, hundreds of them, do not name the image. An image that cannot be read is quarantined with the reason.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    # Pillow may be without libtiff, or linked in another way.
    with contextlib.suppress(ImportError, AttributeError, OSError):
        from PIL import _imaging

        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _upright(image: Image.Image) -> Image.Image:
    """Return the image turned as its EXIF or XMP says; unchanged if its metadata cannot be read."""
    image.load()  # metadata may follow the pixels, and an error in the pixels must not look like one in the metadata
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # a broken EXIF block makes Pillow raise all kinds of errors
        return 1


def is_rotated(data: Buffer) -> bool:
    """Return whether Pillow reads from an image's metadata that it must be turned; True if it cannot be opened."""
    try:
        with _opened(data) as image:
            return _orientation(image) in _TURNS
    except MemoryError:
        raise
    except Exception:
        return True  # Pillow will decode it, and say what is wrong


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation."""

_ORIENTATION = 0x0112
"""EXIF tag of the orientation; 1 is upright."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "MPO", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "DIB", "PSD", "PCX",
            "SGI", "DDS", "QOI", "TGA", "ICNS", "XBM", "XPM", "SUN", "MSP", "IM")  # fmt: skip
"""Raster formats that Pillow reads by itself. EPS, WMF and the like would start other programs."""


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Return those of _FORMATS that this build of Pillow has. Image.open raises KeyError for the others."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)
