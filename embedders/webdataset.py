"""What is in a WebDataset tar: its samples, and where in the file their components lie.

Only headers are read, so a shard's index costs a few milliseconds whatever its images weigh, and everything
after it is a slice of the file. Formats read: v7, ustar, GNU (long names, base-256 sizes) and PAX, as POSIX.1-2001
and the GNU tar manual describe them. A sample is what the WebDataset library takes it to be: the members that
share a path up to the first dot of the file name (https://github.com/webdataset/webdataset), or on request up to the
last one. Links within the tar stand for the members that they point to.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import mmap
import operator
import os
import posixpath
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple
from urllib.parse import quote, unquote

import numpy as np
from PIL import Image

from embedders.errors import MalformedShard
from embedders.images import ImageHeader, inspect
from embedders.loader import Reason
from embedders.tar_headers import END_MARK, LONGEST_END, PlainTar, plain_members

BLOCK = 512
READ_AHEAD = 4 << 30
"""Bytes of a shard that are read before its first sample is looked at; the rest as it comes."""
MADV_POPULATE_READ = 22
"""Linux 5.14; before, madvise answers EINVAL and pages come as they are touched."""
KeyDot = Literal["first", "last"]
"""Which dot of a file name ends the sample's key."""
INDEX_MARK = "shard-embed/2"
"""Stands in the first line of an index that this module wrote; other tools' indexes are not trusted to be complete."""

_libc = ctypes.CDLL(None, use_errno=True)
_PAX_LENGTH = re.compile(rb"(\d{1,9}) ")
_PAX_SIZE = re.compile(r"[0-9]{1,20}")
_REGULAR = frozenset(b"0\x007")
_EXTENSION = operator.itemgetter(0)
_LINKS = _HARD_LINK, _SYMBOLIC_LINK = b"12"
_HOPS = 8  # links to links that are followed
IGNORED_EXAMPLES, NAME_SHOWN = 5, 200
_MAX_META = 1 << 20  # a long name or a PAX header larger than this is damage, not a name
_OTHER_FORMATS = (
    (b"\x1f\x8b", "gzip data", "gunzip < FILE > NEW.tar"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "zstd -dc FILE > NEW.tar"),
    (b"\xfd7zXZ\0", "xz data", "xz -dc FILE > NEW.tar"),
    (b"BZh", "bzip2 data", "bzip2 -dc FILE > NEW.tar"),
    (b"PK\x03\x04", "a zip archive", "mkdir NEW && unzip FILE -d NEW && tar -C NEW -cf NEW.tar ."),
)
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


@dataclass(frozen=True)
class TarIndex:
    """The plan of a shard: its samples in the order of their first members, and the members that are none of them."""

    samples: tuple[Sample, ...]
    ignored: Ignored = NONE_IGNORED
    doubt: str = ""
    """Why the tar may lack members at its end, although it can be read; empty for nearly all."""


class _Member(NamedTuple):
    name: str
    type: int
    offset: int
    size: int
    link: str


def read_tar(data: Sequence[int] | mmap.mmap | bytes, where: str = "tar", key_dot: KeyDot = "first") -> TarIndex:
    """Index the samples of a tar held in memory or mapped.

    :param data: the whole file's bytes.
    :param where: how errors name it.
    :param key_dot: which dot of a file name ends the sample's key.
    :raises MalformedShard: a header that is none, a member that reaches past the end, or data after the end.
    """
    if isinstance(data, mmap.mmap | bytes):
        index = _plain_index(plain_members(lambda at, size: data[at : at + size], len(data)), key_dot)
        if index is not None:
            return index
    members: list[_Member] = []
    try:
        doubt = _walk(data, members)
    except MalformedShard as error:
        samples = len(_grouped(members, key_dot).samples)
        after = f"after {samples:,} samples: " if samples else ""
        raise MalformedShard(f"{where}: {after}{error}") from None
    return replace(_grouped(members, key_dot), doubt=doubt)


def read_tar_file(path: str | os.PathLike[str], where: str, key_dot: KeyDot = "first") -> TarIndex:
    """Index the samples of a local tar; what lies between its headers is not read.

    :param where: how errors name it.
    :raises MalformedShard: as `read_tar`.
    """
    with open(path, "rb") as file:
        number = file.fileno()
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)  # the system would read the images between the headers too
        members = plain_members(lambda at, size: os.pread(number, size, at), os.fstat(number).st_size)
    index = _plain_index(members, key_dot)
    return read_tar(map_tar(path), where, key_dot) if index is None else index


