"""An opened shard: the samples of a mapped tar as columns, with their ids and the places of their images.

Everything is a slice of the mapped file. What a sample is stands in `embedders.samples`, how a tar is read in
`embedders.tar`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import itertools
import json
import mmap
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedders.byte_columns import blocks, printable_column, text
from embedders.ids import canonical_id
from embedders.image_headers import ImageHeader, inspect
from embedders.quarantine import Reason
from embedders.samples import (
    NONE_IGNORED,
    Component,
    Ignored,
    KeyDot,
    Sample,
    TarIndex,
    chosen_extensions,
    is_image,
)
from embedders.tar import map_tar, read_tar

READ_AHEAD = 4 << 30
"""Bytes of a shard that are read before its first sample is looked at; the rest as it comes."""
MADV_POPULATE_READ = 22
"""Linux 5.14; before, madvise answers EINVAL and pages come as they are touched."""

_libc = ctypes.CDLL(None, use_errno=True)
_EXTENSION = operator.itemgetter(0)


HEADER = np.dtype([("width", "u4"), ("height", "u4"), ("dali", "u1"), ("metadata", "u1")])
"""An image's header: width and height in pixels (a PNG can claim 2^32 a side), whether DALI decodes the image as Pillow
does, and whether it carries metadata; see `embedders.image_headers.ImageHeader`."""


@dataclass(frozen=True)
class Samples:
    """A shard's n samples as columns, in the order of the tar: what a loader and the account ask of them."""

    ids: pa.LargeStringArray
    """(n,) each sample's json `id_col`, else its key, as text: ids join by value whatever their type."""
    members: pa.LargeBinaryArray
    """(n,) the name of each sample's image in the tar, or of its first member where no image is chosen."""
    places: np.ndarray
    """(n, 2) int64: offset and size of the image in bytes, 0 and 0 where there is none."""
    unusable: dict[int, tuple[Reason, str]]
    """The samples that no loader need look at: no image, several, an empty one, or an id that was there before."""
    headers: np.ndarray | None = None
    """(n,) `HEADER`, if they were read."""
    ignored: Ignored = NONE_IGNORED
    """The members that are part of no sample."""
    doubt: str = ""
    """Why the tar may lack members at its end; see `TarIndex`."""


@dataclass(frozen=True)
class OpenShard:
    """A shard on the local disk, mapped into memory, with its samples."""

    path: str
    data: mmap.mmap
    samples: Samples
    id_col: str
    image_component: str | None = None
    key_dot: KeyDot = "first"

    @property
    def count(self) -> int:
        """The number of samples."""
        return len(self.samples.ids)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """The id of each sample, as Python objects, which take memory: `id_of` and `ids_at` take none."""
        return tuple(self.samples.ids.to_pylist())

    def id_of(self, i: int) -> str:
        """Return the id of a sample."""
        return str(self.samples.ids[i].as_py())

    def ids_at(self, positions: np.ndarray) -> pa.StringArray:
        """Return the ids of some samples, (k,) string, from their positions, (k,) int64."""
        return self.samples.ids.take(pa.array(positions, pa.int64())).cast(pa.string())

    @property
    def unusable(self) -> dict[int, tuple[Reason, str]]:
        """The samples that no loader need look at, and why."""
        return self.samples.unusable

    @functools.cached_property
    def index(self) -> TarIndex:
        """Every sample with all its components."""
        return read_tar(self.data, self.path, self.key_dot)

    @functools.cached_property
    def images(self) -> tuple[Component | None, ...]:
        """The image of each sample: of several the one with the extension `image_component`, None if none is chosen."""
        return tuple(_image(sample, self.image_component) for sample in self.index.samples)

    def member_of(self, i: int) -> str:
        """The name of a sample's image in the tar, or of its first member where no image is chosen."""
        return text(self.samples.members[i].as_py())

    def encoded(self) -> Iterator[tuple[int, np.ndarray, ImageHeader | None]]:
        """Every image worth looking at: its sample, its bytes as a 1-D uint8 view, its header if it was read."""
        headers, places = self.samples.headers, self.samples.places
        for rows in blocks(self.count):
            known = [None] * (rows.stop - rows.start) if headers is None else headers[rows].tolist()
            for i, (offset, size), header in zip(
                itertools.count(rows.start), places[rows].tolist(), known, strict=False
            ):
                if i not in self.unusable:
                    data = np.frombuffer(self.data, np.uint8, size, offset)
                    yield i, data, None if header is None else ImageHeader("", header[0], header[1], *_flags(header))

    def read_ahead(self) -> None:
        """Have the file in memory and mapped, page by page, before a thread that holds the interpreter touches it.

        Without this a cold page costs the thread that feeds the GPU a wait for the disk, and a warm one still a fault.

        Raises:
            OSError: A page cannot be read; touching it later would end the process.
        """
        size = min(len(self.data), READ_AHEAD)
        start = np.frombuffer(self.data, np.uint8, 1).ctypes.data
        # ctypes lets go of the interpreter for the time of the call; mmap.madvise does not.
        if _libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), MADV_POPULATE_READ):
            number = ctypes.get_errno()
            if number in (errno.EFAULT, errno.EIO):
                raise OSError(number, f"{self.path}: some of its bytes cannot be read")

    def bytes_of(self, component: Component) -> np.ndarray:
        """The component's bytes as a 1-D uint8 view of the mapped file, not copied."""
        return np.frombuffer(self.data, np.uint8, component.size, component.offset)


