"""The records in the footers of the files that a run writes: what each was made of, and the account of its samples."""

from __future__ import annotations

import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias, TypeVar
from weakref import WeakValueDictionary

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.tar_index import indexed_samples
from tasks.sample_account import Unbalanced, check_account
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import OBJECT_STORES, FileInfo, Folder

R = TypeVar("R", "LayerRecord", "MergeRecord")
RECORD = b"shard_embed"
"""The key under which a Parquet footer carries its record."""

FOOTER_BYTES = 16 << 10
"""Read from a file's end for its footer: a larger one, of many columns, costs a second request."""

MAGIC = b"PAR1"
NOT_SEALED = "00000000"
"""What stands in a record for the checksum of its footer until the file is written."""
_SEAL = re.compile(rb'"footer_crc32": "([^"]{8})"', re.DOTALL)
Footer: TypeAlias = pq.FileMetaData


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a layer: the type of its values, and their shape; () for a number, (512,) for a vector."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True, weakref_slot=True)
class LayerRecord:
    """What the footer of a layer file says: which inputs it is made of, and the account of the shard's samples.

    A record whose account does not balance cannot be made, so no such file can be written or counts as done.

    Attributes:
        key: The hash of the inputs; see `tasks.keys.layer_key`.
        layer: The layer's name.
        recipe: The digest of the fingerprint.
        samples: How many samples the shard has.
        embedded: How many of them have a value.
        quarantined: How many have none, by reason.
        rows: Rows of the file; as many as `embedded`, unless a column `part` numbers several rows of a sample.
        columns: The columns besides the id.
        made_of: The recipe's fingerprint.
        in_order: Whether the rows are in the order of the tar, as they always are unless a custom embedder's are not.
        decoder: What decoded the images.
        versions: Of the libraries that made the values.
        statistics: By column of vectors; see `tasks.vector_checks.VectorStatistics`.
        work: When the shard was begun and ended, in seconds since 1970; and for how many seconds its tar was read, the
            engine waited for the decoder and for the model, and the file before it was written.
        worker: The machine and the process that did it.
        ignored: Members of the tar that are part of no sample, such as names without an extension.
        ignored_examples: Names of some of them.
        doubt: Why the tar may lack members at its end, although it could be read.
        batch_size: Images of a full batch, where a run has decided on it by measuring; 0 elsewhere.
        computed: The model's precision and device, such as "float32 on a CPU": the fingerprint has the policy only.
    """

    key: str
    layer: str
    recipe: str
    samples: int
    embedded: int
    quarantined: dict[str, int]
    rows: int
    columns: dict[str, Column]
    made_of: dict[str, Any] = field(default_factory=dict)
    in_order: bool = True
    decoder: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    statistics: dict[str, dict[str, float]] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)
    worker: str = ""
    ignored: int = 0
    ignored_examples: list[str] = field(default_factory=list)
    doubt: str = ""
    computed: str = ""
    batch_size: int = 0

    def __post_init__(self) -> None:
        check_account(self.samples, self.embedded, self.quarantined)

    @property
    def version(self) -> str:
        """Return what a merged file depends on: another decoder gives other values under the same key."""
        return f"{self.key} {self.decoder}"

    @property
    def dimensions(self) -> int:
        """Return the length of the layer's vectors; 0 until there is one."""
        shape = self.columns[self.layer].shape if self.layer in self.columns else ()
        return shape[-1] if shape else 0

    @property
    def vectors(self) -> dict[str, float]:
        """Return the statistics of the column that has the layer's name."""
        return self.statistics.get(self.layer, {})


@dataclass(frozen=True, slots=True, weakref_slot=True)
class MergeRecord:
    """What the footer of a merged file says of it.

    Rows without an embedding are those without an image, some of them because a crawl could not fetch it, those whose
    image is in quarantine, and those that repeat an id. `unmatched` counts the rows of the shard's unmatched file;
    `examples` are ids from either side.
    """

    key: str
    rows: int
    rows_without_embedding: int
    embeddings_without_row: int
    rows_without_image: int = 0
    rows_not_fetched: int = 0
    rows_repeated: int = 0
    unmatched: int = 0
    examples: list[str] = field(default_factory=list)


def seconds_in_work(records: Iterable[LayerRecord]) -> float:
    """The seconds from the first begin of some shards to their last end; 0 for none."""
    works = [record.work for record in records if record.work]
    if not works:
        return 0.0
    return max(max(work["ended"] for work in works) - min(work["began"] for work in works), 0.01)


