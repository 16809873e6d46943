"""Decode encoded images with Pillow, with one kind of exception for whatever is wrong with them.

Every image of a dataset that Pillow opens is opened here, so formats and the pixel limit hold everywhere.
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
from PIL import Image, UnidentifiedImageError

from embedders.errors import one_line
from embedders.quarantine import Reason

if TYPE_CHECKING:
    Buffer = np.ndarray | memoryview | bytes
from embedders.image_headers import ImageHeader, as_view, inspect, png_chunks

MAX_PIXELS = 178_000_000
"""Just under the size from which Pillow calls an image a decompression bomb (2 x Image.MAX_IMAGE_PIXELS)."""
IMAGE_ERROR = 200
"""Characters of Pillow's error that the quarantine keeps: some of its texts hold the bytes they are about."""


class BadImage(Exception):
    """An image that cannot be decoded; `detail` is one line."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def decode(
    data: Buffer,
    mode: str = "RGB",
    max_pixels: int = MAX_PIXELS,
    apply_exif: bool = False,
    at_least: tuple[int, int] | None = None,
) -> Image.Image:
    """The decoded image in Pillow mode `mode`: `PIL.Image.open(...).convert(mode)`, first frame of several.

    Raises BadImage, and besides MemoryError nothing else, whatever the bytes are. Images of more than `max_pixels` by
    their header are refused before they are decoded. EXIF orientation is ignored, as timm ignores it, unless
    `apply_exif`.
    """
    if len(data) == 0:
        raise BadImage(Reason.EMPTY, "no bytes")
    header = inspect(data)
    _check_size(header.width, header.height, max_pixels)
    try:
        with _opened(data) as image:
            _check_size(*image.size, max_pixels)
            if at_least is not None:
                image.draft("RGB", at_least)
            return (_upright(image) if apply_exif else image).convert(mode)
    except (BadImage, MemoryError):
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise BadImage(Reason.TOO_LARGE, one_line(error, IMAGE_ERROR, named=True)) from error
    except UnidentifiedImageError as error:
        raise _unidentified(data, header) from error
    except Exception as error:  # Pillow's plugins raise OSError, SyntaxError, ValueError, struct.error, IndexError …
        said = one_line(error, IMAGE_ERROR, named=True)
        raise BadImage(_reason(error, data, header.format), f"{header.format}: {said}") from error


def _opened(data: Buffer) -> Image.Image:
    """`PIL.Image.open` of the formats that are read here. Nothing else in this project opens other people's images."""
    _quieten()
    return Image.open(io.BytesIO(as_view(data)), formats=_pillow_formats())


@functools.cache
def _quieten() -> None:
    """Have Pillow and its libtiff write nothing to stderr, for this process.

    What they say by the hundred is of no use there, since no line names its image: a picture that cannot be read raises
    and is quarantined with the reason, and one that can be read is embedded as Pillow reads it.
    """
    warnings.filterwarnings("ignore", module=r"PIL\.")
    logging.getLogger("PIL").setLevel(logging.CRITICAL)
    with contextlib.suppress(
        ImportError, AttributeError, OSError
    ):  # a Pillow without libtiff, or linked in another way
        from PIL import _imaging

        ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler(None)


def _upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF or XMP asks. One whose metadata cannot be read asks for nothing."""
    image.load()  # what follows the pixels may hold the metadata, and an error in the pixels is not theirs
    turn = _TURNS.get(_orientation(image))
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except MemoryError:
        raise
    except Exception:  # whatever a broken block of EXIF makes Pillow raise
        return 1


def is_rotated(data: Buffer) -> bool:
    """Whether the image's metadata asks for another orientation than the stored one, by Pillow's reading of it."""
    try:
        with _opened(data) as image:
            return _orientation(image) in _TURNS
    except MemoryError:
        raise
    except Exception:
        return True  # whatever it is, Pillow's path shall say so


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to bring an image upright, by its EXIF orientation."""

_ORIENTATION = 0x0112
"""EXIF tag of the orientation: 1 is upright."""

_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "MPO", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM", "ICO", "DIB", "PSD", "PCX",
            "SGI", "DDS", "QOI", "TGA", "ICNS", "XBM", "XPM", "SUN", "MSP", "IM")  # fmt: skip
"""Raster formats Pillow reads by itself. EPS, WMF and the like are left out: their plugins start other programs."""

_UNSUPPORTED = frozenset({"jpeg xl", "eps", "wmf", "svg", "heif"})
"""Formats that are images, but not to Pillow as it is used here."""


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Those of _FORMATS that this build of Pillow has; Image.open raises KeyError on the others."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_LARGE, f"{width}x{height} is more than {max_pixels:,} pixels")


def _unidentified(data: Buffer, header: ImageHeader) -> BadImage:
    kind = header.format
    if not kind and b"<svg" in bytes(as_view(data)[:4096]):
        kind = "svg"
    if not kind:
        return BadImage(Reason.NOT_AN_IMAGE, f"begins with {bytes(as_view(data)[:12])!r}")
    if kind in _UNSUPPORTED or (kind == "avif" and "AVIF" not in _pillow_formats()):
        return BadImage(Reason.UNSUPPORTED, f"{kind} is not read here: convert it to JPEG, PNG or WebP")
    reason = Reason.TRUNCATED if _is_cut_short(data, kind) else Reason.CORRUPT
    return BadImage(reason, f"{kind}: the header cannot be read")


def _reason(error: Exception, data: Buffer, kind: str) -> Reason:
    message = str(error).lower()
    if "truncated" in message or isinstance(error, EOFError) or _is_cut_short(data, kind):
        return Reason.TRUNCATED
    unsupported = ("not supported", "unsupported", "not available", "not implemented", "unknown compression")
    if isinstance(error, NotImplementedError | KeyError) or any(words in message for words in unsupported):
        return Reason.UNSUPPORTED
    return Reason.CORRUPT


def _is_cut_short(data: Buffer, kind: str) -> bool:
    """Whether the file ends before its format says it does, as far as that can be told cheaply."""
    view = as_view(data)
    if len(view) < 32:
        return True
    if kind == "jpeg":
        return bytes(view[2:]).rfind(b"\xff\xd9") < 0
    if kind == "png":
        return all(chunk.kind != b"IEND" for chunk in png_chunks(view))
    if kind == "webp":
        return int.from_bytes(view[4:8], "little") + 8 > len(view)
    if kind == "bmp":
        return int.from_bytes(view[2:6], "little") > len(view)
    return kind == "gif" and not bytes(view[-16:]).rstrip(b"\0").endswith(b";")