def split_name(name: str, key_dot: KeyDot = "first") -> tuple[str, str] | None:
    """The key and the extension of a member's name; None if it has none, or is hidden.

    `tar -C folder .` writes "./a.jpg", whose key is "a".
    """
    start = name.rfind("/") + 1
    dot = name.find(".", start) if key_dot == "first" else name.rfind(".", start)
    if dot <= start or dot == len(name) - 1 or name[start] == ".":
        return None
    return _without_here(name[:dot]), name[dot + 1 :]


def _without_here(key: str) -> str:
    return key[2:] if key.startswith("./") else key


def _plain_index(members: PlainTar | None, key_dot: KeyDot) -> TarIndex | None:
    """The index of an ordinary tar; None if it is none, or some member is part of no sample."""
    if members is None:
        return None
    find = str.find if key_dot == "first" else str.rfind
    grouped: dict[str, list[Component]] = {}
    for name, offset, size in zip(*members, strict=True):
        start = name.rfind("/") + 1  # `split_name`, without the price of a call for each member
        dot = find(name, ".", start)
        if dot <= start or dot == len(name) - 1 or name[start] == ".":
            return None
        component = Component(name[dot + 1 :], offset, size, name)
        key = name[:dot] if name[0] != "." else _without_here(name[:dot])
        if key in grouped:
            grouped[key].append(component)
        else:
            grouped[key] = [component]
    return TarIndex(tuple([Sample(key, tuple(components)) for key, components in grouped.items()]))


def _grouped(members: Sequence[_Member], key_dot: KeyDot) -> TarIndex:
    """The samples that members make up; a link is the member that it points to."""
    grouped: dict[str, list[Component]] = {}
    ignored = NONE_IGNORED
    linked = any(member.type in _LINKS for member in members)
    named = {posixpath.normpath(member.name): member for member in members} if linked else {}
    for member in members:
        target = (member.offset, member.size) if member.type in _REGULAR else _target(member, named)
        split = split_name(member.name, key_dot)
        if split is None or target is None:
            if member.type != ord("5") and not member.name.endswith("/"):  # nobody misses a directory; v7's end in "/"
                ignored = ignored.and_one(member.name)
            continue
        key, extension = split
        grouped.setdefault(key, []).append(Component(extension, *target, member.name))
    return TarIndex(tuple(Sample(key, tuple(components)) for key, components in grouped.items()), ignored)


def _target(member: _Member, named: Mapping[str, _Member]) -> tuple[int, int] | None:
    """Offset and size of a member's data, (0, 0) for a link to what the tar does not hold; None for a device or so."""
    for _ in range(_HOPS):
        if member.type in _REGULAR:
            return member.offset, member.size
        if member.type not in _LINKS:
            return None
        folder = posixpath.dirname(member.name) if member.type == _SYMBOLIC_LINK else ""
        found = named.get(posixpath.normpath(posixpath.join(folder, member.link)))
        if found is None or found.type == ord("5"):
            return 0, 0
        member = found
    return 0, 0