@dataclass(frozen=True)
class PartRecord:
    """What the footer of a file made of several merged files says of it."""

    key: str
    rows: int


def with_record(schema: pa.Schema, record: LayerRecord | MergeRecord | PartRecord) -> pa.Schema:
    """The schema with the record in its metadata, and so in the file's footer."""
    return schema.with_metadata({**(schema.metadata or {}), RECORD: to_json(record).encode()})


def to_json(record: LayerRecord | MergeRecord | PartRecord) -> str:
    """Return a record as a footer holds it, under the key `RECORD`, with room for the seal."""
    return json.dumps(asdict(record) | {"footer_crc32": NOT_SEALED})


def seal_footer(path: str | os.PathLike[str]) -> None:
    """Put a checksum of a Parquet file's footer into the record in it, since Parquet has none for footers.

    Args:
        path: A file that is written and closed, and has not taken its name yet.
    """
    with open(path, "r+b") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(4), "little")
        start = file.seek(-8 - size, os.SEEK_END)
        footer = file.read(size)
        found = _SEAL.search(footer)
        assert found is not None, "the footer holds no record"
        file.seek(start + found.start(1))
        file.write(_checksum(footer, found))


def _checksum(footer: bytes, seal: re.Match[bytes]) -> bytes:
    """Return the checksum of a footer that is not sealed yet, as eight hexadecimal digits."""
    start, end = seal.span(1)
    rest = zlib.crc32(footer[end:], zlib.crc32(NOT_SEALED.encode(), zlib.crc32(footer[:start])))
    return f"{rest:08x}".encode()


def _is_damaged(footer: bytes) -> bool:
    """Return whether a footer has another checksum than the one it was sealed with."""
    seal = _SEAL.search(footer)
    return seal is not None and seal[1] not in (NOT_SEALED.encode(), _checksum(footer, seal))


def read_layer_record(folder: Folder, name: str) -> LayerRecord | None:
    """The record of a layer file; None unless the footer opens and its counts agree with the file."""
    return layer_record(_read_footer(folder, name))


def read_merge_record(folder: Folder, name: str) -> MergeRecord | None:
    """The record of a merged file; None unless the footer opens and its counts agree with the file."""
    return merge_record(_read_footer(folder, name))


def layer_record(footer: Footer | None) -> LayerRecord | None:
    """The record in the footer of a layer file; None unless its account balances and agrees with the file."""
    found = _record(footer)
    if found is None:
        return None
    value, rows = found
    try:
        record = LayerRecord(**value | {name: _shared(name, value[name]) for name in SHARED if name in value})
    except (AttributeError, KeyError, TypeError, Unbalanced):  # damaged, written by another version, or foreign
        return None
    return record if record.rows == rows and (record.embedded == rows or PART in record.columns) else None


SHARED = ("layer", "recipe", "quarantined", "columns", "made_of", "decoder", "versions", "worker", "computed")
"""What most records of a layer have in common: a plan holds it once and not for each shard."""
_seen: dict[tuple[str, str], Any] = {}
MOST_SEEN = 4096


def _shared(name: str, value: Any) -> Any:
    """Return a record's value for a field as an object that all records with an equal one have; never change it."""
    if isinstance(value, str):
        return sys.intern(value)
    key = name, repr(value)
    if key not in _seen:
        if len(_seen) > MOST_SEEN:
            _seen.clear()
        columns = name == "columns"
        _seen[key] = {n: Column(it["dtype"], tuple(it["shape"])) for n, it in value.items()} if columns else value
    return _seen[key]


PART = "part"
"""The column that numbers the rows of a sample, in layers that have several."""


def account_agrees(shard: Shard, record: LayerRecord) -> bool:
    """Return whether the quarantine and the index beside a layer file say as many samples as its record."""
    quarantined = sum(record.quarantined.values())
    if quarantined and _count_rows(shard.target, shard.quarantine_file(record.layer)) != quarantined:
        return False
    samples = indexed_samples(shard.target.read_head(shard.index_file), shard.tar_fingerprint, shard.key_dot)
    return samples is None or samples == record.samples


def intact(folder: Folder, name: str) -> bool:
    """Whether every page of a Parquet file can be read and has the checksum it was written with."""
    try:
        with arrow_file(folder, name) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException):
        return False
    return True


def _count_rows(folder: Folder, name: str) -> int | None:
    """Return a Parquet file's rows by its footer; None where it does not open."""
    footer = _read_footer(folder, name)
    return None if footer is None else int(footer.num_rows)


