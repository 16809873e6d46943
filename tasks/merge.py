"""The third stage: metadata joined with layers by id, one shard at a time.

A shard is joined with itself only, so nothing is shuffled. Ids decide which row gets which value; the rows and the
values themselves stay Arrow from file to file, whatever types they have, a row group at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from embedders.errors import InputError, MalformedShard
from embedders.quarantine import QuarantinedSample, Reason
from tasks.dataset.column_types import same_tables
from tasks.dataset.description import ADDED, columns_made, describe, footer
from tasks.dataset.ids import canonical_ids, repeated
from tasks.dataset.metadata import (
    check_columns,
    conform,
    json_members,
    no_rows,
    read_metadata,
    refuse_mismatch,
    repeated_id,
)
from tasks.dataset.vectors import rows_per_group, write_groups
from tasks.layer_rows import LayerRows, column_type, row_bytes
from tasks.layers import quarantine_table
from tasks.plan import MergeOptions, merged_key
from tasks.records import LayerRecord, MergeRecord, with_record
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import Folder

SHARDS_PER_MERGE = 1000
"""Shards of one Dask job: a shard costs Dask milliseconds, a Prefect task a fifth of a second."""
EXAMPLES = 3
"""Ids without a partner that a record names."""


def merge_group(
    shards: Sequence[Shard], records: Mapping[str, Mapping[str, LayerRecord]], options: MergeOptions, client: Any
) -> list[MergeRecord]:
    """Join every shard of a group on the cluster and write its file.

    Args:
        shards: What is joined.
        records: For each shard, the records of its layers, by layer.
        options: How.
        client: A Dask client of the cluster.

    Raises:
        ShardsFailed: Some shards failed; all others are written.
    """
    futures = client.map(
        merge_shard, shards, [records[shard.name] for shard in shards], options=options, pure=False, retries=0
    )
    done, failures = [], []
    for shard, future in zip(shards, futures, strict=True):
        error = future.exception()
        if error is None:
            done.append(future.result())
        else:
            failures.append(ShardFailure.of(shard.name, error))
        future.release()
    if failures:
        raise ShardsFailed(failures)
    return done


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A shard's metadata, and which row gets which row of each layer.

    Attributes:
        metadata: The user's columns.
        ids: The metadata's ids as text.
        places: By layer, (rows of the metadata,) int64: the layer's row for each, or -1.
        layer_ids: By layer, the ids of its rows.
    """

    metadata: pa.Table
    ids: pa.ChunkedArray
    places: Mapping[str, np.ndarray]
    layer_ids: Mapping[str, pa.ChunkedArray]

    @property
    def matched(self) -> np.ndarray:
        """(rows of the metadata,) bool: which have a value in some layer."""
        found = [places >= 0 for places in self.places.values()]
        return np.logical_or.reduce(found) if found else np.zeros(len(self.metadata), bool)


