"""Why a sample has no vector: the fixed list of reasons, and the sample with its reason."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    pass


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


class Rejected(NamedTuple):
    """A sample that could not be turned into an image; `detail` is one line for a person."""

    tag: Hashable
    reason: Reason
    detail: str


class QuarantinedSample(NamedTuple):
    """A sample that got no embedding, and why."""

    id: str
    member: str
    reason: str
    detail: str
