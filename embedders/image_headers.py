"""What the header of an encoded image says: format, size, and whether DALI decodes it as Pillow does.

`inspect` looks at the content, never at a name. What it is not sure of is left to Pillow.
"""

from __future__ import annotations

import bisect
import zlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:
    Buffer = np.ndarray | memoryview | bytes


class ImageHeader(NamedTuple):
    """What the first bytes say. Sizes are in pixels, before any EXIF rotation, and 0 where they were not looked for.

    `dali` is True only where DALI's CPU decoder and Pillow agree bit for bit; otherwise `why` is a line for a person.
    `metadata` is True if the image carries EXIF or XMP, so that it might ask to be rotated.
    """

    format: str
    width: int
    height: int
    dali: bool
    why: str
    metadata: bool = False


def inspect(data: Buffer) -> ImageHeader:
    """The header of an encoded image (1-D uint8 array, or bytes); never raises.

    Runs once per image in the thread that feeds the loader: about 15 microseconds for a JPEG of 50 kB.
    """
    view = as_view(data)
    kind = sniff(bytes(view[:32]))
    if kind == "jpeg":
        return _inspect_jpeg(view)
    if kind == "png":
        return _inspect_png(view)
    return ImageHeader(kind, 0, 0, False, f"{kind or 'unknown format'} is read by Pillow")


_SIGNATURES = (
    (b"\xff\xd8\xff", "jpeg"),
    (b"\x89PNG\r\n\x1a\n", "png"),
    (b"GIF87a", "gif"),
    (b"GIF89a", "gif"),
    (b"BM", "bmp"),
    (b"II*\0", "tiff"),
    (b"MM\0*", "tiff"),
    (b"II+\0", "tiff"),
    (b"MM\0+", "tiff"),
    (b"\xff\x4f\xff\x51", "jpeg2000"),
    (b"\0\0\0\x0cjP  \r\n\x87\n", "jpeg2000"),
    (b"\0\0\0\x0cJXL \r\n\x87\n", "jpeg xl"),
    (b"\xff\x0a", "jpeg xl"),
    (b"8BPS", "psd"),
    (b"\0\0\1\0", "ico"),
    (b"qoif", "qoi"),
    (b"DDS ", "dds"),
    (b"%!PS", "eps"),
    (b"\xc5\xd0\xd3\xc6", "eps"),
    (b"\xd7\xcd\xc6\x9a", "wmf"),
    (b"<svg", "svg"),
)


def sniff(head: bytes) -> str:
    """The name of the format that begins with these bytes (32 are enough), or an empty string."""
    for signature, name in _SIGNATURES:
        if head.startswith(signature):
            return name
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return "avif" if head[8:12] in (b"avif", b"avis") else "heif"
    return ""


def _inspect_jpeg(view: memoryview) -> ImageHeader:
    """Walk the marker segments up to the first scan (ITU T.81, annex B)."""
    end = len(view)
    position = 2
    width = height = components = transform = sof = precision = 0
    ids = b""
    jfif = adobe = metadata = False
    while True:
        if position + 4 > end:
            return ImageHeader("jpeg", width, height, False, "the JPEG ends before its first scan", metadata)
        if view[position] != 0xFF:
            return ImageHeader("jpeg", width, height, False, "the JPEG's markers are out of step", metadata)
        marker = view[position + 1]
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        size = view[position + 2] << 8 | view[position + 3]
        body = position + 4
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            if body + 6 > end:
                return ImageHeader("jpeg", 0, 0, False, "the JPEG ends in its frame header", metadata)
            sof, precision, components = marker, view[body], view[body + 5]
            height = view[body + 1] << 8 | view[body + 2]
            width = view[body + 3] << 8 | view[body + 4]
            ids = bytes(view[body + 6 : body + 6 + 3 * components : 3])
        elif marker == 0xE0:
            jfif = jfif or bytes(view[body : body + 5]) == b"JFIF\0"
        elif marker == 0xE1:
            metadata = True
        elif marker == 0xEE and size >= 14 and bytes(view[body : body + 5]) == b"Adobe":
            adobe = True
            transform = view[body + 11] if body + 11 < end else 0
        elif marker == _START_OF_SCAN:
            break
        elif marker == _END_OF_IMAGE or size < 2:
            return ImageHeader("jpeg", width, height, False, "the JPEG has no scan", metadata)
        elif not (0xE0 <= marker <= 0xEF or marker in _TABLES):
            return ImageHeader("jpeg", width, height, False, f"the JPEG has a marker FF {marker:02X}", metadata)
        position += 2 + size
    why = _why_not_jpeg(sof, precision, components, width * height)
    if not why and components == 3 and _is_stored_as_rgb(jfif, adobe, transform, ids):
        why = "the JPEG is stored as RGB"
    if not why:
        in_parts = sof == _PROGRESSIVE or view[body] < components
        why = _why_not_scans(view, position + 2 + size, _TABLES | {_START_OF_SCAN} if in_parts else frozenset())
    return ImageHeader("jpeg", width, height, not why, why, metadata)


def _why_not_jpeg(sof: int, precision: int, components: int, pixels: int) -> str:
    if sof not in (0xC0, 0xC1, 0xC2) or precision != 8:
        return "the JPEG is not an 8-bit baseline or progressive one"
    if components not in (1, 3):
        return f"the JPEG has {components} components"
    return "" if pixels else "the JPEG's header has no size"


def _is_stored_as_rgb(jfif: bool, adobe: bool, transform: int, ids: bytes) -> bool:
    """libjpeg's guess of the colour space of three components (default_decompress_parms in jdapimin.c)."""
    if jfif:
        return False
    return transform == 0 if adobe else ids == b"RGB"


_PROGRESSIVE, _START_OF_SCAN, _END_OF_IMAGE = 0xC2, 0xDA, 0xD9

