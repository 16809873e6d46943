"""Session: an embedder opened on one worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from embedders.base import ImageEmbedder, ShardBatch
from embedders.webdataset import OpenShard


class Session:
    """An embedder opened on one worker: its model, and all that was loaded or measured. Lives as long as the worker."""

    def __init__(self, embedder: ImageEmbedder, device: str) -> None:
        """Load the model.

        Args:
            embedder: What is opened.
            device: "cuda" or "cpu".
        """
        self.embedder = embedder
        self.device = device
        self.model: Callable[[Any], Any] = embedder.load_embedding_model(device)

    def batches(self, shards: Iterable[OpenShard]) -> Iterator[ShardBatch]:
        """Yield the batches of a stream of shards."""
        return self.embedder.batches(shards, self.device)

    @property
    def decoder(self) -> str:
        """Return what decoded the images, for the records of shards; empty if that is the embedder's own affair."""
        return self.embedder.decoder

    @property
    def computed(self) -> str:
        """Return the model's precision and device, for records: "float16 on a GPU", "float32 on a CPU", "a CPU"."""
        on = "a GPU" if self.device.startswith("cuda") else "a CPU"
        precision = self.embedder.precision_on(self.device)
        return f"{precision} on {on}" if precision else on
