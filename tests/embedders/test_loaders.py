"""Both loaders on real photographs and on everything that is found in place of one."""

from __future__ import annotations

import io
import itertools
import random
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import timm
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from timm.data.config import resolve_data_config

from embedders.bad_images import BadImage
from embedders.dali_loader import DaliLoader
from embedders.dali_operators import Decode, vertical_first
from embedders.image_headers import inspect
from embedders.images import decode
from embedders.loader import Encoded, LoadedBatch, Loader, ModelInput
from embedders.preprocess import NotConvertible, Preprocessing, sizes, timm_transform
from embedders.quarantine import Reason
from embedders.reference_loader import ReferenceLoader

CENTER: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}

# Bilinear weights are often dyadic (512 to 256 pixels): sums end in exactly .5, which Pillow and DALI round
# differently, by one level. Where the crop shows the border of an enlarged image the limit is wider as well: there
# Pillow cuts the filter off, and DALI repeats the last pixel.
CONFIGS: dict[str, tuple[dict[str, Any], float]] = {
    "center bicubic": ({}, 0.02),
    "center bilinear": ({"interpolation": "bilinear"}, 0.25),
    "center lanczos": ({"interpolation": "lanczos"}, 0.02),
    "whole short edge": ({"crop_pct": 1.0}, 0.05),
    "squash bicubic": ({"crop_mode": "squash", "crop_pct": 1.0}, 0.05),
    "squash bilinear": ({"crop_mode": "squash", "interpolation": "bilinear"}, 0.25),
    "squash tall": (
        {"crop_mode": "squash", "interpolation": "bilinear", "input_size": (3, 256, 192), "crop_pct": 1.0},
        0.25,
    ),
    "border bicubic": ({"crop_mode": "border", "crop_pct": 1.0, "mean": (0.5, 0.4, 0.3)}, 0.05),
    "wide": ({"input_size": (3, 160, 256)}, 0.02),
    "padded": ({"crop_pct": 1.2}, 0.05),
    "grey": ({"input_size": (1, 224, 224), "mean": (0.5,), "std": (0.25,)}, 0.03),
}
"""Changes to CENTER, and the mean difference to timm's pixels, of 255, that one image may show."""


@cache
def photographs() -> list[Image.Image]:
    folder = Path(skimage.data.__file__).parent  # only what is in the package: nothing is fetched
    names = ["astronaut.png", "coffee.png", "chelsea.png", "rocket.jpg", "camera.png"]
    images: list[Image.Image] = [Image.open(folder / name) for name in names]
    images += [Image.fromarray(load_sample_image(name)) for name in ("china.jpg", "flower.jpg")]
    images = [image if image.mode == "L" else image.convert("RGB") for image in images]
    for image in images:
        image.info.clear()  # of a colour profile, which would leave every PNG to Pillow
    return images


