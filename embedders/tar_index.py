"""The index of a tar as a file: DALI's v1.2 form, with the tar's fingerprint in its first line."""

from __future__ import annotations

import json
import zlib
from urllib.parse import quote, unquote

from embedders.samples import Component, Ignored, KeyDot, Sample, TarIndex, without_dot_folder

INDEX_MARK = "shard-embed/2"
"""Stands in the first line of an index that this module wrote; other tools' indexes are not trusted to be complete."""


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
            samples.append(Sample(without_dot_folder(key), components))
    except (ValueError, IndexError):
        return None
    whole = text.endswith("\n") and head[:2] == ["v1.2", str(len(samples))]
    return TarIndex(tuple(samples), Ignored(count, tuple(examples)), doubt) if whole else None


def _quote(name: str) -> str:
    """Percent-encode what would break a line of the index, and nothing else, so that it stays readable."""
    if name.isascii() and name.isprintable() and " " not in name and "%" not in name:
        return name
    return quote(name, safe="/:@!$&'()*+,;=~[]", errors="surrogateescape")
