"""Preprocessing against timm itself: every pretrained tag, and the geometry of real transforms on real images."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import sys
from collections import Counter
from typing import Any

import numpy as np
import pytest
import timm
from PIL import Image
from timm.data.config import resolve_data_config

from embedders.preprocess import CropMode, Geometry, Interpolation, NotConvertible, Preprocessing, timm_transform

BASE: dict[str, Any] = {
    "input_size": (3, 224, 224),
    "interpolation": "bicubic",
    "mean": (0.485, 0.456, 0.406),
    "std": (0.229, 0.224, 0.225),
    "crop_pct": 0.875,
    "crop_mode": "center",
}

SIZES = [(375, 500), (500, 375), (301, 300), (224, 224), (17, 23), (61, 13), (90, 700), (700, 90)]
"""(height, width): landscape, portrait, nearly square, exact, tiny, extreme."""


@functools.cache
def pretrained() -> dict[str, Preprocessing | NotConvertible]:
    values: dict[str, Preprocessing | NotConvertible] = {}
    for tag in timm.list_models(pretrained=True):
        cfg = timm.get_pretrained_cfg(tag)
        assert cfg is not None
        config = resolve_data_config(pretrained_cfg=cfg.to_dict())
        try:
            values[tag] = Preprocessing.from_timm(config)
        except NotConvertible as reason:
            values[tag] = reason
    return values


def test_every_pretrained_tag_converts_or_says_why_not() -> None:
    refused = {tag: str(value) for tag, value in pretrained().items() if isinstance(value, NotConvertible)}
    assert len(pretrained()) > 1500
    assert len(refused) <= 6, refused
    assert all(reason and "\n" not in reason for reason in refused.values())


def test_a_value_holds_all_that_timm_is_told() -> None:
    for value in set(pretrained().values()):
        assert isinstance(value, Preprocessing)
        plain = json.loads(json.dumps(value.to_json()))
        assert Preprocessing.from_json(plain) == value
        assert str(timm_transform(value.to_timm())) == str(value.transform())


def distinct_geometries() -> list[Preprocessing]:
    """One value for every way the pretrained tags place their pixels; nearest is quick and moves nothing."""
    values = [value for value in pretrained().values() if isinstance(value, Preprocessing)]
    values += [Preprocessing.from_timm({**BASE, **changes}) for changes in ODD_CONFIGS]
    kinds = {(v.crop_mode, v.crop_pct, v.height, v.width): v for v in values}
    counts = Counter(v.crop_mode for v in kinds.values())
    assert set(counts) == set(CropMode)
    return list(kinds.values())


ODD_CONFIGS: list[dict[str, Any]] = [
    {"crop_pct": 1.1},
    {"crop_pct": 1.3, "crop_mode": "squash"},
    {"input_size": (3, 192, 257)},
    {"input_size": (3, 257, 192), "crop_mode": "border", "crop_pct": 0.9},
    {"input_size": (3, 257, 192), "crop_mode": "squash"},
]


def test_geometry_is_that_of_the_real_transform() -> None:
    for value in distinct_geometries():
        resize, crop = timm_transform(value.to_timm() | {"interpolation": "nearest"}).transforms[:2]  # type: ignore[attr-defined]
        for height, width in SIZES:
            geometry = value.geometry(height, width)
            resized = resize(Image.new("L", (width, height)))
            assert (resized.height, resized.width) == geometry[:2], (value, height, width)
            if resized.height * resized.width < 1_000_000:
                assert_crop(crop(coordinates(*geometry[:2])), geometry, value)


@functools.lru_cache(maxsize=64)
def coordinates(height: int, width: int) -> Image.Image:
    """An image whose every pixel tells its row and column: the low bytes, and the high bits packed into the third."""
    y, x = np.mgrid[:height, :width]
    pixels = np.stack([y % 256, x % 256, (y // 256) * 16 + x // 256], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def assert_crop(image: Image.Image, geometry: Geometry, value: Preprocessing) -> None:
    pixels = np.asarray(image).astype(int)
    assert pixels.shape[:2] == (value.height, value.width)
    y, x = pixels[..., 0] + pixels[..., 2] // 16 * 256, pixels[..., 1] + pixels[..., 2] % 16 * 256
    top, left = max(-geometry.crop_top, 0), max(-geometry.crop_left, 0)
    bottom = min(value.height, geometry.resize_h - geometry.crop_top)
    right = min(value.width, geometry.resize_w - geometry.crop_left)
    assert (y[top, left], x[top, left]) == (geometry.crop_top + top, geometry.crop_left + left)
    assert (y[bottom - 1, right - 1], x[bottom - 1, right - 1]) == (
        geometry.crop_top + bottom - 1,
        geometry.crop_left + right - 1,
    )
    if (top, left, bottom, right) != (0, 0, value.height, value.width):
        assert value.pads
        corner = pixels[0, 0] if top or left else pixels[-1, -1]
        assert tuple(corner) == value.fill


def test_many_geometries_at_once_are_the_single_ones() -> None:
    value = Preprocessing.from_timm(BASE)
    heights, widths = (np.array(sizes) for sizes in zip(*SIZES, strict=True))
    many = value.geometries(heights, widths)
    assert [Geometry(*(int(n) for n in row)) for row in zip(*many, strict=True)] == [
        value.geometry(height, width) for height, width in SIZES
    ]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"interpolation": "nearest"}, "nearest"),
        ({"interpolation": "random"}, "random"),
        ({"crop_mode": "diagonal"}, "diagonal"),
        ({"input_size": (4, 224, 224)}, "4 channels"),
        ({"input_size": (1, 224, 224)}, "3 entries for 1 channels"),
        ({"mean": (0.5,)}, "mean has 1 entries"),
        ({"std": (0.5, 0.0, 0.5)}, "std is zero"),
        ({"crop_border_pixels": 2}, "crop_border_pixels"),
        ({"naflex": True}, "naflex"),
        ({"crop_pct": 500.0}, "leaves nothing"),
    ],
)
def test_what_cannot_be_expressed_is_refused_in_one_line(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(NotConvertible, match=reason) as raised:
        Preprocessing.from_timm({**BASE, **changes})
    assert "\n" not in str(raised.value)


def test_defaults_are_those_of_create_transform() -> None:
    assert str(timm_transform({})) == str(timm_transform(Preprocessing.from_timm({}).to_timm()))
    grey = Preprocessing.from_timm({**BASE, "input_size": (1, 96, 96), "mean": (0.5,), "std": (0.25,)})
    assert (grey.mode, grey.fill, grey.channels) == ("L", (0,), 1)
    assert grey.transform()(Image.new("L", (30, 40))).shape == (1, 96, 96)


def test_values_are_equal_by_what_they_mean() -> None:
    listed = Preprocessing.from_timm({**BASE, "mean": list(BASE["mean"]), "crop_mode": None})
    assert listed == Preprocessing.from_timm(BASE)
    assert hash(listed) == hash(Preprocessing.from_timm(BASE))
    assert dataclasses.replace(listed, interpolation=Interpolation.LANCZOS) != listed


def test_importing_it_is_cheap() -> None:
    code = "import sys, embedders.preprocess; print([m for m in ('torch', 'timm', 'nvidia.dali') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