def save(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@cache
def stream_of_photographs() -> dict[str, bytes]:
    """JPEGs of all subsamplings, baseline and progressive, and PNGs: landscape, portrait, small, odd, thin."""
    images: dict[str, bytes] = {}
    shapes = [(500, 375), (333, 500), (101, 61), (512, 512), (47, 231), (640, 90)]
    options = itertools.cycle(
        [
            {"subsampling": s, "progressive": p, "quality": q}
            for s, p, q in ((0, 0, 95), (1, 1, 80), (2, 0, 70), (2, 1, 85))
        ]
    )
    for number, (photo, shape) in enumerate(itertools.product(photographs(), shapes)):
        small = photo.resize(shape)
        images[f"{number}.jpg"] = save(small, "JPEG", **next(options))
        if number % 6 == 0:
            images[f"{number}.png"] = save(small, "PNG")
    return images


def encoded(images: dict[str, bytes]) -> list[Encoded]:
    return [Encoded(name, np.frombuffer(data, np.uint8)) for name, data in images.items()]


class ForOne:
    """A loader for one input."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def batches(self, samples: Iterable[Encoded]) -> Iterator[LoadedBatch]:
        return (batch for (batch,) in self._loader.batches(samples))

    def close(self) -> None:
        self._loader.close()


@pytest.fixture
def make_loader() -> Iterator[Callable[..., ForOne]]:
    """Builds loaders by kind ("dali", "two of dali" in turns as on a GPU, or "reference") and closes them."""
    loaders: list[ForOne] = []

    def make(
        kind: str, changes: dict[str, Any] | None = None, dtype: torch.dtype | None = None, **options: Any
    ) -> ForOne:
        value = Preprocessing.from_timm({**CENTER, **(changes or {})})
        inputs = [ModelInput(value.transform(), value, dtype)]
        options = {"batch_size": 16, "num_threads": 2, **options}
        loader: Loader
        if kind == "reference":
            loader = ReferenceLoader(inputs, mode=value.mode, **options)
        else:
            loader = DaliLoader(inputs, decoders=2 if kind == "two of dali" else None, **options)
        loaders.append(ForOne(loader))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


def rows(batches: list[LoadedBatch]) -> dict[Any, torch.Tensor]:
    """Image by tag; no tag may come twice."""
    found: dict[Any, torch.Tensor] = {}
    for batch in batches:
        assert len(batch.images) == len(batch.tags)
        for tag, image in zip(batch.tags, batch.images, strict=True):
            assert tag not in found
            found[tag] = image
    return found


def reasons(batches: list[LoadedBatch]) -> dict[Any, Reason]:
    everything = [rejected for batch in batches for rejected in batch.rejected]
    assert all(rejected.detail and "\n" not in rejected.detail for rejected in everything)
    assert len({rejected.tag for rejected in everything}) == len(everything)
    return {rejected.tag: rejected.reason for rejected in everything}


def levels(one: torch.Tensor, other: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """The differences of two normalised images in levels of 255."""
    std = torch.tensor({**CENTER, **config}["std"]).view(-1, 1, 1)
    return ((one.float() - other.float()) * std * 255).abs()


# --- fidelity ---------------------------------------------------------------------------------------------------------


def test_configs_cover_what_the_pretrained_tags_use() -> None:
    def kind(value: Preprocessing) -> tuple[Any, ...]:
        return value.crop_mode, value.interpolation, value.channels, value.height == value.width

    cfgs = [timm.get_pretrained_cfg(tag) for tag in timm.list_models(pretrained=True)]
    configs = [resolve_data_config(pretrained_cfg=cfg.to_dict()) for cfg in cfgs if cfg]
    used = {kind(Preprocessing.from_timm(config)) for config in configs}
    assert used <= {kind(Preprocessing.from_timm({**CENTER, **changes})) for changes, _ in CONFIGS.values()}


@pytest.mark.parametrize("name", CONFIGS)
def test_dali_gives_timms_pixels(name: str, make_loader: Callable[..., ForOne]) -> None:
    config, limit = CONFIGS[name]
    value = Preprocessing.from_timm({**CENTER, **config})
    transform = value.transform()
    images = stream_of_photographs()
    found = rows(list(make_loader("dali", config).batches(encoded(images))))
    assert found.keys() == images.keys()
    for tag, data in images.items():
        expected = transform(Image.open(io.BytesIO(data)).convert(value.mode))
        difference = levels(found[tag], expected, config)
        assert difference.mean() < limit, tag
        assert difference.max() < 12, (
            tag
        )  # at the border of an enlarged image, where the two cut the filter differently


def test_reference_is_timms_transform_bit_for_bit(make_loader: Callable[..., ForOne]) -> None:
    transform = Preprocessing.from_timm(CENTER).transform()
    images = stream_of_photographs()
    batches = list(make_loader("reference").batches(encoded(images)))
    assert [tag for batch in batches for tag in batch.tags] == list(images)
    for tag, image in rows(batches).items():
        assert torch.equal(image, transform(Image.open(io.BytesIO(images[tag])).convert("RGB")))


def test_dali_decodes_what_it_is_given_as_pillow_does() -> None:
    from nvidia.dali import fn, pipeline_def

    images = {name: data for name, data in stream_of_photographs().items() if inspect(data).dali}
    images |= {name: data for name, (data, _) in found_in_the_wild().items() if inspect(data).dali and is_sound(data)}

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=None)  # type: ignore[call-overload]
    def decoders() -> Any:
        data = fn.external_source(source=[[sample.data for sample in encoded(images)]], cycle=True)
        return fn.decoders.image(data, adjust_orientation=False)

    (decoded,) = decoders().run()
    for ours, data in zip(decoded, images.values(), strict=True):
        assert np.array_equal(np.array(ours), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_pillows_order_of_passes() -> None:
    """A resize is two resizes of one axis, in the order we think it is, for this version of Pillow."""
    chance = random.Random(0)
    photo = photographs()[0]
    for _ in range(300):
        width, height, new_width, new_height = (chance.randint(20, 120) for _ in range(4))
        image = photo.resize((width, height))
        upright = vertical_first(*(np.array([n]) for n in (height, width, new_height, new_width)))[0]
        between = (width, new_height) if upright else (new_width, height)
        size = (new_width, new_height)
        once, twice = image.resize(size), image.resize(between).resize(size)
        assert np.array_equal(np.asarray(once), np.asarray(twice)), (width, height, new_width, new_height)


def test_half_precision(make_loader: Callable[..., ForOne]) -> None:
    photos = dict(itertools.islice(stream_of_photographs().items(), 5))
    some = encoded({**photos, "gif": save(photographs()[0], "GIF")})
    (half,) = make_loader("dali", dtype=torch.float16).batches(some)
    (full,) = make_loader("dali").batches(some)
    assert half.images.dtype == torch.float16
    assert half.tags == full.tags
    assert (half.images.float() - full.images).abs().max() < 2e-3


# --- what is found in place of a photograph ---------------------------------------------------------------------------


def png_chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def hidden_first_frame(photo: Image.Image) -> bytes:
    """An APNG that shows a grey image where animations are not read, and else the photograph."""
    default = Image.new("RGB", photo.size, "grey")
    default.encoderinfo = {}
    return save(default, "PNG", save_all=True, default_image=True, append_images=[photo, photo.rotate(9)])


@cache
def found_in_the_wild() -> dict[str, tuple[bytes, Reason | None]]:
    """Encoded images and what becomes of them: None for a row, else the reason for the rejection."""
    photo = photographs()[0].resize((151, 103))
    jpeg, png = save(photo, "JPEG", quality=90), save(photo, "PNG")
    scan = jpeg.index(b"\xff\xda")
    frame = jpeg.index(b"\xff\xc0")
    huge = jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]
    flipped = bytearray(png)
    flipped[len(png) // 2] ^= 0xFF
    corrupt = bytearray(jpeg)
    corrupt[len(jpeg) // 2 : len(jpeg) // 2 + 40] = bytes(i * 37 % 255 for i in range(40))
    clear = photo.copy()
    clear.putalpha(Image.linear_gradient("L").resize(clear.size))
    transparent = photo.quantize(16)
    sixteen = Image.fromarray(np.arange(64 * 80, dtype=np.uint16).reshape(64, 80) * 12)
    huge_png = png[:16] + struct.pack(">II", 60000, 60000) + png[24:]
    return {
        "jpeg": (jpeg, None),
        "jpeg grey": (save(photo.convert("L"), "JPEG"), None),
        "jpeg with restarts": (save(photo, "JPEG", restart_marker_blocks=3), None),
        "jpeg 4:1:1": (save(photo, "JPEG", subsampling="4:1:1"), None),
        "jpeg with profile": (save(photo, "JPEG", icc_profile=b"x" * 70000), None),
        "jpeg with padding": (jpeg + bytes(100), None),
        "two jpegs": (jpeg + jpeg, None),
        "jpeg cmyk": (save(photo.convert("CMYK"), "JPEG"), None),
        "jpeg rgb": (save(photo, "JPEG", keep_rgb=True), None),
        "jpeg with a bad scan": (bytes(corrupt), None),
        "jpeg without tables": (jpeg.replace(b"\xff\xdb", b"\xff\xfe"), Reason.CORRUPT),
        "jpeg cut after its magic": (jpeg[:3], Reason.TRUNCATED),
        "jpeg cut in its header": (jpeg[:100], Reason.TRUNCATED),
        "jpeg cut before its scan": (jpeg[:scan], Reason.TRUNCATED),
        "jpeg cut in half": (jpeg[: len(jpeg) // 2], Reason.TRUNCATED),
        "jpeg cut in half and closed": (jpeg[: len(jpeg) // 2] + b"\xff\xd9", None),
        "jpeg of 65535x65535": (huge, Reason.TOO_LARGE),
        "jpeg of 65535x65535, cut": (huge[:300], Reason.TOO_LARGE),
        "png": (png, None),
        "png grey": (save(photo.convert("L"), "PNG"), None),
        "png palette": (save(photo.quantize(16), "PNG"), None),
        "png palette with transparency": (save(transparent, "PNG", transparency=3), None),
        "png alpha": (save(clear, "PNG"), None),
        "png with a transparent colour": (
            png[:33] + png_chunk(b"tRNS", struct.pack(">3H", 10, 20, 30)) + png[33:],
            None,
        ),
        "png with gamma": (png[:33] + png_chunk(b"gAMA", struct.pack(">I", 45455)) + png[33:], None),
        "png 1 bit": (save(photo.convert("1"), "PNG"), None),
        "png 16 bit": (save(sixteen, "PNG"), None),
        "png without its end": (png[:-12], None),
        "png cut in half": (png[: len(png) // 2], Reason.TRUNCATED),
        "png with a flipped byte": (bytes(flipped), Reason.CORRUPT),
        "png of 60000x60000": (huge_png, Reason.TOO_LARGE),
        "webp": (save(photo, "WEBP"), None),
        "webp cut in half": (save(photo, "WEBP")[:2000], Reason.TRUNCATED),
        "gif": (save(photo, "GIF"), None),
        "gif cut in half": (save(photo, "GIF")[:3000], Reason.TRUNCATED),
        "bmp": (save(photo, "BMP"), None),
        "bmp cut in half": (save(photo, "BMP")[:9000], Reason.TRUNCATED),
        "tiff": (save(photo, "TIFF"), None),
        "tiff lzw": (save(photo, "TIFF", compression="tiff_lzw"), None),
        "png of 4294967295 squared": (png[:16] + b"\xff" * 8 + png[24:], Reason.TOO_LARGE),
        "png with a short cHRM": (png[:33] + png_chunk(b"cHRM", bytes(10)) + png[33:], Reason.TRUNCATED),
        "png with an empty sRGB": (png[:33] + png_chunk(b"sRGB", b"") + png[33:], Reason.TRUNCATED),
        "png with text of 3 MB": (
            png[:33] + png_chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(3 << 20))) + png[33:],
            Reason.CORRUPT,
        ),
        "png with a short cHRM after its pixels": (
            png[:-12] + png_chunk(b"cHRM", bytes(10)) + png[-12:],
            Reason.TRUNCATED,
        ),
        "apng": (hidden_first_frame(photo), None),
        "thin": (save(Image.new("RGB", (1, 60000), "red"), "PNG"), Reason.TOO_LARGE),
        "nothing": (b"", Reason.EMPTY),
        "one byte": (b"\xff", Reason.NOT_AN_IMAGE),
        "html": (b"<!DOCTYPE html><html><body>404 Not Found</body></html>" * 9, Reason.NOT_AN_IMAGE),
        "zeros": (bytes(5000), Reason.NOT_AN_IMAGE),
        "svg": (b'<?xml version="1.0"?><svg xmlns="http://www.w3.org/2000/svg"/>', Reason.UNSUPPORTED),
        "heic": (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100), Reason.UNSUPPORTED),
        "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", Reason.UNSUPPORTED),
    }


def is_sound(data: bytes) -> bool:
    try:
        decode(data)
    except BadImage:
        return False
    return True


@pytest.mark.parametrize("kind", ["dali", "reference"])
@pytest.mark.parametrize("batch_size", [1, 7, 100])
def test_everything_comes_back_once(kind: str, batch_size: int, make_loader: Callable[..., ForOne]) -> None:
    wild = found_in_the_wild()
    transform = Preprocessing.from_timm(CENTER).transform()
    samples = encoded({name: data for name, (data, _) in wild.items()})
    batches = list(make_loader(kind, batch_size=batch_size).batches(samples))
    found, rejected = rows(batches), reasons(batches)
    assert rejected == {name: reason for name, (_, reason) in wild.items() if reason}
    assert found.keys() == {name for name, (_, reason) in wild.items() if not reason}
    for tag, image in found.items():
        expected = transform(Image.open(io.BytesIO(wild[tag][0])).convert("RGB"))
        assert levels(image, expected, {}).mean() < 0.02, tag
    assert all(len(batch.tags) + len(batch.rejected) <= batch_size for batch in batches)


@pytest.mark.parametrize("name", [name for name, (_, reason) in found_in_the_wild().items() if reason])
def test_decode_says_what_is_wrong(name: str) -> None:
    data, reason = found_in_the_wild()[name]
    if name == "thin":
        assert decode(data).size == (1, 60000)  # it is the resize that is too large
        return
    with pytest.raises(BadImage) as raised:
        decode(np.frombuffer(data, np.uint8))
    assert raised.value.reason is reason
    assert " at 0x" not in raised.value.detail


def damaged_photographs(count: int) -> dict[str, bytes]:
    """Photographs with 20 random bytes in the scan, continued by another one, with a hole, or with a stray marker."""
    chance = random.Random(14)
    sound = [data for name, data in stream_of_photographs().items() if name.endswith("jpg")]
    sound += [save(photo.resize((320, 240)), "JPEG", restart_marker_rows=1) for photo in photographs()]
    images: dict[str, bytes] = {}
    for number in range(count):
        data = bytearray(sound[number % len(sound)])
        scan = data.index(b"\xff\xda") + 14
        start = chance.randrange(scan, len(data) - 2)
        kind = ("bytes", "splice", "hole", "marker")[number // len(sound) % 4]
        if kind == "bytes":
            for _ in range(20):
                data[chance.randrange(scan, len(data) - 2)] = chance.randrange(256)
        elif kind == "splice":
            other = chance.choice(sound)
            data[start:] = other[chance.randrange(200, len(other)) :]
        elif kind == "hole":
            size = min(4096, len(data) - 2 - start)
            data[start : start + size] = bytes(size)
        else:
            data[start : start + 2] = bytes([0xFF, chance.randrange(256)])
        images[f"{number} {kind}"] = bytes(data)
    return images


def is_sound_to_pillow(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data)).convert("RGB")
    except (OSError, SyntaxError):
        return False
    return True


@pytest.mark.parametrize(("kind", "batch_size"), [("dali", 1), ("dali", 32), ("two of dali", 7), ("reference", 32)])
def test_the_verdict_on_a_damaged_photograph_is_pillows(
    kind: str, batch_size: int, make_loader: Callable[..., ForOne]
) -> None:
    images = damaged_photographs(600)
    sound = {name for name, data in images.items() if is_sound_to_pillow(data)}
    assert 100 < len(sound) < 500
    loader = make_loader(kind, {"input_size": (3, 64, 64)}, batch_size=batch_size)
    batches = list(loader.batches(encoded(images)))
    found = rows(batches)
    assert found.keys() == sound
    assert reasons(batches).keys() == images.keys() - sound
    transform = Preprocessing.from_timm({**CENTER, "input_size": (3, 64, 64)}).transform()
    for name, image in found.items():
        expected = transform(Image.open(io.BytesIO(images[name])).convert("RGB"))
        assert levels(image, expected, {}).mean() < 0.05, name


def test_a_marker_that_pillow_does_not_know_is_pillows() -> None:
    jpeg, _ = found_in_the_wild()["jpeg"]
    tables = jpeg.index(b"\xff\xc4")
    assert inspect(jpeg).dali
    assert not inspect(jpeg[:tables] + b"\xff\x01" + jpeg[tables + 2 :]).dali
    assert inspect(jpeg[:-2] + b"\xff\xff\xff\xd9" + bytes(9)).dali  # fill bytes before the end, padding after it


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about the damage
def test_any_damage_gives_an_image_or_a_bad_image() -> None:
    chance = random.Random(1)
    for data, _ in list(found_in_the_wild().values()):
        for _ in range(8):
            damaged = bytearray(data[: chance.randrange(len(data) + 1)] if chance.random() < 0.5 else data)
            for _ in range(chance.randrange(4)):
                if damaged:
                    damaged[chance.randrange(min(len(damaged), 200))] = chance.randrange(256)
            header = inspect(bytes(damaged))
            assert header.dali is not bool(header.why)
            try:
                assert decode(bytes(damaged), max_pixels=1_000_000).mode == "RGB"
            except BadImage:
                continue


def test_size_limit_comes_before_decoding(make_loader: Callable[..., ForOne]) -> None:
    samples = encoded(
        {"large": save(Image.new("RGB", (200, 101)), "JPEG"), "fits": save(Image.new("RGB", (200, 100)), "GIF")}
    )
    for kind in ("dali", "reference"):
        batches = list(make_loader(kind, {"input_size": (3, 64, 64)}, max_pixels=20_000).batches(samples))
        assert reasons(batches) == {"large": Reason.TOO_LARGE}
        assert list(rows(batches)) == ["fits"]


def test_an_image_too_thin_for_its_resize_is_refused(make_loader: Callable[..., ForOne]) -> None:
    samples = encoded({"thin": save(Image.new("RGB", (1, 3000)), "JPEG")})
    for kind in ("dali", "reference"):
        (batch,) = make_loader(kind, {"crop_mode": "border"}).batches(samples)
        assert reasons([batch]) == {"thin": Reason.UNSUPPORTED}
        assert batch.images.shape == (0, 3, 224, 224)


def test_orientation_is_applied_only_if_asked_for(make_loader: Callable[..., ForOne]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = photographs()[3].resize((160, 120))
    upright = photo.transpose(Image.Transpose.ROTATE_270)
    transform = Preprocessing.from_timm(CENTER).transform()
    data = save(photo, "JPEG", quality=95, exif=exif)
    for kind, apply in itertools.product(("dali", "reference"), (False, True)):
        (batch,) = make_loader(kind, apply_exif=apply).batches(encoded({"rotated": data}))
        assert levels(batch.images[0], transform(upright if apply else photo), {}).mean() < 3


def test_tiny_images_have_timms_pixels(make_loader: Callable[..., ForOne]) -> None:
    transform = Preprocessing.from_timm({**CENTER, "crop_pct": 1.0}).transform()
    images = {
        f"{width}x{height} {number}": save(photo.resize((width, height)), "JPEG")
        for number, photo in enumerate(photographs())
        for width, height in ((2, 2), (3, 5), (8, 8), (16, 16), (40, 16))
    }
    for tag, image in rows(list(make_loader("dali", {"crop_pct": 1.0}).batches(encoded(images)))).items():
        expected = transform(Image.open(io.BytesIO(images[tag])).convert("RGB"))
        assert levels(image, expected, {}).max() < 1.01, tag


def raw_profile(exif: bytes) -> bytes:
    """EXIF as ImageMagick keeps it in the text of a PNG."""
    return b"\nexif\n" + str(len(exif)).rjust(8).encode() + b"\n" + exif.hex().encode() + b"\n"


@pytest.mark.parametrize("kind", ["dali", "reference"])
def test_an_orientation_in_the_text_of_a_png_is_applied(kind: str, make_loader: Callable[..., ForOne]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = photographs()[3].resize((160, 120))
    photo.info.clear()
    png, text = save(photo, "PNG"), raw_profile(exif.tobytes())
    key = b"Raw profile type exif\0"
    chunks = {"tEXt": png_chunk(b"tEXt", key + text), "zTXt": png_chunk(b"zTXt", key + b"\0" + zlib.compress(text))}
    images = {name: png[:33] + chunk + png[33:] for name, chunk in chunks.items()}
    images |= {f"{name} at the end": png[:-12] + chunk + png[-12:] for name, chunk in chunks.items()}
    transform = Preprocessing.from_timm(CENTER).transform()
    upright = transform(photo.transpose(Image.Transpose.ROTATE_270))
    found = rows(list(make_loader(kind, apply_exif=True).batches(encoded(images))))
    assert {name: bool(levels(image, upright, {}).mean() < 0.02) for name, image in found.items()} == dict.fromkeys(
        images, True
    )


@pytest.mark.parametrize("kind", ["dali", "reference"])
def test_unreadable_exif_costs_no_picture(kind: str, make_loader: Callable[..., ForOne]) -> None:
    photo = photographs()[0].resize((151, 103))
    photo.info.clear()
    png, jpeg = save(photo, "PNG"), save(photo, "JPEG")
    images = {
        "png": png[:33] + png_chunk(b"eXIf", b"no TIFF at all") + png[33:],
        "png, none": png[:33] + png_chunk(b"eXIf", b"") + png[33:],
        "jpeg": jpeg[:2] + b"\xff\xe1\0\x0cExif\0\0MM\0\x2b" + jpeg[2:],
    }
    transform = Preprocessing.from_timm(CENTER).transform()
    found = rows(list(make_loader(kind, apply_exif=True).batches(encoded(images))))
    assert found.keys() == images.keys()
    for name, image in found.items():
        expected = transform(Image.open(io.BytesIO(images[name])).convert("RGB"))
        assert levels(image, expected, {}).mean() < 0.02, name


def test_a_transform_that_is_no_preprocessing_has_the_same_limits(make_loader: Callable[..., ForOne]) -> None:
    config = {**CENTER, "interpolation": "nearest"}
    with pytest.raises(NotConvertible):
        Preprocessing.from_timm(config)
    images = {
        "explodes": save(Image.new("RGB", (1, 60000)), "PNG"),
        "vanishes": save(Image.new("RGB", (1, 600)), "PNG"),
        "sound": save(photographs()[0], "PNG"),
    }
    for mode, expected in (
        ("center", {"explodes": Reason.TOO_LARGE}),
        ("border", {"explodes": Reason.UNSUPPORTED, "vanishes": Reason.UNSUPPORTED}),
    ):
        of = {**config, "crop_mode": mode}
        loader = ForOne(ReferenceLoader([ModelInput(timm_transform(of), sizes(of))], batch_size=8, num_threads=2))
        batches = list(loader.batches(encoded(images)))
        loader.close()
        assert reasons(batches) == expected
        assert rows(batches).keys() == images.keys() - expected.keys()


def test_an_image_that_a_transform_fails_on_costs_that_image() -> None:
    transform = Preprocessing.from_timm(CENTER).transform()
    left = {"passes": 1, "stays": 9}

    def faulty(image: Image.Image) -> torch.Tensor:
        kind = {(30, 20): "passes", (31, 20): "stays", (32, 20): "raises", (33, 20): "torch"}.get(image.size, "")
        if kind == "raises":
            raise ZeroDivisionError("nothing is left")
        if kind == "torch":
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:118] DefaultCPUAllocator: can't allocate memory")
        if left.get(kind, 0):
            left[kind] -= 1
            raise MemoryError
        return transform(image)

    images = {
        name: save(photographs()[0].resize((width, 20)), "PNG")
        for name, width in {"passes": 30, "stays": 31, "raises": 32, "torch": 33, "sound": 34}.items()
    }
    loader = ForOne(ReferenceLoader([ModelInput(faulty)], batch_size=2, num_threads=2))
    batches = list(loader.batches(encoded(images)))
    loader.close()
    assert rows(batches).keys() == {"passes", "sound"}
    assert reasons(batches) == {
        "stays": Reason.TOO_LARGE,
        "torch": Reason.TOO_LARGE,
        "raises": Reason.UNSUPPORTED,
    }


def test_decoders_write_nothing_to_stderr() -> None:
    code = """
import io, sys
from PIL import Image, features
from embedders.bad_images import BadImage
from embedders.images import decode
photo = Image.effect_noise((90, 70), 50)
def save(image, kind, **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return bytearray(out.getvalue())
broken = [save(photo.convert("1"), "TIFF", compression="group4"), save(photo, "TIFF", compression="tiff_deflate")]
for data in broken:
    data[100:140] = bytes(range(40))
broken.append(save(photo.convert("P"), "PNG", transparency=bytes([1, 2])))
tiff = save(photo, "TIFF")
tiff[8 + 4 : 8 + 8] = b"\\xff" * 4
for data in [*broken, tiff]:
    try:
        decode(bytes(data))
    except BadImage:
        pass
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (0, "")


# --- streams ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["dali", "two of dali", "reference"])
def test_one_loader_serves_many_streams(kind: str, make_loader: Callable[..., ForOne]) -> None:
    samples = encoded(stream_of_photographs())[:21]
    loader = make_loader(kind, {"input_size": (3, 64, 64)}, batch_size=8)
    for _ in range(2):
        batches = list(loader.batches(samples))
        assert [len(batch.tags) for batch in batches] == [8, 8, 5]
        assert [tag for batch in batches for tag in batch.tags] == [sample.tag for sample in samples]
    assert list(loader.batches([])) == []


@pytest.mark.parametrize("kind", ["dali", "two of dali", "reference"])
def test_batches_that_are_kept_stay_as_they_are(kind: str, make_loader: Callable[..., ForOne]) -> None:
    samples = encoded(stream_of_photographs())
    loader = make_loader(kind, {"input_size": (3, 64, 64)}, batch_size=4)
    copies: dict[Any, torch.Tensor] = {}
    kept: list[LoadedBatch] = []
    for batch in loader.batches(samples):
        copies |= {tag: image.clone() for tag, image in zip(batch.tags, batch.images, strict=True)}
        kept.append(batch)
    assert all(torch.equal(image, copies[tag]) for tag, image in rows(kept).items())


@pytest.mark.parametrize("kind", ["dali", "two of dali", "reference"])
def test_a_stream_left_early_does_not_leak_into_the_next(kind: str, make_loader: Callable[..., ForOne]) -> None:
    samples = encoded(stream_of_photographs())
    loader = make_loader(kind, {"input_size": (3, 64, 64)}, batch_size=4)
    first = next(iter(loader.batches(samples)))
    assert first.tags == [sample.tag for sample in samples[:4]]
    assert [batch.tags for batch in loader.batches(samples[9:11])] == [[sample.tag for sample in samples[9:11]]]


@pytest.mark.parametrize("kind", ["dali", "two of dali", "reference"])
def test_an_error_of_the_source_is_the_callers(kind: str, make_loader: Callable[..., ForOne]) -> None:
    samples = encoded(stream_of_photographs())

    def broken() -> Iterator[Encoded]:
        yield from samples[:6]
        raise OSError("the shard is gone")

    loader = make_loader(kind, {"input_size": (3, 64, 64)}, batch_size=4)
    with pytest.raises(OSError, match="the shard is gone"):
        list(loader.batches(broken()))
    assert len(rows(list(loader.batches(samples)))) == len(samples)


def bad_to_dali() -> bytes:
    """A PNG with a flipped byte in its pixels, which only a decoder sees."""
    png = bytearray(save(photographs()[0].resize((151, 103)).convert("L"), "PNG", icc_profile=None))
    png[len(png) // 2] ^= 0xFF
    return bytes(png)


@pytest.mark.parametrize("kind", ["dali", "two of dali"])
def test_a_batch_that_dali_refuses_is_recovered(kind: str, make_loader: Callable[..., ForOne]) -> None:
    bad = bad_to_dali()
    assert inspect(bad).dali  # or this tests nothing
    images = dict(itertools.islice(stream_of_photographs().items(), 30))
    names = list(images)
    images = {**{name: images[name] for name in names[:11]}, "bad": bad, **{name: images[name] for name in names[11:]}}
    loader = make_loader(kind, batch_size=3)
    for _ in range(2):
        batches = list(loader.batches(encoded(images)))
        assert reasons(batches) == {"bad": Reason.CORRUPT}
        assert rows(batches).keys() == set(names)
    transform = Preprocessing.from_timm(CENTER).transform()
    for tag, image in rows(batches).items():
        expected = transform(Image.open(io.BytesIO(images[tag])).convert("RGB"))
        assert levels(image, expected, {}).mean() < 0.02


def test_fast_decoding_needs_a_gpu(make_loader: Callable[..., ForOne]) -> None:
    with pytest.raises(ValueError, match="EXACT on the CPU"):
        make_loader("dali", decode=Decode.FAST)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("how", "limit"), [(Decode.EXACT, 0.02), (Decode.FAST, 2.2)])
def test_on_a_gpu(how: Decode, limit: float, dtype: torch.dtype, make_loader: Callable[..., ForOne]) -> None:
    """Thumbnails and drawings with hard edges in the chroma: on photographs nvJPEG is at 0.4 (benchmarks.fidelity)."""
    wild = {name: data for name, (data, reason) in found_in_the_wild().items() if not reason}
    images = stream_of_photographs() | wild | {"bad": bad_to_dali()}
    transform = Preprocessing.from_timm(CENTER).transform()
    batches = list(make_loader("dali", device="cuda", decode=how, dtype=dtype).batches(encoded(images)))
    assert reasons(batches) == {"bad": Reason.CORRUPT}
    differences = []
    for tag, image in rows(batches).items():
        assert image.is_cuda
        assert image.dtype == dtype
        expected = transform(Image.open(io.BytesIO(images[tag])).convert("RGB"))
        differences.append(float(levels(image.cpu(), expected, {}).mean()))
    assert len(differences) == len(images) - 1
    assert np.mean(differences) < limit + (0.1 if dtype == torch.float16 else 0)
