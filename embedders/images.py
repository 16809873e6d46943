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
from PIL import Image, UnidentifiedImageError

from embedders.errors import one_line
from embedders.image_headers import ImageHeader, as_view, inspect, png_chunks
from embedders.quarantine import Reason

if TYPE_CHECKING:
    Buffer = np.ndarray | memoryview | bytes

MAX_PIXELS = 178_000_000
"""Just under the size from which Pillow calls an image a decompression bomb (2 x Image.MAX_IMAGE_PIXELS)."""
IMAGE_ERROR = 200
"""Characters of Pillow's error that the quarantine keeps: some of its texts hold the bytes they are about."""


class BadImage(Exception):
    """An image that cannot be decoded, with the reason and one line of detail."""

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

_UNSUPPORTED = frozenset({"jpeg xl", "eps", "wmf", "svg", "heif"})
"""Image formats that Pillow, as it is used here, does not read."""


@functools.cache
def _pillow_formats() -> tuple[str, ...]:
    """Return those of _FORMATS that this build of Pillow has. Image.open raises KeyError for the others."""
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
        return BadImage(Reason.UNSUPPORTED, f"{kind} is not supported: convert it to JPEG, PNG or WebP")
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
    """Return whether the file ends before its format says, as far as a cheap check shows."""
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
