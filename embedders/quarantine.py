"""The fixed list of reasons why a sample has no vector, and a sample with its reason."""

from __future__ import annotations

import enum
from collections.abc import Hashable
from typing import NamedTuple


class Reason(enum.StrEnum):
    """Why a sample has no embedding, or no metadata. The list is short and fixed, because users filter by it."""

    EMPTY = "empty"
    """The image member has no bytes."""
    MISSING_IMAGE = "missing_image"
    """The sample has no image member."""
    AMBIGUOUS_IMAGE = "ambiguous_image"
    """The sample has several image members, and nothing says which one to embed."""
    NOT_AN_IMAGE = "not_an_image"
    """The bytes are of no image format."""
    TRUNCATED = "truncated"
    """The image ends before its last pixel."""
    CORRUPT = "corrupt"
    """The image's header or data contradicts its format."""
    UNSUPPORTED = "unsupported"
    """An image format that neither DALI nor Pillow reads here."""
    TOO_LARGE = "too_large"
    """The image has more pixels than the limit or than fit in memory."""
    DUPLICATE_ID = "duplicate_id"
    """An earlier sample or metadata row of the shard has the same id."""
    NOT_EMBEDDED = "not_embedded"
    """A custom embedder did not return a vector for the sample, or the model gave NaN or infinity."""
    NO_IMAGE = "no_image"
    """No sample of the shard has the metadata row's id."""
    NO_METADATA_ROW = "no_metadata_row"
    """The sample is embedded, but no metadata row has its id."""


class Rejected(NamedTuple):
    """A sample whose image could not be decoded; `detail` is one line for the user."""

    tag: Hashable
    reason: Reason
    detail: str


class QuarantinedSample(NamedTuple):
    """A sample without an embedding, and the reason."""

    id: str
    member: str
    reason: str
    detail: str
