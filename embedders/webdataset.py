"""An opened shard: the samples of a mapped tar as columns, with their ids and the places of their images.

Everything is a slice of the mapped file. What a sample is stands in `embedders.samples`, how a tar is read in
`embedders.tar`.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import operator
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from embedders.ids import canonical_id
from embedders.image_headers import ImageHeader, inspect
from embedders.quarantine import Reason
from embedders.samples import NONE_IGNORED, Component, Ignored, KeyDot, Sample, TarIndex
from embedders.tar import map_tar, read_tar

READ_AHEAD = 4 << 30
"""Bytes of a shard that are read before its first sample is looked at; the rest as it comes."""
MADV_POPULATE_READ = 22
"""Linux 5.14; before, madvise answers EINVAL and pages come as they are touched."""

_libc = ctypes.CDLL(None, use_errno=True)
_EXTENSION = operator.itemgetter(0)


@dataclass(frozen=True)
class Samples:
    """A shard's n samples as columns, in the order of the tar: what a loader and the account ask of them."""

    ids: tuple[str, ...]
    """Each sample's json `id_col`, else its key, as text: ids join by value whatever their type."""
    members: tuple[str, ...]
    """The name of each sample's image in the tar, or of its first member where no image is chosen."""
    places: np.ndarray
    """(n, 2) int64: offset and size of the image in bytes, 0 and 0 where there is none."""
    unusable: dict[int, tuple[Reason, str]]
    """The samples that no loader need look at: no image, several, an empty one, or an id that was there before."""
    headers: np.ndarray | None = None
    """(n, 4) int64, if they were read (a PNG can claim 2^32 pixels a side): width and height in pixels, whether DALI
    decodes the image as Pillow does, and whether it carries metadata; see `embedders.image_headers.ImageHeader`."""
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
    def ids(self) -> tuple[str, ...]:
        """The id of each sample."""
        return self.samples.ids

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

    @property
    def count(self) -> int:
        """Return the number of samples."""
        return len(self.samples.ids)

    def id_of(self, i: int) -> str:
        """Return a sample's id."""
        return self.samples.ids[i]

    def ids_at(self, samples: np.ndarray) -> pa.Array:
        """Return the ids of some samples, (n,) int64, as text (n,)."""
        return pa.array([self.samples.ids[i] for i in samples.tolist()], pa.string())

    def member_of(self, i: int) -> str:
        """The name of a sample's image in the tar, or of its first member where no image is chosen."""
        return self.samples.members[i]

    def encoded(self) -> Iterator[tuple[int, np.ndarray, ImageHeader | None]]:
        """Every image worth looking at: its sample, its bytes as a 1-D uint8 view, its header if it was read."""
        headers = self.samples.headers
        known = [None] * len(self.ids) if headers is None else headers.tolist()
        for i, ((offset, size), header) in enumerate(zip(self.samples.places.tolist(), known, strict=True)):
            if i not in self.unusable:
                data = np.frombuffer(self.data, np.uint8, size, offset)
                yield i, data, None if header is None else ImageHeader("", header[0], header[1], *_flags(header))

    def read_ahead(self) -> None:
        """Have the file in memory and mapped, page by page, before a thread that holds the interpreter touches it.

        Without this a cold page costs the thread that feeds the GPU a wait for the disk, and a warm one still a fault.

        :raises OSError: a page cannot be read; touching it later would end the process.
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


def _flags(header: list[int]) -> tuple[bool, str, bool]:
    return bool(header[2]), "", bool(header[3])


def _image(sample: Sample, image_component: str | None) -> Component | None:
    images = sample.images(image_component)
    return images[0] if len(images) == 1 else None


def describe(
    data: mmap.mmap, index: TarIndex, id_col: str, image_component: str | None = None, *, headers: bool = False
) -> Samples:
    """The samples of a mapped tar as columns.

    :param headers: whether to read the images' own headers too.
    """
    ids = tuple(sample_id(sample, data, id_col) for sample in index.samples)
    images = [_image(sample, image_component) for sample in index.samples]
    members = tuple((im or s.components[0]).name for im, s in zip(images, index.samples, strict=True))
    places = np.array([(im.offset, im.size) if im else (0, 0) for im in images], np.int64).reshape(-1, 2)
    read = None
    if headers:
        seen = [inspect(np.frombuffer(data, np.uint8, size, offset)) for offset, size in places.tolist()]
        read = np.array([(h.width, h.height, h.dali, h.metadata) for h in seen], np.int64).reshape(-1, 4)
    unusable = _unusable(index, ids, images, image_component)
    return Samples(ids, members, places, unusable, read, index.ignored, index.doubt)


def _unusable(
    index: TarIndex, ids: Sequence[str], images: Sequence[Component | None], image_component: str | None
) -> dict[int, tuple[Reason, str]]:
    seen: dict[str, str] = {}
    found: dict[int, tuple[Reason, str]] = {}
    for i, (sample, sample_id, image) in enumerate(zip(index.samples, ids, images, strict=True)):
        if sample_id in seen:
            found[i] = Reason.DUPLICATE_ID, f"{seen[sample_id]} has the id {sample_id} too"
        elif (name := twice(sample)) is not None:
            found[i] = Reason.AMBIGUOUS_IMAGE, f"{name} is in the tar twice; repack it with one of the two"
        elif image is None:
            found[i] = _no_image(sample, image_component)
        elif image.offset == 0:
            found[i] = Reason.MISSING_IMAGE, f"{image.name} is a link to what the tar does not hold"
        elif image.size == 0:
            found[i] = Reason.EMPTY, "0 bytes"
        seen.setdefault(sample_id, sample.components[0].name)
    return found


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

    :param image_component: the extension of the image to take where samples have several, such as `left.jpg`; several
        with commas between them, the first that a sample has.
    :param key_dot: which dot of a file name ends the sample's key.
    :raises MalformedShard: it is not a tar or is damaged.
    """
    data = map_tar(path)
    index = read_tar(data, os.fspath(path), key_dot) if index is None else index
    samples = describe(data, index, id_col, image_component)
    shard = OpenShard(os.fspath(path), data, samples, id_col, image_component, key_dot)
    vars(shard)["index"] = index  # it need not be read again
    return shard


def sample_id(sample: Sample, data: mmap.mmap, id_col: str) -> str:
    """A sample's id as text: its json's `id_col`, else its key."""
    value = sample_json(sample, data).get(id_col)
    return canonical_id(sample.key if value is None else value)


def sample_json(sample: Sample, data: mmap.mmap) -> dict[str, Any]:
    """A sample's json object; empty where there is none or it does not parse, since that is not the image's fault."""
    component = sample.json()
    if component is None:
        return {}
    try:
        value = json.loads(data[component.offset : component.offset + component.size])
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
