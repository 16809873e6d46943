"""The index of a tar as a file: DALI's v1.2 form, with the tar's fingerprint in its first line."""

from __future__ import annotations

import json
import zlib
from urllib.parse import quote, unquote, unquote_to_bytes

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from embedders.byte_columns import blocks, joined
from embedders.byte_columns import text as decoded
from embedders.samples import Ignored, KeyDot, Members, TarIndex

INDEX_MARK = "shard-embed/2"
"""Stands in the first line of an index that this module wrote; other tools' indexes are not trusted to be complete."""


def format_index(index: TarIndex, fingerprint: str, key_dot: KeyDot = "first") -> str:
    """DALI's v1.2 index, readable by `fn.readers.webdataset`; the tar's fingerprint is in the first line.

    So are the members that are part of no sample, and the doubt about the tar's end.

    Spaces and percent signs of names are percent-encoded: DALI splits lines at spaces.
    """
    body = b"".join(_lines(index, rows) for rows in blocks(len(index.extension_of)))
    rest = json.dumps([index.ignored.total, *index.ignored.examples])
    marks = f"{INDEX_MARK} tar={quote(fingerprint)} keys={key_dot} ignored={quote(rest)} doubt={quote(index.doubt)}"
    first = f"v1.2 {len(index.samples)} {marks}"
    return f"{first} crc32={_checksum(first, body)}\n{body.decode()}"


def _lines(index: TarIndex, rows: slice) -> bytes:
    """The text of some components, each with what comes after it: a space, or a new line where its sample ends."""
    last = np.zeros(len(index.extension_of) + 1, bool)
    last[index.starts] = True
    after = pc.if_else(pa.array(last[rows.start + 1 : rows.stop + 1]), "\n", " ")
    extensions = pa.array([_quote(e) for e in index.extensions], pa.string())
    fields = [
        extensions.take(pa.array(index.extension_of[rows])),
        pa.array(index.components.offsets[rows]).cast(pa.string()),
        pa.array(index.components.sizes[rows]).cast(pa.string()),
        pa.array([_quote(decoded(raw)) for raw in index.components.names[rows].to_pylist()], pa.string()),
    ]
    lines = pc.binary_join_element_wise(*fields, " ")
    return "".join(pc.binary_join_element_wise(lines, after, "").to_pylist()).encode()


def indexed_samples(head: str, fingerprint: str, key_dot: KeyDot | None = "first") -> int | None:
    """The samples that an index's first line tells of; None if it is no index of the tar with this fingerprint.

    Args:
        head: The beginning of the index.
        fingerprint: The tar's.
        key_dot: Which dot was to end the keys, None for either.
    """
    fields = head.partition("\n")[0].split(" ")
    mine = len(fields) > 5 and fields[2:4] == [INDEX_MARK, f"tar={quote(fingerprint)}"]
    mine = mine and (key_dot is None or fields[4] == f"keys={key_dot}")
    return int(fields[1]) if mine and fields[1].isdecimal() else None


def _checksum(first: str, body: bytes) -> str:
    return f"{zlib.crc32(body, zlib.crc32(first.encode('utf-8', 'surrogateescape'))):08x}"


def parse_index(text: str, fingerprint: str, key_dot: KeyDot | None = "first") -> TarIndex | None:
    """Return the index that `format_index` wrote for the tar with this fingerprint; None for any other text.

    Args:
        text: The whole file.
        fingerprint: The tar's.
        key_dot: As `indexed_samples`.
    """
    line, _, rest = text.partition("\n")
    first, _, checksum = line.rpartition(" ")
    head, body = first.split(" "), rest.encode("utf-8", "surrogateescape")
    count = indexed_samples(line, fingerprint, key_dot)
    if count is None or checksum != f"crc32={_checksum(first, body)}" or not text.endswith("\n"):
        return None
    try:
        total, *examples = json.loads(unquote(head[5].removeprefix("ignored=")))
        doubt = unquote(head[6].removeprefix("doubt="))
        members, dots = _parsed(body)
    except (ValueError, IndexError):
        return None
    index = TarIndex.grouped(members, dots, Ignored(total, tuple(examples)), doubt)
    return index if head[:2] == ["v1.2", str(len(index.samples))] else None


PARSED_AT_ONCE = 1 << 20
"""Bytes of an index's text."""


def _parsed(body: bytes) -> tuple[Members, np.ndarray]:
    """The components that lines tell of, and where in their names the keys end."""
    names, dots, offsets, sizes = [pa.array([], pa.large_binary())], [], [], []
    at = 0
    while at < len(body):
        stop = body.find(b"\n", at + PARSED_AT_ONCE) + 1 or len(body)
        fields = body[at:stop].split()
        at = stop
        extensions, raw = ([unquote_to_bytes(f) if b"%" in f else f for f in fields[k::4]] for k in (0, 3))
        offsets.append(np.array(list(map(int, fields[1::4])), np.int64))
        sizes.append(np.array(list(map(int, fields[2::4])), np.int64))
        names.append(pa.array(raw, pa.large_binary()))
        dots.append(np.array([len(n) - len(e) - 1 for n, e in zip(raw, extensions, strict=True)], np.int64))
    none = np.zeros(0, np.int64)
    members = Members(joined(names), np.concatenate([none, *offsets]), np.concatenate([none, *sizes]))
    dot = np.concatenate([none, *dots])
    if not len(dot) == len(members.offsets) == len(members.sizes) or (dot < 0).any():
        raise ValueError("fields are missing")
    return members, dot


def _quote(name: str) -> str:
    """Percent-encode what would break a line of the index, and nothing else, so that it stays readable."""
    if name.isascii() and name.isprintable() and " " not in name and "%" not in name:
        return name
    return quote(name, safe="/:@!$&'()*+,;=~[]", errors="surrogateescape")
