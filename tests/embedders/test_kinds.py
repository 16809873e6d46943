"""Every kind of image a web crawl holds, whole and damaged, through both loaders with an exact account."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedders.dali_loader import DaliLoader
from embedders.loader import Encoded, LoadedBatch, Loader, ModelInput
from embedders.preprocess import Preprocessing
from embedders.quarantine import Reason
from embedders.reference_loader import ReferenceLoader
from tests.kinds import damaged, flipped, photograph, saved, whole

CONFIG = {
    "input_size": (3, 96, 96),
    "interpolation": "bicubic",
    "mean": (0.5, 0.5, 0.5),
    "std": (0.5, 0.5, 0.5),
    "crop_pct": 0.875,
    "crop_mode": "center",
}


def loaders() -> list[tuple[str, Callable[[], Loader]]]:
    preprocessing = Preprocessing.from_timm(CONFIG)
    inputs = [ModelInput(preprocessing.transform(), preprocessing)]
    return [
        ("dali", lambda: DaliLoader(inputs, batch_size=16, num_threads=2)),
        ("reference", lambda: ReferenceLoader(inputs, batch_size=16, num_threads=2)),
    ]


@pytest.fixture(params=[name for name, _ in loaders()])
def loader(request: pytest.FixtureRequest) -> Iterator[Loader]:
    made = dict(loaders())[request.param]()
    yield made
    made.close()


def through(loader: Loader, images: dict[str, bytes]) -> tuple[dict[str, torch.Tensor], dict[str, Reason]]:
    """What came of each image; every one must come back exactly once."""
    samples = [Encoded(name, np.frombuffer(data, np.uint8)) for name, data in images.items()]
    batches: list[LoadedBatch] = [batch for (batch,) in loader.batches(samples)]
    rows: dict[Any, torch.Tensor] = {}
    rejected: dict[Any, Reason] = {}
    for batch in batches:
        assert len(batch.images) == len(batch.tags)
        rows.update(zip(batch.tags, batch.images.clone(), strict=True))
        rejected.update({r.tag: r.reason for r in batch.rejected})
        assert all(r.detail and "\n" not in r.detail for r in batch.rejected)
    assert sum(len(b.tags) + len(b.rejected) for b in batches) == len(images)
    assert sorted([*rows, *rejected]) == sorted(images)
    return rows, rejected


def test_each_kind_gives_what_pillow_gives(loader: Loader) -> None:
    images = {name: make() for name, make in whole().items()}
    rows, rejected = through(loader, images)
    assert not rejected
    transform: Any = Preprocessing.from_timm(CONFIG).transform()
    for name, data in images.items():
        expected = transform(Image.open(io.BytesIO(data)).convert("RGB"))
        levels = (rows[name] - expected).abs().mean() * 127.5
        assert levels < 0.05, f"{name}: {levels:.3f} of 255"


def test_each_damage_is_rejected_for_a_reason(loader: Loader) -> None:
    cases = damaged()
    assert len(cases) >= 40
    rows, rejected = through(loader, {name: data for name, (data, _) in cases.items()})
    assert not rows
    wrong = {name: rejected[name] for name, (_, reasons) in cases.items() if rejected[name] not in reasons}
    assert not wrong


def test_flipped_bytes_lose_no_sample(loader: Loader) -> None:
    good = saved(photograph(), "JPEG")
    images = {}
    for number, (name, data) in enumerate(flipped().items()):
        images[name] = data
        images[f"good {number}"] = good
    rows, _ = through(loader, images)
    assert all(f"good {number}" in rows for number in range(80))