def merge_record(footer: Footer | None) -> MergeRecord | None:
    """The record in the footer of a merged file; None unless its counts agree with the file."""
    found = _record(footer)
    try:
        record = MergeRecord(**found[0]) if found else None
    except TypeError:
        return None
    return record if found and record and record.rows == found[1] else None


def read_part_record(folder: Folder, name: str) -> PartRecord | None:
    """Return the record of a file made of several merged files; None unless its footer opens and agrees with it."""
    return part_record(_read_footer(folder, name))


def part_record(footer: Footer | None) -> PartRecord | None:
    """Return the record in the footer of a file made of several merged files; None unless it agrees with the file."""
    found = _record(footer)
    try:
        record = PartRecord(**found[0]) if found else None
    except TypeError:
        return None
    return record if found and record and record.rows == found[1] else None


def read_layer_records(folder: Folder, files: Sequence[FileInfo]) -> Iterator[tuple[str, LayerRecord]]:
    """Yield the records of layer files with the files' names; files without a good one are left out.

    Args:
        folder: Where they are.
        files: Of one layer, from `Folder.list`.
    """
    return _read_records(folder, files, layer_record)


def read_merge_records(folder: Folder, files: Sequence[FileInfo]) -> Iterator[tuple[str, MergeRecord]]:
    """Yield the records of merged files; see `read_layer_records`."""
    return _read_records(folder, files, merge_record)


_held: WeakValueDictionary[tuple[str, str, str], Any] = WeakValueDictionary()
"""Records that some plan of this process holds, by folder, name and etag: of a store they are not requested again."""


def _read_records(
    folder: Folder, files: Sequence[FileInfo], parse: Callable[[Footer | None], R | None]
) -> Iterator[tuple[str, R]]:
    if folder.protocol not in OBJECT_STORES:
        yield from _parsed_records(folder, files, parse)
        return
    keys = {file.name: (f"{parse.__name__} {folder.url}", file.name, file.fingerprint) for file in files}
    known = {name: record for name, key in keys.items() if (record := _held.get(key)) is not None}
    for name, record in _parsed_records(folder, [file for file in files if file.name not in known], parse):
        _held[keys[name]] = known[name] = record
    yield from ((name, known[name]) for name in keys if name in known)


def _parsed_records(
    folder: Folder, files: Sequence[FileInfo], parse: Callable[[Footer | None], R | None]
) -> Iterator[tuple[str, R]]:
    for name, footer in read_footers(folder, files):
        if (record := parse(footer)) is not None:
            yield name, record


def read_footers(folder: Folder, files: Sequence[FileInfo]) -> Iterator[tuple[str, Footer]]:
    """Yield the Parquet footers of many files with their names, one request each; those without one are left out.

    One after the other: a footer takes some ten kilobytes, of which a plan needs one.
    """
    for file, content in read_footer_bytes(folder, files):
        if (footer := _parsed(content)) is not None:
            yield file.name, footer


def read_footer_bytes(folder: Folder, files: Sequence[FileInfo]) -> Iterator[tuple[FileInfo, bytes | None]]:
    """Yield files with their footers as `pq.ParquetFile` opens them; None where there is no whole one.

    Files that are gone are left out.
    """
    for file, tail in folder.read_tails(files, FOOTER_BYTES):
        yield file, _footer_bytes(folder, file.name, tail)


def _read_footer(folder: Folder, name: str) -> Footer | None:
    try:
        return _parsed(_footer_bytes(folder, name, folder.read_tail(name, FOOTER_BYTES)))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _footer_bytes(folder: Folder, name: str, tail: bytes) -> bytes | None:
    """Return a Parquet footer, given the end of its file; it is read anew where that is not all of it."""
    if tail[-4:] != MAGIC or len(tail) < 12:
        return None
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if size > len(tail):
        tail = folder.read_tail(name, size)
    return None if _is_damaged(tail[-size:-8]) else MAGIC + tail[-size:]


def _parsed(content: bytes | None) -> Footer | None:
    try:
        return None if content is None else pq.read_metadata(pa.BufferReader(content))  # without what it describes
    except (OSError, pa.ArrowException):
        return None


def _record(footer: Footer | None) -> tuple[dict[str, Any], int] | None:
    """A footer's record and the file's row count."""
    text = footer.metadata.get(RECORD) if footer is not None and footer.metadata else None
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    if isinstance(value, dict):
        value.pop("footer_crc32", None)
    return (value, footer.num_rows) if footer is not None and isinstance(value, dict) else None
