"""The demo's photographs and weights, made once a session."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from flows.demo_data import build_dataset, trained_weights

CHAOS_TABLE = pytest.StashKey[list[tuple[str, int, int, int, float]]]()
"""What tests of faults have measured: fault, times tried, samples lost, samples done twice, seconds to recover."""


def pytest_configure(config: pytest.Config) -> None:
    config.stash[CHAOS_TABLE] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Print what the faults have cost."""
    if not (rows := config.stash[CHAOS_TABLE]):
        return
    table = Table("fault", "times tried", "samples lost", "samples done twice", "seconds to recover")
    for fault, *counts, seconds in rows:
        table.add_row(fault, *map(str, counts), f"{seconds:.0f}")
    terminalreporter.ensure_newline()
    Console(width=120).print(table)


@pytest.fixture(scope="session")
def demo_dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 shards of 64 photographs, two of them broken; not to be changed."""
    return build_dataset(tmp_path_factory.mktemp("demo") / "demo-data")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained ImageNet weights of tf_efficientnet_lite0."""
    return trained_weights(tmp_path_factory.mktemp("weights") / "tf_efficientnet_lite0.safetensors")
