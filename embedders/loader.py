"""What passes between a shard and a model: encoded samples in, batches of preprocessed images out.

A loader outlives shards: it takes one endless stream of samples, whatever shards they come from, and every
sample comes back exactly once, either as a row of a batch or as a rejection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from embedders.image_headers import ImageHeader
from embedders.quarantine import Rejected


class Encoded(NamedTuple):
    """One encoded image: `data` is a read-only 1-D uint8 view of its bytes, `tag` comes back with its row.

    `header` is there if somebody has read it before; a loader that needs it reads it otherwise.
    """

    tag: Hashable
    data: np.ndarray
    header: ImageHeader | None = None


@dataclass(frozen=True)
class LoadedBatch:
    """`images` is (n, channels, height, width), normalised, on the loader's device, and row i belongs to `tags[i]`.

    The memory of `images` is the loader's: it is valid until the next batch is asked for, for work queued on the
    current CUDA stream of the asking thread too. n is at least 1 unless the batch only carries rejections.
    """

    images: torch.Tensor
    tags: list[Hashable]
    rejected: list[Rejected] = field(default_factory=list)


class Loader(Protocol):
    """Decodes and preprocesses samples. Built once a worker; `batches` may be called again and again, one at a time."""

    def batches(self, samples: Iterable[Encoded]) -> Iterator[LoadedBatch]:
        """Yield batches of at most the loader's batch size; every sample is in one batch's tags or rejections."""
        ...

    def close(self) -> None:
        """Free threads and device memory."""
        ...
