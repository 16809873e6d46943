"""The members of a tar, read from its headers, and the samples that they make up.

Formats read: v7, ustar, GNU (long names, base-256 sizes) and PAX, as POSIX.1-2001 and the GNU tar manual describe them.
Links within the tar stand for the members that they point to. A tar ends where its end mark says, or it is malformed.
"""

from __future__ import annotations

import mmap
import os
import posixpath
import re
import zlib
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from embedders.byte_columns import byte_column, text
from embedders.errors import MalformedShard
from embedders.samples import KeyDot, MemberKinds, Members, TarIndex, index_members
from embedders.tar_headers import END_MARK, LONGEST_END, REGULAR, plain_members

BLOCK = 512
_PAX_LENGTH = re.compile(rb"(\d{1,9}) ")
_PAX_SIZE = re.compile(r"[0-9]{1,20}")
_REGULAR = frozenset(b"0\x007")
_LINKS = _HARD_LINK, _SYMBOLIC_LINK = b"12"
_HOPS = 8  # links to links that are followed
_MAX_META = 1 << 20  # a long name or a PAX header larger than this is damage, not a name
_OTHER_FORMATS = (
    (b"\x1f\x8b", "gzip data", "gunzip < FILE > NEW.tar"),
    (b"\x28\xb5\x2f\xfd", "zstd data", "zstd -dc FILE > NEW.tar"),
    (b"\xfd7zXZ\0", "xz data", "xz -dc FILE > NEW.tar"),
    (b"BZh", "bzip2 data", "bzip2 -dc FILE > NEW.tar"),
    (b"PK\x03\x04", "a zip archive", "mkdir NEW && unzip FILE -d NEW && tar -C NEW -cf NEW.tar ."),
)


class _Found:
    """Members as they are found one by one; a link has the name that it points to."""

    def __init__(self) -> None:
        self.names, self.kinds = bytearray(), bytearray()
        self.ends, self.offsets, self.sizes = array("q", [0]), array("q"), array("q")
        self.links: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.kinds)

    def add(self, name: str, kind: int, offset: int, size: int) -> None:
        """Add a member."""
        self.names += name.encode("utf-8", "surrogateescape")
        self.ends.append(len(self.names))
        self.kinds.append(kind)
        self.offsets.append(offset)
        self.sizes.append(size)

    def index(self, key_dot: KeyDot, doubt: str = "") -> TarIndex:
        """Return the index of these members; a link is the member that it points to."""
        offsets, sizes = np.array(self.offsets, np.int64), np.array(self.sizes, np.int64)
        members = Members(byte_column(bytes(self.names), np.array(self.ends, np.int64)), offsets, sizes)
        kinds = np.frombuffer(bytes(self.kinds), np.uint8)
        others = ~np.isin(kinds, REGULAR)
        if self.links:
            names = [text(raw) for raw in members.names.to_pylist()]
            last = {posixpath.normpath(name): i for i, name in enumerate(names)}
            for i in self.links:
                place = self._target(i, names, last)
                if place is not None:
                    others[i], (offsets[i], sizes[i]) = False, place
        return index_members(members, key_dot, MemberKinds(others, kinds == ord("5")), doubt)

    def _target(self, i: int, names: Sequence[str], last: Mapping[str, int]) -> tuple[int, int] | None:
        """Offset and size of what a link points to, (0, 0) for what the tar does not hold; None for a device or so."""
        for _ in range(_HOPS):
            if self.kinds[i] in _REGULAR:
                return self.offsets[i], self.sizes[i]
            if self.kinds[i] not in _LINKS:
                return None
            folder = posixpath.dirname(names[i]) if self.kinds[i] == _SYMBOLIC_LINK else ""
            found = last.get(posixpath.normpath(posixpath.join(folder, self.links[i])))
            if found is None or self.kinds[found] == ord("5"):
                return 0, 0
            i = found
        return 0, 0


def read_tar(data: Sequence[int] | mmap.mmap | bytes, where: str = "tar", key_dot: KeyDot = "first") -> TarIndex:
    """Index the samples of a tar held in memory or mapped.

    Args:
        data: The whole file's bytes.
        where: How errors name it.
        key_dot: Which dot of a file name ends the sample's key.

    Raises:
        MalformedShard: A header that is none, a member that reaches past the end, or data after the end.
    """
    if isinstance(data, mmap.mmap | bytes):
        members = plain_members(lambda at, size: data[at : at + size], len(data))
        if members is not None:
            return index_members(members, key_dot)
    found = _Found()
    try:
        doubt = _walk(data, found)
    except MalformedShard as error:
        samples = len(found.index(key_dot).samples)
        after = f"after {samples:,} samples: " if samples else ""
        raise MalformedShard(f"{where}: {after}{error}") from None
    return found.index(key_dot, doubt)


def read_tar_file(path: str | os.PathLike[str], where: str, key_dot: KeyDot = "first") -> TarIndex:
    """Index the samples of a local tar; what lies between its headers is not read.

    Args:
        path: The tar.
        where: How errors name it.
        key_dot: Which dot of a file name ends the sample's key.

    Raises:
        MalformedShard: As `read_tar`.
    """
    with open(path, "rb") as file:
        number = file.fileno()
        os.posix_fadvise(number, 0, 0, os.POSIX_FADV_RANDOM)  # the system would read the images between the headers too
        members = plain_members(lambda at, size: os.pread(number, size, at), os.fstat(number).st_size)
    return read_tar(map_tar(path), where, key_dot) if members is None else index_members(members, key_dot)


def _walk(data: Any, members: _Found) -> str:
    """Walk the headers of a tar; long names and PAX records are folded into the member they describe.

    Args:
        data: The whole file's bytes.
        members: Gets the members, as many as there are before an error.

    Returns:
        Why members may be missing at the end, or nothing.
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
            if kind in _LINKS:
                members.links[len(members)] = described.get("linkpath") or described.get("K") or _text(header[157:257])
            members.add(name, kind, start, size)
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

    Args:
        data: The whole file's bytes.
        at: The first byte after the last member.
        whole: Whether no long name or PAX header waits for its member.
        empty: Whether there are no members.

    Returns:
        Why members may be missing, or nothing. A missing mark is none of the reasons to refuse a tar: some writers
        leave it out, and what there is of its last member is all of it.
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


def map_tar(path: str | os.PathLike[str]) -> mmap.mmap:
    """Map a local tar for reading.

    Raises:
        MalformedShard: The file is empty.
    """
    with open(path, "rb") as file:
        try:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:
            raise MalformedShard(f"{path}: an empty file is no tar; copy it again from its source") from error
