"""What passes between a shard and a model: encoded samples in, batches of preprocessed images out.

A loader outlives shards: it takes one endless stream of samples, whatever shards they come from, and every
sample comes back exactly once, either as a row of a batch or as a rejection.
"""

from __future__ import annotations

import enum
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import numpy as np
    import torch

    from embedders.images import ImageHeader


class Reason(enum.StrEnum):
    """Why a sample has no embedding, or no metadata. The list is short and fixed: people filter by it."""

    EMPTY = "empty"
    """The image member has no bytes."""
    MISSING_IMAGE = "missing_image"
    """The sample has no image member."""
    AMBIGUOUS_IMAGE = "ambiguous_image"
    """The sample has several image members and none was chosen."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are not those of any image format."""
    TRUNCATED = "truncated"
    """The image ends before its last pixel."""
    CORRUPT = "corrupt"
    """The image's header or data contradicts its format."""
    UNSUPPORTED = "unsupported"
    """An image format that neither DALI nor Pillow reads here."""
    TOO_LARGE = "too_large"
    """More pixels than the limit, by its header, or than there is memory for."""
    DUPLICATE_ID = "duplicate_id"
    """An earlier sample, or metadata row, of the shard has the same id."""
    NOT_EMBEDDED = "not_embedded"
    """A custom embedder did not return a vector for the sample, or the model gave NaN or infinity."""
    NO_IMAGE = "no_image"
    """A metadata row whose id no sample of the shard has."""
    NO_METADATA_ROW = "no_metadata_row"
    """A sample that is embedded, but whose id no metadata row has."""


class Encoded(NamedTuple):
    """One encoded image: `data` is a read-only 1-D uint8 view of its bytes, `tag` comes back with its row.

    `header` is there if somebody has read it before; a loader that needs it reads it otherwise.
    """

    tag: Hashable
    data: np.ndarray
    header: ImageHeader | None = None


class Rejected(NamedTuple):
    """A sample that could not be turned into an image; `detail` is one line for a person."""

    tag: Hashable
    reason: Reason
    detail: str


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
