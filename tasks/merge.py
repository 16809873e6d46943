"""The third stage: metadata joined with layers by id, one shard at a time.

A shard is joined with itself only, so nothing is shuffled. Ids decide which row gets which value; the rows and the
values themselves stay Arrow from file to file, whatever types they have, a row group at a time.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import State, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from embedders.errors import InputError, MalformedShard
from embedders.quarantine import QuarantinedSample, Reason
from tasks.dataset.column_types import same_tables
from tasks.dataset.description import ADDED, columns_made, describe, footer
from tasks.dataset.ids import canonical_ids, repeated
from tasks.dataset.join import Join, chosen_join, join_ids
from tasks.dataset.metadata import (
    MetadataRows,
    check_columns,
    conform,
    json_members,
    no_rows,
    open_rows,
    refuse_mismatch,
    repeated_id,
)
from tasks.dataset.vectors import write_groups
from tasks.hardware import count_gpus
from tasks.layer_rows import LayerFile, check_column_types, column_type, group_rows, vector_columns
from tasks.layers import quarantine_table
from tasks.merge_options import MergeOptions
from tasks.plan import merged_key
from tasks.records import LayerRecord, MergeRecord, read_merge_record, seal_footer, with_record
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.run_names import run_name
from tasks.shards import Shard
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import Folder
from tasks.worker.dask_worker import dask_worker
from tasks.worker.side_process import aside

EXAMPLES = 3
"""Ids without a partner that a record names."""


def merge_group(
    shards: Sequence[Shard],
    records: Mapping[str, Mapping[str, LayerRecord]],
    options: MergeOptions,
    join: Join = "auto",
) -> list[MergeRecord]:
    """Join every shard of a group, one after the other, and write its file.

    Args:
        shards: What is joined.
        records: For each shard, the records of its layers, by layer.
        options: How.
        join: What finds the row of each id; see `tasks.dataset.join`.

    Raises:
        ShardsFailed: Some shards failed; all others are written.
    """
    done, failures = [], []
    for shard in shards:
        try:
            done.append(_merge_aside(shard, records[shard.name], options, join))
        except Exception as error:
            failures.append(ShardFailure.of(shard.name, error))
    if failures:
        raise ShardsFailed(failures)
    return done


def _merge_aside(shard: Shard, records: Mapping[str, LayerRecord], options: MergeOptions, join: Join) -> MergeRecord:
    """Merge a shard; beside the process that feeds a GPU, which must not wait for the Python that this takes.

    A shard that cuDF joins stays in the process that may use the GPU.
    """
    samples = max((record.samples for record in records.values()), default=0)
    if dask_worker() is None or not count_gpus() or chosen_join(join, samples) == "cudf":
        return merge_shard(shard, records, options, join)
    return aside(merge_shard, shard, records, options, join, wait=True)


def _done_before(shard: Shard, records: Mapping[str, LayerRecord], options: MergeOptions) -> MergeRecord | None:
    """Return the record of a merged file that is as it should be, by the planner's own measure."""
    record = read_merge_record(*options.place(shard))
    if record is None or record.key != merged_key(shard, records, options):
        return None
    return record if not record.unmatched or shard.target.has(shard.unmatched_file) else None


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A shard's metadata and its layers, and which row gets which row of each layer.

    Attributes:
        metadata: The shard's rows.
        names: The columns of the metadata that go into the file.
        ids: The ids of the metadata's rows as text.
        layers: By name, the open layer files.
        layer_ids: By layer, the ids of its rows.
        places: By layer, (rows of the metadata,) int64: the layer's row for each, or -1.
    """

    metadata: MetadataRows
    names: list[str]
    ids: pa.ChunkedArray
    layers: Mapping[str, LayerFile]
    layer_ids: Mapping[str, pa.ChunkedArray]
    places: Mapping[str, np.ndarray]

    @property
    def matched(self) -> np.ndarray:
        """(rows of the metadata,) bool: which have a value in some layer."""
        found = [places >= 0 for places in self.places.values()]
        return np.logical_or.reduce(found) if found else np.zeros(len(self.ids), bool)


def merge_shard(
    shard: Shard, records: Mapping[str, LayerRecord], options: MergeOptions, join: Join = "auto"
) -> MergeRecord:
    """Write a shard's rows with the values of its layers as the shard's file.

    Args:
        shard: The shard.
        records: Of the layers that it has, by name; a column of a layer that it lacks is null.
        options: How they are joined.
        join: What finds the row of each id.

    Raises:
        InputError: Rows and images hardly have an id in common, or a value does not fit the dataset's schema.
        MalformedShard: A layer does not hold what its record says.
    """
    with contextlib.ExitStack() as stack:
        metadata = stack.enter_context(open_rows(shard, options.id_col))
        check_columns(metadata.schema, _where(shard), options.names)
        for of_layer in records.values():
            check_column_types(shard, of_layer, options)
        layers = {name: stack.enter_context(LayerFile.open(shard, name, options)) for name in records}
        ids = canonical_ids(metadata.column(options.id_col))
        layer_ids = {name: layer.ids() for name, layer in layers.items()}
        ours = {name for name, layer in columns_made(metadata.schema).items() if layer in options.layers}
        names = [name for name in metadata.schema.names if name not in ours.union(options.names)]
        joined = Joined(metadata, names, ids, layers, layer_ids, join_ids(ids, layer_ids, join))
        left = _unmatched(shard, records, joined, options)
        record = _account(shard, records, options, joined, left)
        if left:
            table = quarantine_table(left)
            shard.target.write(shard.unmatched_file, lambda path: pq.write_table(table, path, compression="zstd"))
        else:
            shard.target.remove(shard.unmatched_file)
        _write(shard, records, joined, options, record)
    return record


def _where(shard: Shard) -> str:
    """Return how messages name a shard's metadata."""
    return f"{shard.dataset}/{shard.metadata}" if shard.metadata else json_members(shard)


