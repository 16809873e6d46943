"""Session: an embedder opened on one worker, with everything that was loaded or measured there."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from embedders.decision import Decision
from embedders.shard_batch import ShardBatch
from embedders.webdataset import OpenShard


class Embeds(Protocol):
    """What a session uses of an embedder; `embedders.base.ImageEmbedder` has it all."""

    image_embedding_column: str
    extra_columns: tuple[str, ...]

    @property
    def layers(self) -> tuple[str, ...]:
        """The names of the layers that it makes."""

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        """Load the model on a device."""

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        """Yield the batches of a stream of shards."""

    def not_finite(self, device: str) -> str:
        """Return why a sample whose vector holds NaN or infinity is quarantined."""

    def precision_on(self, device: str) -> str:
        """Return what the model computes in; "" if only the embedder knows."""


class Session:
    """An embedder opened on one worker: its model, and all that was loaded or measured.

    It lives as long as the worker, because loading a model and building a decoder take seconds. `embedder.open(device)`
    makes one.
    """

    def __init__(
        self, embedder: Embeds, device: str, images: int = 0, cores: int = 0, decision: Decision | None = None
    ) -> None:
        """Prepare to load `embedder` on `device`; the model is loaded when `model` is first asked for.

        Args:
            embedder: The parameters. They are not changed.
            device: "cuda" or "cpu".
            images: How many images this worker will probably see; 0 if unknown.
            cores: How many processor cores this worker has for itself; 0 for all that the process may use.
            decision: What the run has decided; None where this session may decide for itself.
        """
        self.embedder = embedder
        self.device = device
        self.images = images
        self.cores = cores or len(os.sched_getaffinity(0))
        self.decision = decision

    @functools.cached_property
    def model(self) -> Callable[[Any], Any]:
        """The loaded model: a callable from a batch to one array of shape (n, ...) or a mapping of named ones."""
        return self.embedder.load_embedding_model(self.device)

    def batches(self, shards: Iterable[OpenShard]) -> Iterator[ShardBatch]:
        """Yield the batches of a stream of shards, ready for `model`."""
        yield from self.embedder.batches(shards, self.device)

    def decide(self, shard: OpenShard) -> Decision | None:
        """Decide what has to be measured, by the images of a shard, and keep to it.

        Called before the first batch, at most once in a run: what one session decides is given to the others.

        Returns:
            The decision; None if nothing has to be measured, as with most custom embedders.
        """
        return self.decision

    @property
    def batch_size(self) -> int:
        """Images of a full batch; 0 if only the embedder knows."""
        return self.decision.batch_size if self.decision else 0

    @property
    def decoder(self) -> str:
        """What decoded the images: "exact", "fast" or "reference"; "" if only the embedder knows."""
        return ""

    @property
    def computed(self) -> str:
        """The model's precision and device, for records: "float16 on a GPU", "float32 on a CPU", "a CPU"."""
        on = "a GPU" if self.device.startswith("cuda") else "a CPU"
        precision = self.embedder.precision_on(self.device)
        return f"{precision} on {on}" if precision else on

    def close(self) -> None:
        """Free the model and what else was loaded. The session is of no use afterwards."""
        vars(self).pop("model", None)
