"""Session: an embedder opened on one worker, with everything that was loaded or measured there."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from embedders.base import ImageEmbedder, ShardBatch
    from embedders.webdataset import OpenShard


class Session:
    """An embedder opened on one worker: its model, and all that was loaded or measured.

    It lives as long as the worker, because loading a model and building a decoder take seconds. `embedder.open(device)`
    makes one.
    """

    def __init__(self, embedder: ImageEmbedder, device: str, images: int = 0) -> None:
        """Prepare to load `embedder` on `device`; the model is loaded when `model` is first asked for.

        Args:
            embedder: The parameters. They are not changed.
            device: "cuda" or "cpu".
            images: How many images this worker will probably see; 0 if unknown.
        """
        self.embedder = embedder
        self.device = device
        self.images = images

    @functools.cached_property
    def model(self) -> Callable[[Any], Any]:
        """The loaded model: a callable from a batch to one array of shape (n, ...) or a mapping of named ones."""
        return self.embedder.load_embedding_model(self.device)

    def batches(self, shards: Iterable[OpenShard]) -> Iterator[ShardBatch]:
        """Yield the batches of a stream of shards, ready for `model`."""
        yield from self.embedder.batches(shards, self.device)

    @property
    def decoder(self) -> str:
        """What decoded the images: "exact", "fast" or "reference"; empty where that is the embedder's own affair."""
        return self.embedder.decoder

    def close(self) -> None:
        """Free the model and what else was loaded. The session is of no use afterwards."""
        vars(self).pop("model", None)
