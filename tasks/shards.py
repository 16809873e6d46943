"""What a shard is: where its files lie, what identifies their content, and the record its output carries."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from embedders.webdataset import KeyDot, image_extensions, indexed_samples
from tasks.storage import FileInfo, Folder, in_bulk

FORMAT = 1
"""Version of what embeddings files hold; part of every key, so a change makes them again."""

UNPACK = {".tar.gz": "gunzip FILE", ".tgz": "gunzip FILE", ".tar.zst": "zstd -d --rm FILE", ".tar.xz": "unxz FILE"}
"""Compressed tars, and what unpacks them."""

UNMATCHED = ".unmatched.parquet"
"""How the files end that list what the merge could not join."""

RESERVED = UNMATCHED.replace(".parquet", ".tar")
"""How no tar may end: the quarantine of a.unmatched.tar would be the file that lists what of a.tar was not joined."""

RECORD = b"shard_embed"
"""The key under which a Parquet footer carries its record."""

FOOTER_BYTES = 16 << 10
"""Read from a file's end for its footer: a larger one, of many columns, costs a second request."""

WRITTEN = ("embeddings", "index", "merged", "metadata", "quarantine")
"""The folders of an output that hold a file per shard."""

MAGIC = b"PAR1"
Footer: TypeAlias = pq.FileMetaData


@dataclass(frozen=True)
class Shard:
    """A tar and the metadata Parquet beside it, named by the tar's path in the dataset without its ending.

    `tar_fingerprint` goes into keys. `tar_listed` is what the store said of the tar when the run began, where that is
    something else. `key_dot` is the dot of a file name that ends a sample's key.
    """

    name: str
    dataset: str
    output: str
    tar_bytes: int
    tar_fingerprint: str
    metadata_fingerprint: str | None
    tar_listed: str | None = None
    key_dot: KeyDot = "first"

    @property
    def source(self) -> Folder:
        """The dataset's folder."""
        return Folder(self.dataset)

    @property
    def target(self) -> Folder:
        """The output's folder."""
        return Folder(self.output)

    @property
    def tar(self) -> str:
        """The tar's name in the dataset."""
        return f"{self.name}.tar"

    @property
    def metadata(self) -> str | None:
        """The name of the Parquet beside the tar, in the dataset; None where there is none."""
        return None if self.metadata_fingerprint is None else f"{self.name}.parquet"

    @property
    def index_file(self) -> str:
        """DALI's index, in the output."""
        return f"index/{self.name}.idx"

    @property
    def embeddings_file(self) -> str:
        """Ids and vectors, in the output: the cache of the shard."""
        return f"embeddings/{self.name}.parquet"

    @property
    def quarantine_file(self) -> str:
        """What could not be embedded, in the output; there only if there is such a sample."""
        return f"quarantine/{self.name}.parquet"

    @property
    def unmatched_file(self) -> str:
        """Metadata rows without an image and images without a row, in the output; there only if there are any."""
        return f"quarantine/{self.name}{UNMATCHED}"

    @property
    def merged_file(self) -> str:
        """The metadata joined with the embeddings, in the output."""
        return f"metadata/{self.name}.parquet"


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
    """See `tasks.checks.measure_vectors`."""
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


def find_shards(dataset: str, output: str, key_dot: KeyDot = "first") -> list[Shard]:
    """Every `.tar` below the dataset's folder, sorted by name.

    :param key_dot: which dot of a file name ends a sample's key.
    :raises InputError: no such folder, no tar in it, compressed ones, which have no offsets to read at, a name that is
        not UTF-8, or a tar whose files in the output would be another one's.
    """
    for path in (dataset, output):
        _check_name(path)
    folder = Folder(dataset)
    try:
        files = folder.list(".tar", ".parquet", *UNPACK)
        if not any(file.name.endswith((".tar", *UNPACK)) for file in files):
            raise _no_shards(folder)
    except OSError as error:
        folder.refuse(error)
    metadata = {f.name.removesuffix(".parquet"): f.fingerprint for f in files if f.name.endswith(".parquet")}
    shards = []
    for file in files:
        for suffix, command in UNPACK.items():
            if file.name.endswith(suffix):
                raise InputError(f"{dataset}/{file.name}: compressed shards are not read; unpack it: {command}")
        if file.name.endswith(".tar"):
            _check_name(f"{dataset}/{file.name}")
            name = file.name.removesuffix(".tar")
            if file.name.endswith(RESERVED):
                raise InputError(
                    f"{dataset}/{file.name}: the quarantine has files of this name for what could not be joined; "
                    f"rename the tar and its Parquet, such as to {name.replace('.', '-')}.tar"
                )
            metadata_fingerprint = metadata.get(name)
            shard = Shard(name, dataset, output, file.size, file.fingerprint, metadata_fingerprint, key_dot=key_dot)
            shards.append(shard)
    return shards