def _walk(data: Any, members: list[_Member]) -> str:
    """Walk the headers of a tar; long names and PAX records are folded into the member they describe.

    :param members: gets the members, as many as there are before an error.
    :return: why members may be missing at the end, or nothing.
    """
    end, at = len(data), 0
    described: dict[str, str] = {}
    if end < BLOCK:
        raise _no_header(data, 0) if end else MalformedShard("an empty file is no tar; copy it again from its source")
    while at + BLOCK <= end:
        header = data[at : at + BLOCK]
        if header[0] == 0 and not any(header):
            break
        size = _checked_size(header, at)
        kind, start = header[156], at + BLOCK
        if "size" in described and kind not in b"xgLK":
            size = _pax_size(described["size"], at)
        if kind in b"123456":  # links, devices and directories have no data, whatever their size field says
            size = 0
        if kind == ord("S") or (kind in b"xgLK" and size > _MAX_META):
            raise MalformedShard(f"unsupported tar entry of type {chr(kind)!r} at byte {at:,}; repack the shard")
        if start + size > end:
            raise MalformedShard(
                f"cut short: the member at byte {at:,} needs {start + size:,} bytes, the file has {end:,}; "
                "copy it again from its source"
            )
        if kind in b"xLK":
            described |= _description(kind, data[start : start + size], at)
        elif kind != ord("g"):
            name = described.get("path") or described.get("L") or _header_name(header)
            link = ""
            if kind in _LINKS:
                link = described.get("linkpath") or described.get("K") or _text(header[157:257])
            members.append(_Member(name, kind, start, size, link))
            described = {}
        at = start + -(-size // BLOCK) * BLOCK
    return _check_end(data, at, whole=not described, empty=not members)


def _description(kind: int, data: bytes, at: int) -> dict[str, str]:
    """What an entry says of the member after it: PAX keywords, or a long name as "L" and a long link as "K"."""
    if kind != ord("x"):
        return {chr(kind): _text(data)}
    records = _pax_records(data, at)
    if any(keyword.startswith("GNU.sparse.") for keyword in records):
        raise MalformedShard(f"unsupported sparse file at byte {at:,}; repack the shard")
    return records


def _check_end(data: Any, at: int, *, whole: bool, empty: bool) -> str:
    """Prove that a tar ends where its members do: in two blocks of zeros or more, or with its last byte.

    :param at: the first byte after the last member.
    :param whole: whether no long name or PAX header waits for its member.
    :return: why members may be missing, or nothing. A missing mark is none of the reasons to refuse a tar: some
        writers leave it out, and what there is of its last member is all of it.
    """
    end = len(data)
    more = _first_byte(data, at)
    if more is not None and end - at < BLOCK:
        raise MalformedShard(f"cut short: {end - at} bytes of a header at byte {at:,}; copy it again from its source")
    if more is not None:
        raise MalformedShard(
            f"zeros at byte {at:,}, where a tar ends, and more data at byte {more:,}: it is damaged, or two tars in "
            "one file; copy it again from its source, or unpack it with tar --ignore-zeros and repack it"
        )
    if not whole:
        raise MalformedShard(f"cut short: the member whose name ends at byte {at:,} is missing; copy it again")
    zeros = end - at
    if empty and not END_MARK <= zeros <= LONGEST_END:
        raise MalformedShard(f"nothing but {zeros:,} zero bytes; copy it again from its source")
    if zeros < END_MARK:
        return "it has no end-of-archive mark"
    return f"it ends in {zeros:,} zero bytes" if zeros > LONGEST_END else ""


def _first_byte(data: Any, at: int) -> int | None:
    """The place of the first byte from `at` on that is not zero."""
    for start in range(at, len(data), 1 << 20):
        chunk = bytes(data[start : start + (1 << 20)])
        if rest := chunk.lstrip(b"\0"):
            return start + len(chunk) - len(rest)
    return None


def _no_header(data: Any, at: int) -> MalformedShard:
    """What is said of bytes that are no header; a file of another kind is called by its name."""
    head = bytes(data[:8])
    for signature, kind, command in _OTHER_FORMATS:
        if at == 0 and head.startswith(signature):
            return MalformedShard(f"{kind}, not a tar, whatever its name says; unpack it: {command}")
    if len(data) < BLOCK:
        return MalformedShard(f"{len(data)} bytes are no tar archive; replace the file or take it away")
    return MalformedShard(f"no tar header at byte {at:,}; the file is damaged or not a tar")


def _checked_size(header: bytes, at: int) -> int:
    """The size field of a header whose checksum holds, octal or GNU base-256."""
    try:
        stored = int(header[148:156].split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        stored = -1
    # The checksum field counts as eight spaces. Some old writers summed signed bytes.
    unsigned = _sum(header[: BLOCK // 2]) + _sum(header[BLOCK // 2 :]) - sum(header[148:156]) + 256
    if stored != unsigned and stored != unsigned - 256 * sum(b > 127 for b in header[:148] + header[156:]):
        raise _no_header(header, at)
    field = header[124:136]
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        size = int(field.split(b"\0")[0].strip() or b"0", 8)
    except ValueError:
        size = -1
    if size < 0:
        raise MalformedShard(f"a tar header without a size at byte {at:,}; the file is damaged")
    return size


def _sum(data: bytes) -> int:
    """The sum of up to 256 bytes: the lower half of their Adler-32, which is fifteen times as fast as `sum`."""
    return (zlib.adler32(data) & 0xFFFF) - 1


def _header_name(header: bytes) -> str:
    name = _text(header[:100])
    if header[257:263] == b"ustar\0" and header[345]:
        return f"{_text(header[345:500])}/{name}"
    return name


def _text(raw: bytes) -> str:
    return bytes(raw).split(b"\0")[0].decode("utf-8", "surrogateescape")


def _pax_records(data: bytes, at: int) -> dict[str, str]:
    """The `length keyword=value` records of a PAX header."""
    records: dict[str, str] = {}
    raw, begin = bytes(data).rstrip(b"\0"), 0
    while begin < len(raw):
        match = _PAX_LENGTH.match(raw, begin)
        stop = begin + int(match[1]) if match else 0
        if match is None or not match.end() < stop <= len(raw):
            raise MalformedShard(f"a damaged PAX header at byte {at:,}; repack the shard")
        keyword, _, value = raw[match.end() : stop - 1].partition(b"=")
        records[keyword.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        begin = stop
    return records


def _pax_size(value: str, at: int) -> int:
    if not _PAX_SIZE.fullmatch(value):
        raise MalformedShard(f"a PAX size that is no number at byte {at:,}; repack the shard")
    return int(value)


def format_index(index: TarIndex, fingerprint: str, key_dot: KeyDot = "first") -> str:
    """DALI's v1.2 index, readable by `fn.readers.webdataset`; the tar's fingerprint is in the first line.

    So are the members that are part of no sample, and the doubt about the tar's end.

    Spaces and percent signs of names are percent-encoded: DALI splits lines at spaces.
    """
    lines = [
        " ".join(f"{_quote(c.extension)} {c.offset} {c.size} {_quote(c.name)}" for c in sample.components)
        for sample in index.samples
    ]
    body = "".join(f"{line}\n" for line in lines)
    rest = json.dumps([index.ignored.total, *index.ignored.examples])
    marks = f"{INDEX_MARK} tar={quote(fingerprint)} keys={key_dot} ignored={quote(rest)} doubt={quote(index.doubt)}"
    first = f"v1.2 {len(index.samples)} {marks}"
    return f"{first} crc32={_checksum(first + body)}\n{body}"


def indexed_samples(head: str, fingerprint: str, key_dot: KeyDot | None = "first") -> int | None:
    """The samples that an index's first line tells of; None if it is no index of the tar with this fingerprint.

    :param key_dot: which dot was to end the keys, None for either.
    """
    fields = head.partition("\n")[0].split(" ")
    mine = len(fields) > 5 and fields[2:4] == [INDEX_MARK, f"tar={quote(fingerprint)}"]
    mine = mine and (key_dot is None or fields[4] == f"keys={key_dot}")
    return int(fields[1]) if mine and fields[1].isdecimal() else None


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode('utf-8', 'surrogateescape')):08x}"


def parse_index(text: str, fingerprint: str, key_dot: KeyDot | None = "first") -> TarIndex | None:
    """The index that `format_index` wrote for the tar with this fingerprint; None if it is another's or is damaged.

    :param key_dot: as `indexed_samples`.
    """
    line, _, body = text.partition("\n")
    first, _, checksum = line.rpartition(" ")
    head = first.split(" ")
    if indexed_samples(line, fingerprint, key_dot) is None or checksum != f"crc32={_checksum(first + body)}":
        return None
    samples = []
    try:
        count, *examples = json.loads(unquote(head[5].removeprefix("ignored=")))
        doubt = unquote(head[6].removeprefix("doubt="))
        for line in body.splitlines():
            fields = line.split(" ")
            components = tuple(
                Component(
                    unquote(ext, errors="surrogateescape"),
                    int(offset),
                    int(size),
                    unquote(name, errors="surrogateescape"),
                )
                for ext, offset, size, name in zip(*[iter(fields)] * 4, strict=True)
            )
            key = components[0].name[: -len(components[0].extension) - 1]
            samples.append(Sample(_without_here(key), components))
    except (ValueError, IndexError):
        return None
    whole = text.endswith("\n") and head[:2] == ["v1.2", str(len(samples))]
    return TarIndex(tuple(samples), Ignored(count, tuple(examples)), doubt) if whole else None


def _quote(name: str) -> str:
    """Percent-encode what would break a line of the index, and nothing else, so that it stays readable."""
    if name.isascii() and name.isprintable() and " " not in name and "%" not in name:
        return name
    return quote(name, safe="/:@!$&'()*+,;=~[]", errors="surrogateescape")


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
    decodes the image as Pillow does, and whether it carries metadata; see `embedders.images.ImageHeader`."""
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


def map_tar(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map a local tar for reading.

    :raises MalformedShard: the file is empty.
    """
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise MalformedShard(f"{path}: an empty file is no tar; copy it again from its source") from error


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


def canonical_id(value: Any) -> str:
    """An id as the text that is compared: 12, 12.0 (an integer column that once held a null) and "12" are one id."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return printable(str(value))


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold, such as the bytes of a Latin-1 name, as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