def _write(
    shard: Shard, records: Mapping[str, LayerRecord], joined: Joined, options: MergeOptions, record: MergeRecord
) -> None:
    """Write the merged file; in place it is read back before it takes the place of the user's."""
    schema = _schema(shard, records, joined, options, record)
    folder, name = options.place(shard)
    size = group_rows(options)
    with folder.replacing(name) as path:
        tables = _tables(shard, joined, options, schema, size)
        write_groups(schema, tables, path, vector_columns(options), size, options.form.encoding)
        seal_footer(path)
        if options.in_place:
            _prove(path, _tables(shard, joined, options, schema, size))
            _like_the_old(folder, name, path)


def _schema(
    shard: Shard, records: Mapping[str, LayerRecord], joined: Joined, options: MergeOptions, record: MergeRecord
) -> pa.Schema:
    """Return the schema of the merged file, with what its footer says."""
    given = joined.metadata.schema
    fields = [given.field(name) for name in joined.names]
    if _conforms(shard, options):
        assert options.schema is not None
        fields = list(options.schema)
    schema = pa.schema(
        [*fields, *(pa.field(column.name, column_type(column, options.form)) for column in options.columns)]
    )
    notes = {}
    if options.in_place:  # what the user noted in a file of their own stays
        notes = dict(given.metadata or {})
        kept = {name: layer for name, layer in columns_made(given).items() if name in joined.names}
        new = {column.name: column.layer for column in options.columns}
        notes[ADDED] = json.dumps(kept | new, sort_keys=True).encode()
    return with_record(schema.with_metadata({**notes, **footer(schema, describe(options, records))}), record)


def _conforms(shard: Shard, options: MergeOptions) -> bool:
    """Return whether a shard's rows are brought to the schema of the dataset; json members have one of their own."""
    return options.schema is not None and shard.metadata is not None


def _tables(shard: Shard, joined: Joined, options: MergeOptions, schema: pa.Schema, size: int) -> Iterator[pa.Table]:
    """Yield the merged rows, `size` at a time: what is in memory twice is that and not the shard."""
    values = {name: layer.values(joined.places[name]) for name, layer in joined.layers.items()}
    for part, rows in _even(_kept(shard, joined, options, size), size):
        found: dict[str, pa.ChunkedArray] = {}
        for name, layer in values.items():
            found |= layer.take(joined.places[name][rows])
        columns = [
            found[column.name] if column.name in found else pa.nulls(len(part), schema.field(column.name).type)
            for column in options.columns
        ]
        yield pa.table([*part.columns, *columns], schema=schema)