def _flags(header: tuple[int, ...]) -> tuple[bool, str, bool]:
    return bool(header[2]), "", bool(header[3])


def _image(sample: Sample, image_component: str | None) -> Component | None:
    images = sample.images(image_component)
    return images[0] if len(images) == 1 else None


def describe(
    data: mmap.mmap, index: TarIndex, id_col: str, image_component: str | None = None, *, headers: bool = False
) -> Samples:
    """Return the samples of a mapped tar as columns.

    Args:
        data: The tar.
        index: Its index.
        id_col: The key of the samples' json that holds their ids.
        image_component: As `open_shard`.
        headers: Whether to read the images' own headers too.
    """
    ids = _ids(index, data, id_col)
    images = _image_rows(index, image_component)
    shown = np.where(images >= 0, images, index.starts[:-1])
    members = index.components.names.take(pa.array(shown))
    places = np.stack([index.components.offsets[shown], index.components.sizes[shown]], axis=1)
    places[images < 0] = 0
    unusable = _unusable(index, ids, images, places, image_component)
    read = _headers(data, places) if headers else None
    return Samples(ids, members, places, unusable, read, index.ignored, index.doubt)


def _headers(data: mmap.mmap, places: np.ndarray) -> np.ndarray:
    """The headers of the images at some places, (n,) `HEADER`."""
    read = np.zeros(len(places), HEADER)
    for rows in blocks(len(places)):
        seen = (inspect(np.frombuffer(data, np.uint8, size, offset)) for offset, size in places[rows].tolist())
        read[rows] = [(h.width, h.height, h.dali, h.metadata) for h in seen]
    return read


def _image_rows(index: TarIndex, image_component: str | None) -> np.ndarray:
    """The row of each sample's image among the components, (n,) int64, -1 where none is chosen; see `Sample.images`."""
    rows = np.full(len(index.keys), -1)
    open_to_choice = np.ones(len(rows), bool)
    choices = [None] if image_component is None else chosen_extensions(image_component)
    for choice in choices:
        wanted = [is_image(e) if choice is None else e.lower() == choice for e in index.extensions]
        found = _rows_with(index, wanted)
        samples = np.searchsorted(index.starts, found, side="right") - 1
        found, samples = found[open_to_choice[samples]], samples[open_to_choice[samples]]
        counts = np.bincount(samples, minlength=len(rows))
        rows[samples] = found
        rows[counts > 1] = -1
        open_to_choice &= counts == 0
    return rows


def _rows_with(index: TarIndex, wanted: Sequence[bool]) -> np.ndarray:
    """The rows of the components whose extensions are wanted, ascending."""
    return np.flatnonzero(np.array([*wanted, False])[index.extension_of])


def _ids(index: TarIndex, data: mmap.mmap, id_col: str) -> pa.LargeStringArray:
    """The id of each sample: its json's `id_col`, else its key."""
    keys = printable_column(index.keys)
    found = _rows_with(index, [extension.lower() == "json" for extension in index.extensions])
    samples, first = np.unique(np.searchsorted(index.starts, found, side="right") - 1, return_index=True)
    if not len(samples):
        return keys
    rows = np.full(len(keys), -1)
    rows[samples] = found[first]
    named, ids, any_json = id_col.encode("utf-8", "surrogatepass"), [], False
    for some in blocks(len(keys)):
        at = rows[some]
        places = zip(index.components.offsets[at].tolist(), index.components.sizes[at].tolist(), strict=True)
        values = [
            _json_id(data[offset : offset + size], id_col, named) if row >= 0 else None
            for row, (offset, size) in zip(at.tolist(), places, strict=True)
        ]
        column = pa.array(values, pa.large_string())
        any_json |= column.null_count < len(column)
        ids.append(pc.coalesce(column, keys[some]))
    return pa.concat_arrays(ids) if any_json else keys


def _json_id(encoded: bytes, id_col: str, named: bytes) -> str | None:
    """The id in a sample's json as text, None where there is none.

    What holds the name neither as it is nor escaped, and is not UTF-16 or 32 (which are full of zero bytes), need not
    be parsed.
    """
    if named not in encoded and b"\\" not in encoded and b"\0" not in encoded:
        return None
    value = _json_object(encoded).get(id_col)
    return None if value is None else canonical_id(value)


