"""What a sample is: the members of a tar that share a key, and which of them is the image."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, overload

import numpy as np
import pyarrow as pa
from PIL import Image

from embedders.byte_columns import blocks, bytes_and_offsets, coded, cut_out, joined, text
from embedders.ids import printable

KeyDot = Literal["first", "last"]
"""Which dot of a file name ends the sample's key."""
IGNORED_EXAMPLES, NAME_SHOWN = 5, 200
_NO_IMAGES = frozenset(["BUFR", "GRIB", "HDF5", "MPEG", "PDF"])
"""Formats that Pillow tells by name and that are no images: tables, weather, films and documents."""
_WEBDATASET = frozenset(["img", "jpg", "jpeg", "pbm", "pgm", "png", "pnm", "ppm"])


@functools.cache
def image_extensions() -> frozenset[str]:
    """Every extension, in lower case and without a dot, that the installed Pillow or webdataset takes for an image."""
    registered = Image.registered_extensions().items()
    known = (ext.lstrip(".") for ext, kind in registered if kind in Image.OPEN and kind not in _NO_IMAGES)
    return frozenset(known) | _WEBDATASET


@functools.lru_cache(1024)
def is_image(extension: str) -> bool:
    """Whether a component is an image by the last part of its extension."""
    return extension.rpartition(".")[2].lower() in image_extensions()


def chosen_extensions(image_component: str | None) -> list[str]:
    """The extensions that an `image_component` such as "left.jpg" or "jpg,png" names, in lower case."""
    names = (name.strip().removeprefix(".").lower() for name in (image_component or "").split(","))
    return [name for name in names if name]


class Component(NamedTuple):
    """One member of a sample: `extension` is what follows the first dot, `offset` and `size` are in bytes."""

    extension: str
    offset: int
    size: int
    name: str


class Sample(NamedTuple):
    """The members that share a key, in the order of the tar."""

    key: str
    components: tuple[Component, ...]

    def images(self, chosen: str | None = None) -> tuple[Component, ...]:
        """The components that are images by their last extension.

        Args:
            chosen: An extension, or several with commas between them. The first one that the sample has counts, in
                any case of its letters.
        """
        if chosen is None:
            return tuple([c for c in self.components if is_image(c.extension)])
        for extension in chosen_extensions(chosen):
            if found := tuple(c for c in self.components if c.extension.lower() == extension):
                return found
        return ()

    def json(self) -> Component | None:
        """The sample's `.json` component."""
        for component in self.components:  # faster than a generator, and run once a sample
            if component.extension.lower() == "json":
                return component
        return None


class Ignored(NamedTuple):
    """The members that are part of no sample: how many there are, and the names of the first ones."""

    total: int = 0
    examples: tuple[str, ...] = ()

    def and_one(self, name: str) -> Ignored:
        """These, and one more."""
        few = len(self.examples) < IGNORED_EXAMPLES
        return Ignored(self.total + 1, (*self.examples, printable(name)[:NAME_SHOWN]) if few else self.examples)


NONE_IGNORED = Ignored()


class Members(NamedTuple):
    """Members of a tar as columns, in its order: `names` as bytes, `offsets` and `sizes` (m,) int64 in bytes."""

    names: pa.LargeBinaryArray
    offsets: np.ndarray
    sizes: np.ndarray

    def kept(self, wanted: np.ndarray) -> Members:
        """Return some of them: `wanted` is (m,) bool."""
        return Members(self.names.filter(pa.array(wanted)), self.offsets[wanted], self.sizes[wanted])


@dataclass(frozen=True, eq=False)
class TarIndex:
    """The plan of a shard: its n samples in the order of their first members, and the members that are none of them.

    The m components are columns, sample by sample, so that a million samples take 0.1 kB each and no Python object.
    `samples` makes the objects of those that are looked at.
    """

    keys: pa.LargeBinaryArray
    """(n,) the key of each sample, all different."""
    starts: np.ndarray
    """(n + 1,) int64, the row of each sample's first component, and m."""
    components: Members
    """(m,) the components: of a sample in the order of the tar."""
    extensions: tuple[str, ...]
    """The distinct extensions."""
    extension_of: np.ndarray
    """(m,) int32, which extension each component has."""
    ignored: Ignored = NONE_IGNORED
    doubt: str = ""
    """Why the tar may lack members at its end, although it can be read; empty for nearly all."""

    @classmethod
    def of(cls, samples: Iterable[Sample], ignored: Ignored = NONE_IGNORED, doubt: str = "") -> TarIndex:
        """Return the index of some samples, whose components' names end in their extensions."""
        components = [component for sample in samples for component in sample.components]
        names = [component.name.encode("utf-8", "surrogateescape") for component in components]
        ends = [len(c.extension.encode("utf-8", "surrogateescape")) + 1 for c in components]
        places = np.array([(c.offset, c.size) for c in components], np.int64).reshape(-1, 2)
        members = Members(pa.array(names, pa.large_binary()), *places.T.copy())
        dots = np.array([len(name) for name in names], np.int64) - np.array(ends, np.int64)
        return cls.grouped(members, dots, ignored, doubt)

    @classmethod
    def grouped(cls, members: Members, dots: np.ndarray, ignored: Ignored = NONE_IGNORED, doubt: str = "") -> TarIndex:
        """Return the index of members that are all part of a sample.

        Args:
            members: In the order of the tar.
            dots: (m,) int64, where in its name each one's key ends.
            ignored: The other members of the tar.
            doubt: Why members may be missing.
        """
        keys, extensions = [], []
        for rows in blocks(len(dots)):
            data, offsets = bytes_and_offsets(members.names, rows)
            starts, at = offsets[:-1], offsets[:-1] + dots[rows]
            keys.append(cut_out(data, starts + _length_of_dot_folder(data, starts), at))
            extensions.append(cut_out(data, at + 1, offsets[1:]))
        sample_of, distinct_keys = coded(joined(keys))
        encoded = joined(extensions).dictionary_encode()
        extension_of, distinct = encoded.indices.to_numpy(), encoded.dictionary
        if (np.diff(sample_of) < 0).any():  # a sample's members lie apart
            order = np.argsort(sample_of, kind="stable")
            members = Members(members.names.take(pa.array(order)), members.offsets[order], members.sizes[order])
            extension_of = extension_of[order]
        counts = np.bincount(sample_of, minlength=len(distinct_keys))
        starts = np.concatenate([[0], np.cumsum(counts)])
        return cls(distinct_keys, starts, members, tuple(map(text, distinct.to_pylist())), extension_of, ignored, doubt)

    @functools.cached_property
    def samples(self) -> Sequence[Sample]:
        """The samples, made as they are asked for."""
        return _Samples(self)

    @property
    def sample_of(self) -> np.ndarray:
        """(m,) int64, the sample that each component is part of."""
        return np.repeat(np.arange(len(self.keys)), np.diff(self.starts))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TarIndex):
            return NotImplemented
        mine, others = (self.ignored, self.doubt), (other.ignored, other.doubt)
        return mine == others and tuple(self.samples) == tuple(other.samples)


