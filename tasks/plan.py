"""What is left to do: read the footers of what is there, and name what is missing. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

import pyarrow as pa

from embedders.errors import InputError
from tasks.dataset.metadata import unified_schema, usable_schema
from tasks.dataset.vectors import PLAIN, VectorFormat
from tasks.keys import digest, embedding_key, merge_key
from tasks.records import (
    EmbeddingRecord,
    Footer,
    MergeRecord,
    account_agrees,
    embedding_record,
    intact,
    merge_record,
    read_footers,
)
from tasks.shards import UNMATCHED, Shard
from tasks.storage.folder import Folder, in_bulk

R = TypeVar("R")
T = TypeVar("T")
MAX_TASKS = 400
SHARDS_PER_GROUP = 32


@dataclass(frozen=True)
class MergeOptions:
    """How embeddings and metadata are joined, and how the result is written.

    `null_rows` keeps rows without an embedding, with a null in its place. `strict` fails a shard whose metadata repeats
    an id. `schema` is what the metadata of all shards has in common, None where each file keeps its own; `dimensions`
    of the vectors are 0 until some are there. `embedder` is the embedder's fingerprint, for the files' footers.
    """

    id_col: str
    column: str
    null_rows: bool = False
    strict: bool = False
    form: VectorFormat = PLAIN
    in_place: bool = False
    rows_per_file: int | None = None
    schema: pa.Schema | None = None
    dimensions: int = 0
    embedder: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def keep_rows(self) -> bool:
        """Whether rows without an embedding stay: always in the user's own files."""
        return self.null_rows or self.in_place

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for the key: what changes a merged file."""
        parts = {"id_col": self.id_col, "column": self.column, "null_rows": self.keep_rows, **self.form.as_dict()}
        size = self.dimensions if self.form.type == "fixed_size_list" else 0
        return parts | {"schema": self._schema_digest, "dimensions": size, "in_place": self.in_place}

    @cached_property
    def _schema_digest(self) -> str | None:
        return None if self.schema is None else digest(str(self.schema.remove_metadata()))

    def place(self, shard: Shard) -> tuple[Folder, str]:
        """Where a shard's merged file lies: a folder, and the file's name in it."""
        return self.folder(shard), f"{shard.name}.parquet"

    def folder(self, shard: Shard) -> Folder:
        """The folder of merged files: beside the tars, in the output, or where files of many shards are made from."""
        if self.in_place:
            return shard.source
        return Folder(f"{shard.output.rstrip('/')}/{'metadata' if self.rows_per_file is None else 'merged'}")


def merged_key(shard: Shard, record: EmbeddingRecord, options: MergeOptions) -> str:
    """What a shard's merged file is a pure function of.

    A file beside a tar is its own metadata, so that does not count; json members have no schema before they are read.
    """
    if options.in_place:
        shard = replace(shard, metadata_fingerprint=None)
    elif shard.metadata is None:
        options = replace(options, schema=None)
    return merge_key(shard, record.version, options.as_dict())


@dataclass(frozen=True)
class Plan:
    """Every shard, with the record of each that is embedded and of each that is merged."""

    shards: tuple[Shard, ...]
    embedder: str
    options: MergeOptions
    embedded: dict[str, EmbeddingRecord]
    merged: dict[str, MergeRecord]
    gone: tuple[str, ...] = ()
    """Shards that the output has embeddings of and the dataset has no more."""

    @property
    def to_embed(self) -> list[Shard]:
        """The shards without embeddings that belong to their tar and embedder."""
        return [shard for shard in self.shards if shard.name not in self.embedded]

    @property
    def to_merge(self) -> list[Shard]:
        """The embedded shards whose merged file is missing or older than its inputs."""
        return [shard for shard in self.shards if shard.name in self.embedded and shard.name not in self.merged]

    def embedding_key(self, shard: Shard) -> str:
        """The key of the shard's embeddings."""
        return embedding_key(shard, self.embedder, self.options.id_col)


