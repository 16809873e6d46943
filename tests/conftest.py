"""The demo's photographs and weights, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.demo_data import build_dataset, trained_weights


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 shards of 64 photographs, two of them broken; not to be changed."""
    return build_dataset(tmp_path_factory.mktemp("demo") / "demo-data")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained ImageNet weights of tf_efficientnet_lite0."""
    return trained_weights(tmp_path_factory.mktemp("weights") / "tf_efficientnet_lite0.safetensors")
