"""Several sessions that share the reading of shards, and their decoding where that is exact."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from embedders.base import ImageEmbedder, ShardBatch
from embedders.session import Session
from embedders.webdataset import OpenShard


def can_share(one: ImageEmbedder, other: ImageEmbedder) -> bool:
    """Return whether two embedders can work in one pass."""
    return one is other


def open_together(embedders: Sequence[ImageEmbedder], device: str, images: int = 0) -> list[Session]:
    """Open embedders that work in one pass."""
    return [embedder.open(device, images) for embedder in embedders]


def batches_for(sessions: Sequence[Session], shards: Iterable[OpenShard]) -> Iterator[tuple[ShardBatch, ...]]:
    """Yield one batch per session, of the same samples."""
    (session,) = sessions
    return ((batch,) for batch in session.batches(shards))
