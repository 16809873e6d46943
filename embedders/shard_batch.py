"""A batch of images for the model, and which sample each of its rows belongs to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embedders.loader import Encoded, LoadedBatch
from embedders.quarantine import Rejected
from embedders.webdataset import OpenShard


class Row(NamedTuple):
    """Where a vector belongs."""

    shard: int
    """Number of the shard in the stream."""
    sample: int
    """Number of the sample in that shard."""


@dataclass(frozen=True)
class ShardBatch:
    """A batch for the model."""

    images: Any
    """Whatever the model takes."""
    rows: Sequence[Row]
    """Where the value of each image belongs."""
    rejected: Sequence[Rejected] = field(default_factory=tuple)
    """Samples that have no image, each with its `Row` as the tag."""


def encoded_images(shards: Iterable[OpenShard]) -> Iterator[Encoded]:
    """Yield every image of a stream of shards that is worth looking at, tagged with its `Row`."""
    for number, shard in enumerate(shards):
        for i, data, header in shard.encoded():
            yield Encoded(Row(number, i), data, header)


def shard_batch(batch: LoadedBatch) -> ShardBatch:
    """Return a batch of the images that `encoded_images` gave."""
    return ShardBatch(batch.images, batch.tags, batch.rejected)  # type: ignore[arg-type]
