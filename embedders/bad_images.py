"""What is wrong with an image that cannot be decoded: the reason that the quarantine gives for it."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, UnidentifiedImageError

from embedders.errors import one_line
from embedders.image_headers import ImageHeader, as_view, png_chunks
from embedders.quarantine import Reason

if TYPE_CHECKING:
    Buffer = np.ndarray | memoryview | bytes

PILLOW_TEXT = 200
"""Characters of Pillow's error that the quarantine keeps: some of its texts hold the bytes they are about."""

_UNSUPPORTED = frozenset({"jpeg xl", "eps", "wmf", "svg", "heif"})
"""Image formats that Pillow, as it is used here, does not read."""


class BadImage(Exception):
    """An image that cannot be decoded, with the reason and one line of detail."""

    def __init__(self, reason: Reason, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def bad_image(error: Exception, data: Buffer, header: ImageHeader) -> BadImage:
    """Return what an error of Pillow says of an image, with a reason from the fixed list.

    Args:
        error: What Pillow raised.
        data: The bytes of the image file.
        header: What its header says.
    """
    if isinstance(error, Image.DecompressionBombError | Image.DecompressionBombWarning):
        return BadImage(Reason.TOO_LARGE, one_line(error, PILLOW_TEXT, named=True))
    if isinstance(error, UnidentifiedImageError):
        return _unidentified(data, header)
    said = one_line(error, PILLOW_TEXT, named=True)
    return BadImage(_reason(error, data, header.format), f"{header.format}: {said}")


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Refuse an image with too many pixels.

    Raises:
        BadImage: width * height is more than max_pixels.
    """
    if width * height > max_pixels:
        raise BadImage(Reason.TOO_LARGE, f"{width}x{height} is more than {max_pixels:,} pixels")


def _unidentified(data: Buffer, header: ImageHeader) -> BadImage:
    kind = header.format
    if not kind and b"<svg" in bytes(as_view(data)[:4096]):
        kind = "svg"
    if not kind:
        return BadImage(Reason.NOT_AN_IMAGE, f"begins with {bytes(as_view(data)[:12])!r}")
    if kind in _UNSUPPORTED or (kind == "avif" and "AVIF" not in Image.OPEN):
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