def _kept(shard: Shard, joined: Joined, options: MergeOptions, size: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the rows of the metadata that stay, in the schema of the dataset, with their numbers."""
    at, matched = 0, joined.matched
    for table in joined.metadata.read(joined.names, size):
        rows = np.arange(at, at + len(table))
        at += len(table)
        if not len(table):
            continue
        if not options.keep_rows and not matched[rows[0] : at].all():
            chosen = np.flatnonzero(matched[rows[0] : at])
            table, rows = table.take(pa.array(chosen)), rows[chosen]
        if _conforms(shard, options):
            assert options.schema is not None
            try:
                table = conform(table.replace_schema_metadata(None), options.schema, options.id_col)
            except InputError as error:
                raise InputError(f"{_where(shard)}: {error}") from error
        yield table, rows


def _even(tables: Iterator[tuple[pa.Table, np.ndarray]], size: int) -> Iterator[tuple[pa.Table, np.ndarray]]:
    """Yield the same rows, `size` at a time, and their numbers."""
    waiting: list[tuple[pa.Table, np.ndarray]] = []
    rows = 0
    for part in tables:
        waiting.append(part)
        rows += len(part[1])
        while rows >= size:
            table, numbers = _joined(waiting)
            yield table.slice(0, size), numbers[:size]
            rows -= size
            waiting = [(table.slice(size), numbers[size:])]
    if rows:
        yield _joined(waiting)


def _joined(parts: Sequence[tuple[pa.Table, np.ndarray]]) -> tuple[pa.Table, np.ndarray]:
    parts = [part for part in parts if len(part[1])]
    if len(parts) == 1:
        return parts[0]
    return pa.concat_tables([table for table, _ in parts]), np.concatenate([rows for _, rows in parts])


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
    if samples and not len(joined.ids):
        raise no_rows(where)
    matched = joined.matched
    alone = np.flatnonzero(~matched)
    ids = joined.ids.take(pa.array(alone)).to_pylist()
    refused = _quarantined(shard, records) if len(alone) else set()
    partners = int(matched.sum()) + len(refused.intersection(ids))
    embedded = next((ids for ids in joined.layer_ids.values() if len(ids)), pa.chunked_array([], pa.string()))
    if partners < samples and any(ids):
        examples = next(sample for sample in ids if sample), next(iter([*embedded[:1].to_pylist(), *refused]), "")
        refuse_mismatch(where, options.id_col, partners, (len(joined.ids), samples), examples)
    again = set(repeated(joined.ids).tolist()) if len(alone) else set()
    left: list[QuarantinedSample] = []
    for row, sample, status in zip(alone.tolist(), ids, _statuses(joined.metadata, alone), strict=True):
        at = f"row {row} of {shard.metadata or 'the json members'}"
        if sample is None:
            left.append(QuarantinedSample("", "", Reason.NO_IMAGE, f"{at} has no id"))
        elif row in again and options.strict:
            raise repeated_id(where, sample, row)
        elif row in again:
            left.append(QuarantinedSample(sample, "", Reason.DUPLICATE_ID, f"{at} repeats the id"))
        elif sample not in refused:
            left.append(QuarantinedSample(sample, "", Reason.NO_IMAGE, at + status))
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


def _statuses(metadata: MetadataRows, rows: np.ndarray) -> list[str]:
    """Return what img2dataset says of some rows' downloads, where it says that they failed."""
    if not len(rows) or "status" not in metadata.schema.names:
        return [""] * len(rows)
    return [
        f": status {status}" if isinstance(status, str) and status != "success" else ""
        for status in metadata.column("status").take(pa.array(rows)).to_pylist()
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
    total, matched = len(joined.ids), int(joined.matched.sum())
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

    Raises:
        MalformedShard: It does not hold what was written.
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
    task_run_name=run_name("merge"),
    cache_policy=NO_CACHE,  # the merged file's footer says what it was made of
    persist_result=False,
    **RETRIES,
)
def merge_shards(
    shards: Sequence[Shard],
    records: Mapping[str, Mapping[str, LayerRecord]],
    options: MergeOptions,
    span: str = "",
    join: Join = "auto",
    there: Collection[str] = (),
) -> list[MergeRecord] | State[list[MergeRecord]]:
    """Join the metadata of a group of shards with their layers, one shard after the other; write the dataset's files.

    Args:
        shards: The group.
        records: For each shard, the records of its layers, by layer.
        options: How they are joined.
        span: The group's name in Prefect's UI; by default those of its first and last shard.
        join: What finds the row of each id; see `tasks.dataset.join`.
        there: Names of shards that have a merged file, which stays if it is as it should be.

    Returns:
        The record of each shard's file. The state is `Cached` if all were as they should be.

    Raises:
        ShardsFailed: Some shards failed, after retries where these may help; all others are written.

    Example:
        >>> futures = [merge_shards.submit(*group) for group in plan.again().groups_to_merge()]
    """
    if dask_worker() is not None:
        from distributed import secede

        secede()  # its thread is for the next embedding; what feeds a GPU must not wait for a merge
    asked = [shard for shard in shards if shard.name in there]
    found = {shard.name: _done_before(shard, records[shard.name], options) for shard in asked}
    left = [shard for shard in shards if found.get(shard.name) is None]
    merged = [record for record in found.values() if record is not None] + merge_group(left, records, options, join)
    return merged if left else Completed(name="Cached", data=merged)