def make_plan(
    shards: Sequence[Shard],
    embedder: str,
    options: MergeOptions,
    *,
    overwrite: bool = False,
    accepts: Callable[[str], bool] = lambda decoder: True,
    verify: bool = False,
) -> Plan:
    """Read what the output holds of these shards.

    A shard's embeddings count as done if their footer opens, its key is the one expected, and its counts agree with
    the file's rows, the quarantine and the index.

    :param embedder: the digest of the embedder's fingerprint.
    :param accepts: whether a shard that a decoder decoded counts as done.
    :param verify: whether to read every page of what looks done and check it against its checksum.
    :raises InputError: the output was made with another embedder and `overwrite` is not set.
    """
    target = shards[0].target
    embedded: dict[str, EmbeddingRecord] = {}
    embeddings = Folder(f"{target.url.rstrip('/')}/embeddings")
    for shard, record in zip(shards, _records(shards, embeddings, embedding_record), strict=True):
        if record is None:
            continue
        if record.embedder != embedder and not overwrite:
            raise InputError(
                f"{target.url} holds embeddings of another model or setting (see its manifest.json); "
                "give another --output, or --overwrite to replace them"
            )
        if record.key == embedding_key(shard, embedder, options.id_col) and accepts(record.decoder):
            embedded[shard.name] = record
    embedded = _only(shards, embedded, lambda shard: account_agrees(shard, embedded[shard.name]))
    if verify:
        embedded = _only(shards, embedded, lambda shard: intact(target, shard.embeddings_file))
    options = replace(options, dimensions=max((record.dimensions for record in embedded.values()), default=0))
    quarantined = {file.name for file in Folder(f"{target.url.rstrip('/')}/quarantine").list(UNMATCHED)}
    merged: dict[str, MergeRecord] = {}
    found = _records(shards, options.folder(shards[0]), merge_record) if embedded else [None] * len(shards)
    for shard, done in zip(shards, found, strict=True):
        record = embedded.get(shard.name)
        listed = done and (not done.unmatched or f"{shard.name}{UNMATCHED}" in quarantined)
        if done and record and listed and done.key == merged_key(shard, record, options):
            merged[shard.name] = done
    if verify:
        merged = _only(shards, merged, lambda shard: intact(*options.place(shard)))
    there = {file.name.removesuffix(".parquet") for file in embeddings.list(".parquet")}
    gone = sorted(there - {shard.name for shard in shards})
    return Plan(tuple(shards), embedder, options, embedded, merged, tuple(gone))


def _only(shards: Sequence[Shard], records: dict[str, R], holds: Callable[[Shard], bool]) -> dict[str, R]:
    """The records of the shards for which something holds that has to be read from their files."""
    asked = [shard for shard in shards if shard.name in records]
    answers = in_bulk(holds, asked)
    return {shard.name: records[shard.name] for shard, answer in zip(asked, answers, strict=True) if answer}


def plan_in_one_schema(
    shards: Sequence[Shard], embedder: str, options: MergeOptions, held: pa.Schema | None, **how: Any
) -> Plan:
    """Plan, with the schema that the metadata of all shards has in common; see `make_plan`.

    The footers of metadata that is not merged yet are read, so that what cannot be one schema is found before any
    image is. Where they widen the schema, what is merged already is joined again. In place each file keeps its own.

    :param held: the schema of what is merged already, as `tasks.dataset.schema.held_schema` says it.
    :raises InputError: columns of one name cannot be of one type, or one of them cannot be carried through.
    """
    plan = make_plan(shards, embedder, replace(options, schema=held), **how)
    left = [*plan.to_embed, *plan.to_merge]
    if options.in_place:
        described = [shard for shard in left if shard.metadata is not None]
        in_bulk(lambda shard: usable_schema(shard, options.id_col, options.column), described)
    if options.in_place or not left:
        return plan
    schema = unified_schema(left, options.id_col, options.column, held if plan.merged else None)
    if not schema.names or (held is not None and schema.equals(held)):
        return plan
    return make_plan(shards, embedder, replace(options, schema=schema), **how)


def _records(shards: Sequence[Shard], folder: Folder, record: Callable[[Footer | None], T | None]) -> list[T | None]:
    """The record of each shard's file in a folder, or None; one listing, then footers in bulk."""
    there = {file.name: file for file in folder.list(".parquet")}
    names = [f"{shard.name}.parquet" for shard in shards]
    footers = read_footers(folder, [there[name] for name in names if name in there])
    found = {name: record(footer) for name, footer in footers}
    return [found.get(name) for name in names]


def group_shards(shards: Sequence[Shard], workers: int) -> list[tuple[Shard, ...]]:
    """Split shards into tasks: few enough for Prefect, many enough to keep every worker busy to the end."""
    even = -(-len(shards) // (max(workers, 1) * 8))
    size = max(1, min(even, SHARDS_PER_GROUP), -(-len(shards) // MAX_TASKS))
    return [tuple(shards[i : i + size]) for i in range(0, len(shards), size)]
