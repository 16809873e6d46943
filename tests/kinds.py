"""Every kind of image a web crawl holds, whole and damaged."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from PIL import Image, features

from embedders.quarantine import Reason
from flows.demo_data import load_photograph

ARITHMETIC_JPEG = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAA0JCgsKCA0LCgsODg0PEyAVExISEyccHhcgLikxMC4pLSwzOko+MzZGNywtQFdBRkxO"
    "UlNSMj5aYVpQYEpRUk//2wBDAQ4ODhMREyYVFSZPNS01T09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09PT09P"
    "T09PT09PT0//yQARCAAgADADASIAAhEBAxEB/8wACgAQEAUBEBEF/9oADAMBAAIRAxEAPwDImenNnLd7VolURgW+vmI8FnPAmXE9"
    "26HHA6R2CJy7udVIwhwxKNaVd+iS1UIX7qojHFPmIMlL6l9rU3pVJXsHJ/2yDh5FlS1wwk20Lptc+HdBUrckQIrxq4ma6AbyYF5z"
    "2VYJU2IjVeMHSqfLooa0cZk9awzowj2PTHG/cpNDR8kPEbOZpRIyiXnDZHed8fnBK0IM2kITQPn6VvbwWlrbqTfJnQWMm0FVQ/8A"
    "xwPGUA9R1A5hbYJqrE3ouvYaonWkPhiDv0q5XqX7Pbgl7tgghDBZDX+iKvjwb1hUzIDZbT12YXTHGRUquylCnqhQJcEfY7AzTaTb"
    "Dk9+CDYp3WEVfxbpVXCJsZLGGC7BwCiRmo8lq2YoCqT8FfpADwQhH38QWbEeM10YTr2yNfl5Y3gQSw1Kopqz3GBuVIPzKkD/2Q=="
)
"""48 x 32 pixels, rewritten with `jpegtran -arithmetic`: no Python library writes the kind."""


@cache
def photograph() -> Image.Image:
    return load_photograph("skimage", "data/chelsea.png").resize((180, 120))


def saved(image: Image.Image, kind: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def whole() -> dict[str, Callable[[], bytes]]:
    """Name: an image that Pillow reads."""
    p = photograph()
    sixteen = Image.fromarray((np.asarray(p.convert("L")).astype(np.uint16) << 8) | 37)
    frames = [p.rotate(angle) for angle in (0, 20, 40)]
    kinds: dict[str, Callable[[], bytes]] = {
        "jpeg baseline 4:2:0": lambda: saved(p, "JPEG", subsampling=2),
        "jpeg 4:2:2": lambda: saved(p, "JPEG", subsampling=1),
        "jpeg 4:4:4": lambda: saved(p, "JPEG", subsampling=0),
        "jpeg 4:1:1": lambda: saved(p, "JPEG", subsampling="4:1:1"),
        "jpeg progressive": lambda: saved(p, "JPEG", progressive=True),
        "jpeg with restarts": lambda: saved(p, "JPEG", restart_marker_rows=1),
        "jpeg grayscale": lambda: saved(p.convert("L"), "JPEG"),
        "jpeg CMYK": lambda: saved(p.convert("CMYK"), "JPEG"),
        "jpeg YCCK": lambda: as_ycck(saved(p.convert("CMYK"), "JPEG")),
        "jpeg arithmetic": lambda: ARITHMETIC_JPEG,
        "jpeg stored as RGB": lambda: saved(p, "JPEG", keep_rgb=True),
        "jpeg with trailing bytes": lambda: saved(p, "JPEG") + b"\0" * 300,
        "png RGB": lambda: saved(p, "PNG"),
        "png palette": lambda: saved(p.quantize(64), "PNG"),
        "png palette with transparency": lambda: saved(p.quantize(64), "PNG", transparency=3),
        "png 1 bit": lambda: saved(p.convert("1"), "PNG"),
        "png grayscale": lambda: saved(p.convert("L"), "PNG"),
        "png 16 bit": lambda: saved(sixteen, "PNG"),
        "png alpha": lambda: saved(with_alpha(p), "PNG"),
        "png gray alpha": lambda: saved(with_alpha(p).convert("LA"), "PNG"),
        "webp lossy": lambda: saved(p, "WEBP"),
        "webp lossless": lambda: saved(p, "WEBP", lossless=True),
        "webp alpha": lambda: saved(with_alpha(p), "WEBP"),
        "webp animated": lambda: saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        "gif": lambda: saved(p, "GIF"),
        "gif animated": lambda: saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "bmp": lambda: saved(p, "BMP"),
        "bmp palette": lambda: saved(p.quantize(16), "BMP"),
        "tiff": lambda: saved(p, "TIFF"),
        "tiff deflate": lambda: saved(p, "TIFF", compression="tiff_adobe_deflate"),
        "tiff CMYK": lambda: saved(p.convert("CMYK"), "TIFF"),
        "tiff 16 bit": lambda: saved(sixteen, "TIFF"),
        "ppm": lambda: saved(p, "PPM"),
        "one pixel": lambda: saved(p.resize((1, 1)), "JPEG"),
        "one row": lambda: saved(p.resize((180, 1)), "PNG"),
        "one column": lambda: saved(p.resize((1, 120)), "JPEG"),
    }
    if features.check("jpg_2000"):
        kinds["jpeg 2000"] = lambda: saved(p, "JPEG2000")
    if features.check("avif"):
        kinds["avif"] = lambda: saved(p, "AVIF")
    return kinds


def as_ycck(cmyk: bytes) -> bytes:
    """A CMYK JPEG whose Adobe marker says that its colours are stored as YCCK."""
    at = cmyk.index(b"Adobe") + 11
    return cmyk[:at] + b"\x02" + cmyk[at + 1 :]


def claims(data: bytes, height: int, width: int) -> bytes:
    """A baseline JPEG whose header claims another size."""
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[at + 4 :]


def png_claims(data: bytes, width: int, height: int) -> bytes:
    """A PNG whose header claims another size, its checksum right."""
    header = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + data[24:29]
    return data[:12] + header + zlib.crc32(header).to_bytes(4, "big") + data[33:]


def markers(data: bytes) -> Iterator[int]:
    """Where the segments of a JPEG begin, up to its scan."""
    at = 2
    while data[at + 1] != 0xDA:
        yield at
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    yield at


def damaged() -> dict[str, tuple[bytes, set[Reason]]]:
    """Name: an image that cannot be embedded, and the reasons that may be given for it."""
    p = photograph()
    jpeg, progressive, png = saved(p, "JPEG"), saved(p, "JPEG", progressive=True), saved(p, "PNG")
    gif, webp, tiff, bmp = saved(p, "GIF"), saved(p, "WEBP"), saved(p, "TIFF"), saved(p, "BMP")
    cut, broken = {Reason.TRUNCATED, Reason.CORRUPT}, {Reason.CORRUPT, Reason.TRUNCATED, Reason.UNSUPPORTED}
    no_image = {Reason.NOT_AN_IMAGE}
    anything = cut | broken | no_image
    cases: dict[str, tuple[bytes, set[Reason]]] = {
        "html": (b"<!DOCTYPE html><html><body>404</body></html>", no_image),
        "json": (b'{"error": "forbidden"}', no_image),
        "text": (b"not found\n" * 20, no_image),
        "zeros": (bytes(2000), no_image),
        "ones": (b"\xff" * 2000, no_image),
        "noise": (np.random.default_rng(0).bytes(4000), no_image),
        "one byte": (b"\xff", no_image),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>', no_image | {Reason.UNSUPPORTED}),
        "pdf": (b"%PDF-1.7\n" + bytes(100), no_image | {Reason.UNSUPPORTED}),
        "zip": (b"PK\x03\x04" + bytes(100), no_image | {Reason.UNSUPPORTED}),
        "gzip": (b"\x1f\x8b\x08" + bytes(100), no_image | {Reason.UNSUPPORTED}),
        "jpeg signature alone": (jpeg[:3], anything),
        "jpeg claims 65535 x 65535": (claims(jpeg, 65535, 65535), {Reason.TOO_LARGE}),
        "jpeg claims no rows": (claims(jpeg, 0, 180), broken | no_image),
        "jpeg claims no columns": (claims(jpeg, 120, 0), broken | no_image),
        "jpeg with 12 bits": (jpeg.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc0\x00\x11\x0c"), broken | no_image),
        "jpeg cut in its scan": (jpeg[: len(jpeg) // 2], cut),
        "jpeg cut early in its scan": (jpeg[: jpeg.index(b"\xff\xda") + 40], cut),
        "progressive jpeg cut in its first scan": (progressive[: progressive.index(b"\xff\xda") + 60], cut),
        "progressive jpeg cut in half": (progressive[: len(progressive) // 2], cut),
        "png signature alone": (png[:8], anything),
        "png cut in its header": (png[:20], anything),
        "png cut in its data": (png[: len(png) // 2], cut),
        "png claims 60000 x 60000": (png_claims(png, 60000, 60000), {Reason.TOO_LARGE}),
        "png claims no columns": (png_claims(png, 0, 120), broken | no_image),
        "png with a bad header checksum": (png[:29] + b"\0\0\0\0" + png[33:], anything),
        "png with damaged data": (png[:60] + bytes(200) + png[260:], broken),
        "gif signature alone": (gif[:6], anything),
        "gif cut in its palette": (gif[:200], anything),
        "gif cut in its data": (gif[: len(gif) // 2], cut),
        "webp signature alone": (webp[:12], anything),
        "webp cut in its data": (webp[: len(webp) // 2], anything),
        "tiff signature alone": (tiff[:4], anything),
        "tiff cut in its data": (tiff[: len(tiff) // 2], anything),
        "bmp signature alone": (bmp[:2], anything),
        "bmp cut in its header": (bmp[:20], anything),
        "bmp cut in its data": (bmp[: len(bmp) // 2], cut),
    }
    for at in list(markers(jpeg))[1:]:
        cases[f"jpeg cut at byte {at}"] = (jpeg[:at], anything)
    return cases


def flipped() -> dict[str, bytes]:
    """Images with one byte changed: some still decode, and none may stop the others."""
    rng = np.random.default_rng(1)
    jpeg, png = saved(photograph(), "JPEG"), saved(photograph(), "PNG")
    found = {}
    for name, data in (("jpeg", jpeg), ("png", png)):
        for at in rng.integers(2, len(data), 40):
            found[f"{name} with byte {at} flipped"] = data[:at] + bytes([data[at] ^ 0x5A]) + data[at + 1 :]
    return found
