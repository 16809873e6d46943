"""An embedder whose sessions measure something, and each process something else."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from embedders import ImageEmbedder
from embedders.decision import Decision
from embedders.session import Session
from embedders.webdataset import OpenShard, open_shard

MEASURED = "MEASURED_BY_THE_TEST"
"""The environment variable that says what a process measures: a decoder and a batch size."""


class MeasuringSession(Session):
    """Decides by what its process would measure; without a decision, it works by that all the same."""

    def decide(self, shard: OpenShard) -> Decision | None:
        assert shard.count
        self.decision = self.decision or measured_here()
        return self.decision

    @property
    def decoder(self) -> str:
        return (self.decision or measured_here()).decoder


class Measuring(ImageEmbedder):
    """The vector of an image is its size in bytes. Notes each model that is loaded in a file named by its process."""

    execution_parameters = ImageEmbedder.execution_parameters | {"notes"}

    def __init__(self, notes: str) -> None:
        super().__init__()
        self.notes = notes

    def open(self, device: str, images: int = 0, cores: int = 0, decision: Decision | None = None) -> Session:
        session = MeasuringSession(self, device, images, cores, decision)
        _ = session.model
        return session

    def load_dataset_shard(self, tar_path: str) -> Any:
        shard = open_shard(tar_path)
        yield [s.components[0].size for s in shard.index.samples], [{"key": s.key} for s in shard.index.samples]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        with Path(self.notes, str(os.getpid())).open("a") as file:
            file.write("loaded\n")
        return lambda sizes: np.array(sizes, float)[:, None]


def measured_here() -> Decision:
    """What this process measures."""
    decoder, size = os.environ[MEASURED].split()
    return Decision(decoder, int(size))


def loaded(notes: str | os.PathLike[str]) -> list[int]:
    """How many models each process has loaded, ascending."""
    return sorted(len(file.read_text().splitlines()) for file in Path(notes).iterdir())