class _Samples(Sequence[Sample]):
    """The samples of an index as objects, none of which is kept."""

    def __init__(self, index: TarIndex) -> None:
        self._index = index

    def __len__(self) -> int:
        return len(self._index.keys)

    @overload
    def __getitem__(self, i: int) -> Sample: ...
    @overload
    def __getitem__(self, i: slice) -> tuple[Sample, ...]: ...
    def __getitem__(self, i: int | slice) -> Sample | tuple[Sample, ...]:
        if isinstance(i, slice):
            return tuple(self[row] for row in range(len(self))[i])
        row = range(len(self))[i]
        return next(self._between(slice(row, row + 1)))

    def __iter__(self) -> Iterator[Sample]:
        for rows in blocks(len(self)):
            yield from self._between(rows)

    def _between(self, rows: slice) -> Iterator[Sample]:
        index, starts = self._index, self._index.starts[rows.start : rows.stop + 1].tolist()
        some = slice(starts[0], starts[-1])
        names = map(text, index.components.names[some].to_pylist())
        extensions = map(index.extensions.__getitem__, index.extension_of[some].tolist())
        offsets, sizes = index.components.offsets[some].tolist(), index.components.sizes[some].tolist()
        components = list(map(Component, extensions, offsets, sizes, names))
        for key, (start, stop) in zip(index.keys[rows].to_pylist(), itertools.pairwise(starts), strict=True):
            yield Sample(text(key), tuple(components[start - starts[0] : stop - starts[0]]))


def index_members(members: Members, key_dot: KeyDot, kinds: MemberKinds | None = None, doubt: str = "") -> TarIndex:
    """Return the index of a tar's members.

    Args:
        members: All of them, in the order of the tar.
        key_dot: Which dot of a file name ends the sample's key.
        kinds: Which of them are no files; by default all are.
        doubt: Why members may be missing.
    """
    dots = [_dots(*bytes_and_offsets(members.names, rows), key_dot) for rows in blocks(len(members.names))]
    dot = np.concatenate(dots)
    part = dot >= 0
    if kinds is not None:
        part &= ~kinds.others
    if part.all():
        return TarIndex.grouped(members, dot, doubt=doubt)
    missed = ~part if kinds is None else ~part & ~kinds.folders
    named = (text(raw) for raw in members.names.filter(pa.array(missed)).to_pylist())
    ignored = NONE_IGNORED
    for name in named:
        if not name.endswith("/"):  # nobody misses a directory; v7's end in "/"
            ignored = ignored.and_one(name)
    return TarIndex.grouped(members.kept(part), dot[part], ignored, doubt)


class MemberKinds(NamedTuple):
    """What members are: (m,) bool each. `others` cannot be read, such as devices; `folders` are some of them."""

    others: np.ndarray
    folders: np.ndarray


def _dots(data: np.ndarray, offsets: np.ndarray, key_dot: KeyDot) -> np.ndarray:
    """Where in each name the key ends, (n,) int64; -1 for a name without key or extension, and a hidden one.

    The key ends at a dot of the file name: what follows the last slash. "tar -C folder ." writes "./a.jpg", whose key
    is "a".
    """
    if not len(data):
        return np.full(len(offsets) - 1, -1)
    starts, ends = offsets[:-1], offsets[1:]
    slashes, dots = np.flatnonzero(data == ord("/")), np.flatnonzero(data == ord("."))
    file_name = np.maximum(_last_before(slashes, ends) + 1, starts)
    if key_dot == "first":
        found = np.append(dots, len(data))[np.searchsorted(dots, file_name)]
    else:
        found = _last_before(dots, ends)
    hidden = data[np.minimum(file_name, len(data) - 1)] == ord(".")
    return np.where((found > file_name) & (found < ends - 1) & ~hidden, found - starts, -1)


def _last_before(positions: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """For each end the last of some sorted positions that is before it, -1 if none is."""
    return np.append(-1, positions)[np.searchsorted(positions, ends)]


def _length_of_dot_folder(data: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """2 where a name begins with "./", which is no part of the key, else 0."""
    padded = np.append(data, np.zeros(2, np.uint8))
    return 2 * ((padded[starts] == ord(".")) & (padded[starts + 1] == ord("/")))