def _unusable(
    index: TarIndex, ids: pa.LargeStringArray, images: np.ndarray, places: np.ndarray, image_component: str | None
) -> dict[int, tuple[Reason, str]]:
    first = _first_with_id(ids, index.keys)
    repeated = _repeat_a_member(index)
    suspects = (first >= 0) | repeated | (places == 0).any(axis=1)
    found: dict[int, tuple[Reason, str]] = {}
    for i in np.flatnonzero(suspects).tolist():
        sample = index.samples[i]
        if first[i] >= 0:
            earlier = index.samples[first[i]].components[0].name
            found[i] = Reason.DUPLICATE_ID, f"{earlier} has the id {ids[i].as_py()} too"
        elif (name := twice(sample)) is not None:
            found[i] = Reason.AMBIGUOUS_IMAGE, f"{name} is in the tar twice; repack it with one of the two"
        elif images[i] < 0:
            found[i] = _no_image(sample, image_component)
        elif places[i, 0] == 0:
            name = text(index.components.names[int(images[i])].as_py())
            found[i] = Reason.MISSING_IMAGE, f"{name} is a link to what the tar does not hold"
        else:
            found[i] = Reason.EMPTY, "0 bytes"
    return found


def _first_with_id(ids: pa.LargeStringArray, keys: pa.LargeBinaryArray) -> np.ndarray:
    """For each sample the earlier one that has its id, (n,) int64, -1 where none has; keys are all different."""
    before = np.full(len(ids), -1)
    if not ids.cast(keys.type).equals(keys) and pc.count_distinct(ids).as_py() < len(ids):
        codes = ids.dictionary_encode().indices.to_numpy()
        _, first, which = np.unique(codes, return_index=True, return_inverse=True)
        again = first[which] < np.arange(len(ids))
        before[again] = first[which][again]
    return before


def _repeat_a_member(index: TarIndex) -> np.ndarray:
    """Whether each sample has two components of one extension, (n,) bool."""
    repeating = np.zeros(len(index.keys), bool)
    pairs = np.sort(index.sample_of * len(index.extensions) + index.extension_of)
    twins = pairs[1:][pairs[1:] == pairs[:-1]]
    repeating[twins // max(len(index.extensions), 1)] = True
    return repeating


def twice(sample: Sample) -> str | None:
    """The name of a member that a sample has twice."""
    if len({*map(_EXTENSION, sample.components)}) == len(sample.components):
        return None
    extensions = [component.extension for component in sample.components]
    return next(c.name for i, c in enumerate(sample.components) if c.extension in extensions[:i])


def _no_image(sample: Sample, image_component: str | None) -> tuple[Reason, str]:
    """Why no image of a sample is chosen, and what would choose one."""
    names = ", ".join(component.extension for component in sample.components)
    images = sample.images(image_component)
    if not images:
        return Reason.MISSING_IMAGE, f"only {names}"
    dotted = any("." in image.extension for image in images)
    other = ", or give --key-dot last if they are different samples" if dotted else ""
    return Reason.AMBIGUOUS_IMAGE, f"several images among {names}; choose with --image-component{other}"


def open_shard(
    path: str | os.PathLike[str],
    id_col: str = "key",
    index: TarIndex | None = None,
    image_component: str | None = None,
    key_dot: KeyDot = "first",
) -> OpenShard:
    """Map a local tar, index it unless that is done, and read its samples' ids.

    Args:
        path: The tar.
        id_col: The key of the samples' json that holds their ids.
        index: Its index, if it was read.
        image_component: The extension of the image to take where samples have several, such as `left.jpg`; several
            with commas between them, the first that a sample has.
        key_dot: Which dot of a file name ends the sample's key.

    Raises:
        MalformedShard: It is not a tar or is damaged.

    Example:
        >>> shard = open_shard("00000.tar")
        >>> shard.id_of(0), len(shard.bytes_of(shard.images[0]))
        ('000000000', 55123)
    """
    data = map_tar(path)
    index = read_tar(data, os.fspath(path), key_dot) if index is None else index
    samples = describe(data, index, id_col, image_component)
    shard = OpenShard(os.fspath(path), data, samples, id_col, image_component, key_dot)
    vars(shard)["index"] = index  # it need not be read again
    return shard


def sample_json(sample: Sample, data: mmap.mmap) -> dict[str, Any]:
    """A sample's json object; empty where there is none or it does not parse, since that is not the image's fault."""
    component = sample.json()
    return {} if component is None else _json_object(data[component.offset : component.offset + component.size])


def _json_object(encoded: bytes) -> dict[str, Any]:
    try:
        value = json.loads(encoded)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
