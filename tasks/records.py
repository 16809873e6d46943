"""The records in the footers of the files that a run writes: what each was made of, and the account of its samples."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.tar_index import indexed_samples
from tasks.shards import Shard
from tasks.storage.folder import FileInfo, Folder

RECORD = b"shard_embed"
"""The key under which a Parquet footer carries its record."""

FOOTER_BYTES = 16 << 10
"""Read from a file's end for its footer: a larger one, of many columns, costs a second request."""

MAGIC = b"PAR1"
Footer: TypeAlias = pq.FileMetaData


@dataclass(frozen=True)
class EmbeddingRecord:
    """What the footer of an embeddings file says of it: which inputs it is made of, and the account of its samples."""

    key: str
    embedder: str
    samples: int
    embedded: int
    quarantined: dict[str, int]
    dimensions: int
    decoder: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    vectors: dict[str, float] = field(default_factory=dict)
    """See `tasks.vector_checks.measure_vectors`."""
    work: dict[str, float] = field(default_factory=dict)
    """When the shard was begun and ended, in seconds since 1970; and for how many seconds its tar was read, the engine
    waited for the decoder and for the model, and the file before it was written."""
    worker: str = ""
    """The machine and the process that did it."""
    ignored: int = 0
    """Members of the tar that are part of no sample, such as names without an extension."""
    ignored_examples: list[str] = field(default_factory=list)
    doubt: str = ""
    """Why the tar may lack members at its end, although it could be read."""
    computed: str = ""
    """The model's precision and device, such as "float32 on a CPU": the embedder's fingerprint has the policy only."""

    @property
    def version(self) -> str:
        """What a merged file depends on: another decoder gives other vectors under the same key."""
        return f"{self.key} {self.decoder}"

    @property
    def balanced(self) -> bool:
        """Whether every sample is either embedded or quarantined."""
        return self.samples == self.embedded + sum(self.quarantined.values())


@dataclass(frozen=True, slots=True)
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


def seconds_in_work(records: Iterable[EmbeddingRecord]) -> float:
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


def with_record(schema: pa.Schema, record: EmbeddingRecord | MergeRecord | PartRecord) -> pa.Schema:
    """The schema with the record in its metadata, and so in the file's footer."""
    return schema.with_metadata({**(schema.metadata or {}), RECORD: json.dumps(asdict(record)).encode()})


def read_embedding_record(folder: Folder, name: str) -> EmbeddingRecord | None:
    """The record of an embeddings file; None unless the footer opens and its counts agree with the file."""
    return embedding_record(_read_footer(folder, name))


def read_merge_record(folder: Folder, name: str) -> MergeRecord | None:
    """The record of a merged file; None unless the footer opens and its counts agree with the file."""
    return merge_record(_read_footer(folder, name))


def embedding_record(footer: Footer | None) -> EmbeddingRecord | None:
    """The record in the footer of an embeddings file; None unless its counts agree with the file."""
    found = _record(footer)
    try:
        record = EmbeddingRecord(**found[0]) if found else None
        return record if found and record and record.balanced and record.embedded == found[1] else None
    except (AttributeError, TypeError):  # written by another version, or foreign
        return None


def account_agrees(shard: Shard, record: EmbeddingRecord) -> bool:
    """Whether the quarantine and the index beside an embeddings file tell of as many samples as its record."""
    quarantined = sum(record.quarantined.values())
    if quarantined and _count_rows(shard.target, shard.quarantine_file) != quarantined:
        return False
    samples = indexed_samples(shard.target.read_head(shard.index_file), shard.tar_fingerprint, shard.key_dot)
    return samples is None or samples == record.samples


def intact(folder: Folder, name: str) -> bool:
    """Whether every page of a Parquet file can be read and has the checksum it was written with."""
    try:
        with folder.open(name) as file:
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            for group in range(parquet.num_row_groups):
                parquet.read_row_group(group, use_threads=False)
    except (OSError, pa.ArrowException):
        return False
    return True


def _count_rows(folder: Folder, name: str) -> int | None:
    """A Parquet file's rows by its footer; None where it does not open."""
    try:
        with folder.open(name) as file:
            return int(pq.read_metadata(file).num_rows)
    except (OSError, pa.ArrowException):
        return None


def merge_record(footer: Footer | None) -> MergeRecord | None:
    """The record in the footer of a merged file; None unless its counts agree with the file."""
    found = _record(footer)
    try:
        record = MergeRecord(**found[0]) if found else None
    except TypeError:
        return None
    return record if found and record and record.rows == found[1] else None


def read_part_record(folder: Folder, name: str) -> PartRecord | None:
    """The record of a file made of several merged files; None unless the footer opens and agrees with the file."""
    found = _record(_read_footer(folder, name))
    try:
        record = PartRecord(**found[0]) if found else None
    except TypeError:
        return None
    return record if found and record and record.rows == found[1] else None


def read_footers(folder: Folder, files: Sequence[FileInfo]) -> Iterator[tuple[str, Footer]]:
    """The Parquet footers of many files with their names, one request each; files without a whole one are left out.

    One after the other: a footer takes some ten kilobytes, of which a plan needs one.
    """
    for file, tail in folder.read_tails(files, FOOTER_BYTES):
        if (footer := _footer(folder, file.name, tail)) is not None:
            yield file.name, footer


def _read_footer(folder: Folder, name: str) -> Footer | None:
    try:
        return _footer(folder, name, folder.read_tail(name, FOOTER_BYTES))
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        return None


def _footer(folder: Folder, name: str, tail: bytes) -> Footer | None:
    """A Parquet footer, given the end of its file; read anew where that is not all of it."""
    if tail[-4:] != MAGIC or len(tail) < 12:
        return None
    size = int.from_bytes(tail[-8:-4], "little") + 8
    if size > len(tail):
        tail = folder.read_tail(name, size)
    try:
        return pq.read_metadata(pa.BufferReader(MAGIC + tail[-size:]))  # a footer is read without what it describes
    except (OSError, pa.ArrowException):
        return None


def _record(footer: Footer | None) -> tuple[dict[str, Any], int] | None:
    """A footer's record and the file's row count."""
    text = footer.metadata.get(RECORD) if footer is not None and footer.metadata else None
    try:
        value = json.loads(text) if text else None
    except ValueError:
        return None
    return (value, footer.num_rows) if footer is not None and isinstance(value, dict) else None
