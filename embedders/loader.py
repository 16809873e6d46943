"""What passes between a shard and a model: encoded samples in, batches of preprocessed images out.

A loader outlives shards: it takes one endless stream of samples, whatever shards they come from, and every
sample comes back exactly once per model, either as a row of a batch or as a rejection.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from embedders.quarantine import Rejected

if TYPE_CHECKING:
    import numpy as np
    import torch

    from embedders.image_headers import ImageHeader
    from embedders.preprocess import Preprocessing, Transform


class Encoded(NamedTuple):
    """One encoded image: `data` is a read-only 1-D uint8 view of its bytes, `tag` comes back with its row.

    `header` is there if somebody has read it before; a loader that needs it reads it otherwise.
    """

    tag: Hashable
    data: np.ndarray
    header: ImageHeader | None = None


@dataclass(frozen=True)
class ModelInput:
    """What one model, or several alike, want of each decoded image."""

    transform: Transform
    """From a PIL image to (channels, height, width), float: the definition of what is right."""
    preprocessing: Preprocessing | None = None
    """The same as a value, which DALI needs. The reference loader only uses it to refuse images whose resize would
    explode or leave nothing, so for a transform that has no such form give its `embedders.preprocess.sizes`."""
    dtype: torch.dtype | None = None
    """float32 if None, or float16."""


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
    """Decode each sample once and preprocess it for one or several inputs.

    Built once per worker; `batches` may be called again and again, one at a time.
    """

    def batches(self, samples: Iterable[Encoded]) -> Iterator[tuple[LoadedBatch, ...]]:
        """Yield one batch per input, of the same samples and at most the loader's batch size.

        Every sample is in the tags or the rejections of each of them. An image that one input rejects, such as one too
        thin for its resize, may be a row of another, so the batches of a tuple may differ in their rows.
        """
        ...

    def close(self) -> None:
        """Free threads and device memory."""
        ...
