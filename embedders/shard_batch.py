"""A batch of images for the model, and which sample each of its rows belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from embedders.quarantine import Rejected


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