_TABLES = frozenset({0xC4, 0xDB, 0xDD, 0xFE})
"""DHT, DQT, DRI and COM: segments that may come before any scan."""

_ENDS_SCAN = np.ones(256, bool)
_ENDS_SCAN[[0x00, *range(0xD0, 0xD8)]] = False
"""By the byte after an FF: whether entropy-coded data ends there. FF 00 is a byte of it, FF D0 to FF D7 restart it."""


def _why_not_scans(view: memoryview, position: int, allowed: frozenset[int]) -> str:
    """Why the scans of a JPEG do not lead to its end; nothing if they do.

    Whatever the entropy-coded bytes are, libjpeg decodes them, with a warning and some grey if need be. It fails on a
    marker among them, as damage and splices leave one. Pillow raises then. A decoder that has given out rows by that
    time, as DALI's has where all components are in one scan, fills the rest with grey and says nothing, and what nvJPEG
    does is its own affair. So no decoder but Pillow gets an image with a marker where none belongs. Bytes after the
    end are common, and harmless.

    Args:
        view: The whole file.
        position: Where the first scan's entropy-coded data begins.
        allowed: The markers that may follow a scan, besides that of the end.
    """
    stops = _scan_ends(view, position)
    position = _first_from(stops, position)
    while 0 <= position < len(view) - 1:
        marker = view[position + 1]
        if marker == _END_OF_IMAGE:
            return ""
        if marker == 0xFF:  # a fill byte
            position += 1
            continue
        size = int.from_bytes(view[position + 2 : position + 4], "big")
        if view[position] != 0xFF or marker not in allowed or size < 2:
            return "the JPEG has a marker in its scan that does not belong there"
        position += 2 + size
        if marker == _START_OF_SCAN:
            position = _first_from(stops, position)
    return "the JPEG has no end"


def _scan_ends(view: memoryview, start: int) -> list[int]:
    """The positions from `start` on at which entropy-coded data would end; 6 microseconds for 50 kB.

    Most bytes FF are followed by 00, so numpy leaves these out, and `find` goes from one of the few others to the next.
    """
    data = np.frombuffer(view, np.uint8, offset=min(start, len(view)))
    marked = (data[:-1] == 0xFF).view(np.uint8)
    flags, found = np.minimum(marked, data[1:], out=marked).tobytes(), []  # 1 for an FF before any byte but 00
    position = flags.find(1)
    while position >= 0:
        if _ENDS_SCAN[data[position + 1]]:
            found.append(position + start)
        position = flags.find(1, position + 1)
    return found


def _first_from(positions: list[int], start: int) -> int:
    """The first of some sorted positions that is not before `start`, or -1."""
    i = bisect.bisect_left(positions, start)
    return positions[i] if i < len(positions) else -1


def _inspect_png(view: memoryview) -> ImageHeader:
    """IHDR, then the chain of chunks up to IEND (PNG specification, third edition, section 5)."""
    if len(view) < 33 or bytes(view[12:16]) != b"IHDR":
        return ImageHeader("png", 0, 0, False, "the PNG ends in its header")
    width, height = int.from_bytes(view[16:20], "big"), int.from_bytes(view[20:24], "big")
    depth, colour, *methods, interlace = view[24:29]
    why = ""
    if not width * height:
        why = "the PNG's header has no size"
    elif max(width, height) >= 1 << 31:
        why = "the PNG's header has a size that no PNG can have"
    elif depth != 8 or colour not in (0, 2) or interlace or any(methods):
        why = "the PNG is not 8-bit RGB or grey without interlace"
    why = why or _why_not_chunks(view)
    return ImageHeader("png", width, height, not why, why)


class _Chunk(NamedTuple):
    """A chunk of a PNG, and where its body begins."""

    kind: bytes
    start: int
    length: int


_PLAIN_CHUNKS = {b"IHDR": 13, b"gAMA": 4, b"cHRM": 32, b"sRGB": 1, b"pHYs": 9}
"""Chunks before the image data that change nothing in any decoder, and their lengths."""


def png_chunks(view: memoryview) -> Iterator[_Chunk]:
    """The chunks up to IEND; without IEND if the chain does not lead there."""
    position, end = 8, len(view)
    while position + 12 <= end:
        chunk = _Chunk(bytes(view[position + 4 : position + 8]), position + 8, _big(view, position))
        yield chunk
        if chunk.kind == b"IEND":
            return
        position = chunk.start + chunk.length + 4


def _why_not_chunks(view: memoryview) -> str:
    """Why a PNG's chunks are not only those that every decoder treats alike; nothing if they are.

    All others are Pillow's, which costs little, since a PNG takes most of its time to inflate: animations, whose first
    frame may be another image, transparency, profiles and texts, which Pillow limits in size and libpng complains of on
    stderr, EXIF, and damage that only one of the two sees. Image data has a checksum that every decoder goes by.
    """
    allowed, kind = dict(_PLAIN_CHUNKS), b""
    for kind, start, length in png_chunks(view):
        if kind == b"IDAT":
            allowed = {b"IEND": 0}
        elif allowed.pop(kind, None) != length:
            return f"the PNG has a chunk {kind!r} of {length} bytes"
        elif zlib.crc32(view[start - 4 : start + length]) != _big(view, start + length):
            return f"the PNG's chunk {kind!r} is damaged"
    return "" if kind == b"IEND" else "the PNG has no end"


def _big(view: memoryview, position: int) -> int:
    """The four bytes at `position` as a number."""
    return int.from_bytes(view[position : position + 4], "big")


def as_view(data: Buffer) -> memoryview:
    return memoryview(data)  # type: ignore[arg-type]  # numpy declares its arrays as buffers from Python 3.12 on