def join(ids: pa.ChunkedArray, layer_ids: pa.ChunkedArray) -> np.ndarray:
    """Return which row of a layer each metadata row gets, by id.

    Args:
        ids: Of the metadata's rows, as text. Of rows that repeat an id the first one counts; a null is no id.
        layer_ids: Of the layer's rows, each there once.

    Returns:
        (rows of the metadata,) int64, -1 where there is none.
    """
    places = pc.index_in(ids, value_set=layer_ids).combine_chunks()
    found = np.array(places.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
    found[repeated(ids)] = -1
    return found


def merge_shard(shard: Shard, records: Mapping[str, LayerRecord], options: MergeOptions) -> MergeRecord:
    """Write a shard's rows with the values of its layers as the shard's file.

    Args:
        shard: The shard.
        records: Of the layers that it has, by name; a column of a layer that it lacks is null.
        options: How they are joined.

    Raises:
        InputError: Rows and images hardly have an id in common, or a value does not fit the dataset's schema.
    """
    metadata, notes = _metadata(shard, options)
    ids = canonical_ids(metadata.column(options.id_col))
    layer_ids = {name: _layer_ids(shard, name) for name in records}
    places = {name: join(ids, found) for name, found in layer_ids.items()}
    joined = Joined(metadata, ids, places, layer_ids)
    left = _unmatched(shard, records, joined, options)
    record = _account(shard, records, options, joined, left)
    if left:
        table = quarantine_table(left)
        shard.target.write(shard.unmatched_file, lambda path: pq.write_table(table, path, compression="zstd"))
    else:
        shard.target.remove(shard.unmatched_file)
    if options.schema is not None and shard.metadata is not None:
        joined = _conformed(shard, joined, options)
    _write(shard, records, joined, options, notes, record)
    return record


def _layer_ids(shard: Shard, layer: str) -> pa.ChunkedArray:
    with arrow_file(shard.target, shard.layer_file(layer)) as file:
        return pq.ParquetFile(file, page_checksum_verification=True).read(["id"], use_threads=False).column(0)


def _metadata(shard: Shard, options: MergeOptions) -> tuple[pa.Table, dict[bytes, bytes]]:
    """Return a shard's metadata without our columns, and the notes that its schema keeps."""
    metadata = read_metadata(shard, options.id_col)
    where = f"{shard.dataset}/{shard.metadata}" if shard.metadata else json_members(shard)
    check_columns(metadata.schema, where, options.names)
    notes = dict(metadata.schema.metadata or {}) if options.in_place else {}
    if options.in_place:
        notes[ADDED] = json.dumps(sorted({*columns_made(metadata.schema), *options.names})).encode()
    metadata = metadata.replace_schema_metadata(None)
    return metadata.drop_columns([name for name in options.names if name in metadata.column_names]), notes


def _conformed(shard: Shard, joined: Joined, options: MergeOptions) -> Joined:
    assert options.schema is not None
    try:
        metadata = conform(joined.metadata, options.schema, options.id_col)
    except InputError as error:
        raise InputError(f"{shard.dataset}/{shard.metadata}: {error}") from error
    return Joined(metadata, joined.ids, joined.places, joined.layer_ids)


def _write(
    shard: Shard,
    records: Mapping[str, LayerRecord],
    joined: Joined,
    options: MergeOptions,
    notes: Mapping[bytes, bytes],
    record: MergeRecord,
) -> None:
    fields = [pa.field(column.name, column_type(column, options.form)) for column in options.columns]
    schema = pa.schema([*joined.metadata.schema, *fields])
    described = describe(options, records)
    schema = with_record(schema.with_metadata({**notes, **footer(schema, described)}), record)
    folder, name = options.place(shard)
    size = rows_per_group(row_bytes(options))
    vectors = [column.name for column in options.columns if column.shape]
    with folder.replacing(name) as path:
        write_groups(
            schema, _tables(shard, records, joined, options, schema, size), path, vectors, size, options.form.encoding
        )
        if options.in_place:
            _prove(path, _tables(shard, records, joined, options, schema, size))
            _like_the_old(folder, name, path)


def _tables(
    shard: Shard,
    records: Mapping[str, LayerRecord],
    joined: Joined,
    options: MergeOptions,
    schema: pa.Schema,
    size: int,
) -> Iterator[pa.Table]:
    """Yield the merged rows, at most `size` at a time: what is in memory twice is that and not the shard."""
    kept = np.arange(len(joined.metadata)) if options.keep_rows else np.flatnonzero(joined.matched)
    metadata = joined.metadata if len(kept) == len(joined.metadata) else joined.metadata.take(kept)
    with contextlib.ExitStack() as stack:
        rows = {
            layer: stack.enter_context(LayerRows.open(shard, layer, options))
            for layer in {column.layer for column in options.columns} & set(records)
        }
        for start in range(0, len(kept), size):
            part = metadata.slice(start, size)
            chosen = kept[start : start + len(part)]
            found = {layer: it.take(joined.places[layer][chosen]) for layer, it in rows.items()}
            values = [
                found[column.layer][column.name]
                if column.name in found.get(column.layer, ())
                else pa.nulls(len(part), schema.field(column.name).type)
                for column in options.columns
            ]
            yield pa.table([*part.columns, *values], schema=schema)


def _unmatched(
    shard: Shard, records: Mapping[str, LayerRecord], joined: Joined, options: MergeOptions
) -> list[QuarantinedSample]:
    """List what the join has left over, but for rows whose image is in quarantine and so listed there.

    Raises:
        InputError: There are no rows, rows and images hardly have an id in common, or an id is there twice where that
            is an error.
    """
    where = f"{shard.dataset}/{shard.metadata}" if shard.metadata else shard.tar
    samples = max((record.samples for record in records.values()), default=0)
    if samples and not len(joined.metadata):
        raise no_rows(where)
    matched = joined.matched
    alone = np.flatnonzero(~matched)
    ids = joined.ids.take(alone).to_pylist()
    refused = _quarantined(shard, records) if len(alone) else set()
    partners = int(matched.sum()) + len(refused.intersection(ids))
    embedded = next((ids for ids in joined.layer_ids.values() if len(ids)), pa.chunked_array([], pa.string()))
    if partners < samples and any(ids):
        examples = next(sample for sample in ids if sample), next(iter([*embedded[:1].to_pylist(), *refused]), "")
        refuse_mismatch(where, options.id_col, partners, (len(joined.metadata), samples), examples)
    seen = set(joined.ids.filter(pa.array(matched)).to_pylist()) if len(alone) else set()
    left: list[QuarantinedSample] = []
    for row, sample, status in zip(alone.tolist(), ids, _statuses(joined.metadata.take(alone)), strict=True):
        at = f"row {row} of {shard.metadata or 'the json members'}"
        if sample is None:
            left.append(QuarantinedSample("", "", Reason.NO_IMAGE, f"{at} has no id"))
        elif sample in seen and options.strict:
            raise repeated_id(where, sample, row)
        elif sample in seen:
            left.append(QuarantinedSample(sample, "", Reason.DUPLICATE_ID, f"{at} repeats the id"))
        elif sample not in refused:
            left.append(QuarantinedSample(sample, "", Reason.NO_IMAGE, at + status))
        if sample is not None:
            seen.add(sample)
    left += [
        QuarantinedSample(sample, "", Reason.NO_METADATA_ROW, f"no row of {shard.metadata}")
        for sample in _without_row(joined)
    ]
    return left


def _without_row(joined: Joined) -> list[str]:
    """Return the ids that some layer has and no metadata row, each once."""
    found: dict[str, None] = {}
    for layer, ids in joined.layer_ids.items():
        mask = np.ones(len(ids), bool)
        mask[joined.places[layer][joined.places[layer] >= 0]] = False
        if mask.any():
            found |= dict.fromkeys(ids.filter(pa.array(mask)).to_pylist())
    return list(found)


def _quarantined(shard: Shard, records: Mapping[str, LayerRecord]) -> set[str]:
    """Return the ids of a shard's samples that have no value in some layer."""
    found: set[str] = set()
    for layer, record in records.items():
        if record.quarantined:
            with arrow_file(shard.target, shard.quarantine_file(layer)) as file:
                found |= set(pq.ParquetFile(file).read(["id"], use_threads=False).column(0).to_pylist())
    return found


def _statuses(rows: pa.Table) -> list[str]:
    """What img2dataset says of each row's download, where it says that it failed."""
    if "status" not in rows.column_names:
        return [""] * len(rows)
    return [
        f": status {status}" if isinstance(status, str) and status != "success" else ""
        for status in rows.column("status").to_pylist()
    ]


def _account(
    shard: Shard,
    records: Mapping[str, LayerRecord],
    options: MergeOptions,
    joined: Joined,
    left: Sequence[QuarantinedSample],
) -> MergeRecord:
    """Return the record of a merged file."""
    images = [sample for sample in left if sample.reason == Reason.NO_METADATA_ROW]
    rows = [sample for sample in left if sample.reason == Reason.NO_IMAGE]
    not_fetched = sum(": status " in sample.detail for sample in rows)
    total, matched = len(joined.metadata), int(joined.matched.sum())
    return MergeRecord(
        key=merged_key(shard, records, options),
        rows=total if options.keep_rows else matched,
        rows_without_embedding=total - matched,
        embeddings_without_row=len(images),
        rows_without_image=len(rows),
        rows_not_fetched=not_fetched,
        rows_repeated=len(left) - len(images) - len(rows),
        unmatched=len(left),
        examples=[sample.id for sample in (images[:EXAMPLES] or rows[:EXAMPLES])],
    )


def _prove(path: str, expected: Iterator[pa.Table]) -> None:
    """Read a file back, checksums and all, before it takes the place of the user's own.

    :raises MalformedShard: it does not hold what was written.
    """
    with pq.ParquetFile(path, page_checksum_verification=True) as written:
        groups = 0
        for table in expected:
            if groups >= written.num_row_groups or not same_tables(written.read_row_group(groups), table):
                raise MalformedShard(f"{path}: row group {groups} does not read back as written; the old file stays")
            groups += 1
        if groups != written.num_row_groups:
            raise MalformedShard(f"{path}: {written.num_row_groups} row groups instead of {groups}; the old file stays")


def _like_the_old(folder: Folder, name: str, path: str) -> None:
    """Give a file the permissions of the one that it replaces."""
    if folder.is_local and os.path.exists(folder.path(name)):
        shutil.copymode(folder.path(name), path)


@task(
    name="metadata-merge",
    task_run_name="merge {span}",
    cache_policy=NO_CACHE,  # the merged file's footer says what it was made of
    **RETRIES,
)
def merge_shards(
    shards: Sequence[Shard], records: Mapping[str, Mapping[str, LayerRecord]], options: MergeOptions, span: str
) -> list[MergeRecord]:
    """Join a group of shards as a job of the cluster this task runs on; see `merge_group`."""
    from distributed import worker_client

    with worker_client() as client:  # gives this task's thread back meanwhile: a lone worker would wait for itself
        return merge_group(shards, records, options, client)