def _no_shards(folder: Folder) -> InputError:
    """What is said of a dataset without shards: what it is instead, and what to do."""
    url = folder.url.rstrip("/")
    if not folder.exists():
        parent, _, name = url.rpartition("/")
        if not folder.is_file():
            return InputError(f"{url}: no such folder; give the folder that holds the .tar shards")
        if name.endswith(".tar"):
            return InputError(f"{url}: this is one shard; give the folder that holds it: {parent or '.'}")
        if name.endswith(".zip"):
            unpack = f"unzip {name} -d pictures && {_pack('pictures')}"
            return InputError(f"{url}: a zip archive; unpack it and pack its files into tars: {unpack}")
        return InputError(f"{url}: a file; give the folder that holds the .tar shards")
    images = folder.list(*(f".{extension}" for kind in image_extensions() for extension in (kind, kind.upper())))
    if images:
        found = f"no .tar files, but pictures such as {images[0].name} ({len(images):,} in all)"
        return InputError(f"{url}: {found}; pack them: {_pack(url)}, and give shards as the dataset")
    zips = folder.list(".zip")
    if zips:
        found = f"no .tar files, but zip archives such as {zips[0].name} ({len(zips):,} in all)"
        return InputError(f"{url}: {found}; unpack them and pack their files into tars: {_pack('pictures')}")
    return InputError(f"{url}: no .tar files; give the folder that holds the WebDataset shards")


def _pack(folder: str) -> str:
    return f"mkdir shards && tar -C {shlex.quote(folder)} -cf shards/00000.tar ."


def _check_name(path: str) -> None:
    """Refuse names that neither a Parquet file nor Prefect can store."""
    try:
        path.encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode(errors="backslashreplace")
        raise InputError(
            f"{shown}: its name is not UTF-8; rename it (convmv -f latin1 -t utf8 finds such names)"
        ) from error


def with_content_fingerprints(shards: Sequence[Shard]) -> list[Shard]:
    """The same shards, each identified by a hash of its tar's bytes; reads every tar whole."""

    def hashed(shard: Shard) -> Shard:
        return replace(shard, tar_fingerprint=content_fingerprint(shard), tar_listed=shard.tar_fingerprint)

    return in_bulk(hashed, shards)


def content_fingerprint(shard: Shard) -> str:
    """BLAKE2b of a tar's bytes."""
    with shard.source.local_copy(shard.tar) as path, open(path, "rb") as file:
        return "blake2b-" + hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def sweep(output: str) -> None:
    """Remove what killed writers have left in an output; what else lies there is not looked at."""
    Folder(output).sweep(below=False)
    for kind in WRITTEN:
        Folder(f"{output.rstrip('/')}/{kind}").sweep()


class ShardReplaced(Exception):
    """A tar is another one than when the run began. Its shard fails by name; the next run takes it as it is then."""


def check_unchanged(shard: Shard) -> None:
    """Prove that a tar is still the one the run began with, by what its store says of it.

    :raises ShardReplaced: it is another one, or gone.
    """
    listed = shard.tar_listed or shard.tar_fingerprint
    if not shard.source.is_local and "-" not in listed:
        return  # a store that lists no times and no etags
    if shard.source.fingerprint(shard.tar) != listed:
        raise ShardReplaced(f"{shard.tar} was replaced or removed while the run went on; run again")


def digest(value: Any) -> str:
    """32 hexadecimal digits that identify a plain JSON value."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def embedding_key(shard: Shard, embedder: str, id_col: str) -> str:
    """What a shard's embeddings are a pure function of: the tar's content and the embedder's digest.

    The name is in it too: two tars of one size and time are told apart, and so are their outputs if they are swapped.
    """
    parts = {"shard": shard.name, "tar": shard.tar_fingerprint, "embedder": embedder, "id": id_col}
    if shard.key_dot != "first":
        parts["key_dot"] = shard.key_dot
    return digest(parts | {"format": FORMAT})


def merge_key(shard: Shard, embedding: str, options: dict[str, Any]) -> str:
    """What a merged file is a pure function of: the embeddings, the metadata's content, how they are joined."""
    parts = {"embeddings": embedding, "metadata": shard.metadata_fingerprint, "options": options}
    return digest(parts | {"format": FORMAT})


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
