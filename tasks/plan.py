"""What is left to do: read the footers of what is there, and name what is missing. Nothing is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from embedders.errors import InputError
from tasks.shards import (
    EmbeddingRecord,
    Footer,
    MergeRecord,
    Shard,
    account_agrees,
    embedding_key,
    embedding_record,
    intact,
    merge_key,
    merge_record,
    read_footers,
)
from tasks.storage import Folder, in_bulk

R = TypeVar("R")
T = TypeVar("T")
MAX_TASKS = 400
SHARDS_A_TASK = 32


@dataclass(frozen=True)
class MergeOptions:
    """How embeddings and metadata are joined. `null_rows` keeps rows without an embedding, with a null in its place."""

    id_col: str
    column: str
    null_rows: bool = False

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON, for the key."""
        return {"id_col": self.id_col, "column": self.column, "null_rows": self.null_rows}


@dataclass(frozen=True)
class Plan:
    """Every shard, with the record of each that is embedded and of each that is merged."""

    shards: tuple[Shard, ...]
    embedder: str
    id_col: str
    embedded: dict[str, EmbeddingRecord]
    merged: dict[str, MergeRecord]

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
        return embedding_key(shard, self.embedder, self.id_col)


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
    for shard, record in zip(shards, _records(shards, "embeddings", embedding_record), strict=True):
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
    merged: dict[str, MergeRecord] = {}
    for shard, done in zip(shards, _records(shards, "metadata", merge_record), strict=True):
        record = embedded.get(shard.name)
        if done and record and done.key == merge_key(shard, record.version, options.as_dict()):
            merged[shard.name] = done
    if verify:
        merged = _only(shards, merged, lambda shard: intact(target, shard.merged_file))
    return Plan(tuple(shards), embedder, options.id_col, embedded, merged)


def _only(shards: Sequence[Shard], records: dict[str, R], holds: Callable[[Shard], bool]) -> dict[str, R]:
    """The records of the shards for which something holds that has to be read from their files."""
    asked = [shard for shard in shards if shard.name in records]
    answers = in_bulk(holds, asked)
    return {shard.name: records[shard.name] for shard, answer in zip(asked, answers, strict=True) if answer}


def _records(shards: Sequence[Shard], kind: str, record: Callable[[Footer | None], T]) -> list[T]:
    """The record of each shard's file of a kind, or None; one listing, then footers in bulk."""
    folder = Folder(f"{shards[0].target.url.rstrip('/')}/{kind}")
    there = {file.name: file for file in folder.list(".parquet")}
    names = [f"{shard.name}.parquet" for shard in shards]
    footers = read_footers(folder, [there[name] for name in names if name in there])
    return [record(footers.get(name)) for name in names]


def group_shards(shards: Sequence[Shard], workers: int) -> list[tuple[Shard, ...]]:
    """Split shards into tasks: few enough for Prefect, many enough to keep every worker busy to the end."""
    even = -(-len(shards) // (max(workers, 1) * 8))
    size = max(1, min(even, SHARDS_A_TASK), -(-len(shards) // MAX_TASKS))
    return [tuple(shards[i : i + size]) for i in range(0, len(shards), size)]
