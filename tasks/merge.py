"""The third stage: metadata joined with embeddings by id, one Dask DataFrame partition a shard.

The same dask.dataframe code runs on pandas and, where there are GPUs, on cuDF. A shard is joined with itself only, so
nothing is shuffled. Frames hold ids and row numbers: which row gets which vector is what a join finds out. The rows
and the vectors themselves stay Arrow from file to file, whatever types they have.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from embedders.errors import InputError, MalformedShard
from embedders.quarantine import QuarantinedSample, Reason
from tasks.dataset.column_types import same_tables
from tasks.dataset.description import ADDED, columns_made, describe, footer
from tasks.dataset.ids import canonical_ids
from tasks.dataset.metadata import (
    check_columns,
    conform,
    json_members,
    no_rows,
    read_ids,
    read_metadata,
    refuse_mismatch,
    repeated_id,
)
from tasks.dataset.vectors import read_vectors, rows_a_group, take_rows, vector_array, write_groups
from tasks.plan import MergeOptions, merged_key
from tasks.records import EmbeddingRecord, MergeRecord, read_embedding_record, with_record
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.shards import Shard
from tasks.storage.folder import Folder

logger = logging.getLogger(__name__)

SHARDS_PER_MERGE = 1000
"""Shards of one Dask job: a shard costs Dask milliseconds, a Prefect task a fifth of a second."""
EXAMPLES = 3
"""Ids without a partner that a record names."""

ID, ROW, PLACE, LINE = "id", "row", "place", "line"
NUMBERS = pa.array([], pa.int64())
TEXT = pa.array([], pa.string())


def merge_group(shards: Sequence[Shard], options: MergeOptions, backend: str, client: Any) -> list[MergeRecord]:
    """Join every shard of a group on the cluster and write its file.

    :param backend: "pandas" or "cudf": what the partitions are made of.
    :param client: a Dask client of the cluster.
    :raises ShardsFailed: some shards failed; all others are written.
    """
    import dask
    import dask.dataframe as dd

    backend = installed(backend)
    with dask.config.set({"dataframe.backend": backend}):
        some_rows = to_frame(pa.table({ID: TEXT, ROW: NUMBERS}), backend)
        some_places = to_frame(pa.table({ID: TEXT, PLACE: NUMBERS}), backend)
        one_line = to_frame(pa.table({LINE: TEXT}), backend)
        rows = dd.from_map(rows_of, shards, options=options, backend=backend, meta=some_rows)
        places = dd.from_map(places_of, shards, backend=backend, meta=some_places)
        named = dd.from_map(line_of, shards, backend=backend, meta=one_line)
        # One task a shard: reading ids, joining and writing are one partition's.
        written = rows.map_partitions(
            merge_partition, places, named, options, backend, uuid.uuid4().hex, meta=one_line, align_dataframes=False
        )
        futures = client.compute(written.to_delayed())
    records, failures = [], []
    for shard, future in zip(shards, futures, strict=True):
        error = future.exception()
        if error is None:
            records.append(MergeRecord(**read_line(future.result())))
        else:
            failures.append(ShardFailure.of(shard.name, error))
        future.release()
    if failures:
        raise ShardsFailed(failures)
    return records


def rows_of(shard: Shard, options: MergeOptions, backend: str) -> Any:
    """The ids of a shard's metadata rows, as text, with the rows' numbers."""
    ids = read_ids(shard, options.id_col)
    return to_frame(pa.table({ID: ids, ROW: np.arange(len(ids))}), backend)


def places_of(shard: Shard, backend: str) -> Any:
    """The ids of a shard's vectors, with the vectors' numbers."""
    with arrow_file(shard.target, shard.embeddings_file) as file:
        ids = pq.read_table(file, columns=["id"], page_checksum_verification=True).column(0)
    return to_frame(pa.table({ID: ids, PLACE: np.arange(len(ids))}), backend)


def line_of(shard: Shard, backend: str) -> Any:
    """What a partition is told of its shard: a frame of one line of JSON."""
    return to_line(asdict(shard), backend)


def to_line(value: dict[str, Any], backend: str) -> Any:
    """Plain JSON as a frame of one line."""
    return to_frame(pa.table({LINE: [json.dumps(value)]}), backend)


def read_line(frame: Any) -> dict[str, Any]:
    """What `to_line` was given."""
    return dict(json.loads(to_table(frame).column(LINE)[0].as_py()))


def to_table(frame: Any) -> pa.Table:
    """A frame of either backend as an Arrow table."""
    return frame.to_arrow() if hasattr(frame, "to_arrow") else pa.Table.from_pandas(frame, preserve_index=False)


def merge_partition(rows: Any, places: Any, named: Any, options: MergeOptions, backend: str, attempt: str) -> Any:
    """Join a shard's ids and write its file; its record as a frame of one line.

    :param attempt: another one each time, so that a retry at once is not given the error that Dask still holds.
    """
    record = write_merged(join(rows, places), Shard(**read_line(named)), options)
    return to_line(asdict(record), backend)


def installed(backend: str) -> str:
    """The backend asked for, or pandas where a GPU has no cuDF beside it: the joined files are the same."""
    if backend == "cudf" and importlib.util.find_spec("cudf") is None:
        logger.warning("cuDF is not installed; joining on pandas")
        return "pandas"
    return backend


def to_frame(table: pa.Table, backend: str) -> Any:
    """An Arrow table as a frame whose columns keep their Arrow types."""
    if backend == "cudf":
        import cudf

        return cudf.DataFrame.from_arrow(table)
    import pandas as pd

    return table.to_pandas(types_mapper=pd.ArrowDtype)


def join(rows: Any, places: Any) -> Any:
    """Which row gets which vector, by id, in the order of the rows. Of rows that repeat an id the first one counts."""
    joined = rows.drop_duplicates(subset=[ID], keep="first").merge(places, on=ID, how="inner")
    return joined[[ROW, PLACE]].sort_values(ROW)


@contextlib.contextmanager
def arrow_file(folder: Folder, name: str) -> Iterator[Any]:
    """A file for Arrow's readers: read without Python where it is local."""
    if folder.is_local:
        with pa.OSFile(folder.path(name)) as file:
            yield file
    else:
        with folder.open(name) as file:
            yield file


# --- one shard --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Joined:
    """A shard's metadata and vectors, and which belong together: row `rows[i]` gets vector `places[i]`.

    `rows` ascends. `vectors` is (n, dimensions) float32, its thread's until the next; `ids` are its rows' ids.
    """

    metadata: pa.Table
    ids: pa.ChunkedArray
    vectors: np.ndarray
    rows: np.ndarray
    places: np.ndarray
    keep_all: bool

    @property
    def matched(self) -> np.ndarray:
        """(rows of the metadata,) bool: which have a vector."""
        mask = np.zeros(len(self.metadata), bool)
        mask[self.rows] = True
        return mask

    def tables(self, schema: pa.Schema, options: MergeOptions, size: int) -> Iterator[pa.Table]:
        """The merged rows, at most `size` at a time: what is in memory twice is that and not the shard."""
        matched = self.matched
        kept = self.metadata if self.keep_all else self.metadata.filter(pa.array(matched))
        valid = matched if self.keep_all else np.ones(len(kept), bool)
        before = np.concatenate([[0], np.cumsum(valid)])
        dimensions = self.vectors.shape[1] or options.dimensions
        for start in range(0, len(kept), size):
            part = kept.slice(start, size)
            stop = start + len(part)
            places = self.places[before[start] : before[stop]]
            matrix = take_rows(self.vectors, places) if len(places) else np.zeros((0, dimensions), np.float32)
            array = vector_array(matrix, valid[start:stop], options.form)
            yield pa.table([*part.columns, array], schema=schema)


def write_merged(frame: Any, shard: Shard, options: MergeOptions) -> MergeRecord:
    """Write a shard's rows with their vectors as the shard's file.

    :param frame: what `join` gave.
    :raises InputError: rows and images hardly have an id in common, or a value does not fit the dataset's schema.
    """
    numbers = to_table(frame)
    rows, places = (numbers.column(name).to_numpy() for name in (ROW, PLACE))
    embedding = read_embedding_record(shard.target, shard.embeddings_file)
    if embedding is None:
        raise OSError(f"{shard.embeddings_file} went away while it was merged")
    joined, notes = _gathered(shard, embedding, options, rows, places)
    left = _unmatched(shard, embedding, joined, options)
    record = _account(shard, embedding, options, joined, left)
    if left:
        shard.target.write(shard.unmatched_file, lambda path: pq.write_table(_listed(left), path, compression="zstd"))
    else:
        shard.target.remove(shard.unmatched_file)
    dimensions = max(embedding.dimensions, options.dimensions)
    vector = pa.field(options.column, options.form.arrow_type(dimensions))
    schema = pa.schema([*joined.metadata.schema, vector])
    described = describe(options.column, options.form, options.embedder, dimensions, embedding)
    schema = with_record(schema.with_metadata({**notes, **footer(schema, described)}), record)
    folder, name = options.place(shard)
    size = rows_a_group(dimensions)

    def save(path: str) -> None:
        tables = joined.tables(schema, options, size)
        write_groups(schema, tables, path, options.column, size, options.form.encoding)
        if options.in_place:
            _prove(path, joined.tables(schema, options, size))
            _like_the_old(folder, name, path)

    folder.write(name, save)
    return record


def _gathered(
    shard: Shard, embedding: EmbeddingRecord, options: MergeOptions, rows: np.ndarray, places: np.ndarray
) -> tuple[Joined, dict[bytes, bytes]]:
    """What a shard's join is made of, and the notes in its metadata's schema that stay: those of a file of the user's.

    Page checksums of the vectors are verified.
    """
    with arrow_file(shard.target, shard.embeddings_file) as file:
        ids, column = pq.read_table(file, columns=["id"]).column(0), pq.read_schema(file).names[1]
        vectors = read_vectors(file, column, embedding.dimensions)
    metadata = read_metadata(shard, options.id_col)
    where = f"{shard.dataset}/{shard.metadata}" if shard.metadata else json_members(shard)
    check_columns(metadata.schema, where, options.column)
    notes = dict(metadata.schema.metadata or {}) if options.in_place else {}
    if options.in_place:
        notes[ADDED] = json.dumps(sorted({*columns_made(metadata.schema), options.column})).encode()
    metadata = metadata.replace_schema_metadata(None)
    if options.column in metadata.column_names:
        metadata = metadata.drop_columns([options.column])
    if options.schema is not None and shard.metadata is not None:
        try:
            metadata = conform(metadata, options.schema, options.id_col)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
    return Joined(metadata, ids, vectors, rows, places, options.keep_rows), notes


def _unmatched(
    shard: Shard, embedding: EmbeddingRecord, joined: Joined, options: MergeOptions
) -> list[QuarantinedSample]:
    """What the join has left over, but for rows whose image is in quarantine and so listed there.

    :raises InputError: there are no rows, rows and images hardly have an id in common, or an id is there twice where
        that is an error.
    """
    where = f"{shard.dataset}/{shard.metadata}" if shard.metadata else shard.tar
    if embedding.samples and not len(joined.metadata):
        raise no_rows(where)
    alone = np.flatnonzero(~joined.matched)
    rows = joined.metadata.take(alone)
    ids = canonical_ids(rows.column(options.id_col)).to_pylist()
    matched = np.isin(np.arange(len(joined.ids)), joined.places)
    refused = _quarantined(shard) if len(alone) else set()
    partners = len(joined.rows) + len(refused.intersection(ids))
    if partners < embedding.samples and any(ids):
        examples = next(sample for sample in ids if sample), next(iter([*joined.ids[:1].to_pylist(), *refused]), "")
        refuse_mismatch(where, options.id_col, partners, (len(joined.metadata), embedding.samples), examples)
    seen = set(joined.ids.filter(pa.array(matched)).to_pylist()) if len(alone) else set()
    left: list[QuarantinedSample] = []
    for row, sample, status in zip(alone.tolist(), ids, _statuses(rows), strict=True):
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
    for sample in joined.ids.filter(pa.array(~matched)).to_pylist():
        left.append(QuarantinedSample(sample, "", Reason.NO_METADATA_ROW, f"no row of {shard.metadata}"))
    return left


def _quarantined(shard: Shard) -> set[str]:
    """The ids of a shard's samples that could not be embedded."""
    try:
        with arrow_file(shard.target, shard.quarantine_file) as file:
            return set(pq.read_table(file, columns=["id"]).column(0).to_pylist())
    except FileNotFoundError:
        return set()


def _statuses(rows: pa.Table) -> list[str]:
    """What img2dataset says of each row's download, where it says that it failed."""
    if "status" not in rows.column_names:
        return [""] * len(rows)
    return [
        f": status {status}" if isinstance(status, str) and status != "success" else ""
        for status in rows.column("status").to_pylist()
    ]


def _account(
    shard: Shard, embedding: EmbeddingRecord, options: MergeOptions, joined: Joined, left: Sequence[QuarantinedSample]
) -> MergeRecord:
    """The record of a merged file."""
    images = [sample for sample in left if sample.reason == Reason.NO_METADATA_ROW]
    rows = [sample for sample in left if sample.reason == Reason.NO_IMAGE]
    not_fetched = sum(": status " in sample.detail for sample in rows)
    total = len(joined.metadata)
    return MergeRecord(
        key=merged_key(shard, embedding, options),
        rows=total if joined.keep_all else len(joined.rows),
        rows_without_embedding=total - len(joined.rows),
        embeddings_without_row=len(images),
        rows_without_image=len(rows),
        rows_not_fetched=not_fetched,
        rows_repeated=len(left) - len(images) - len(rows),
        unmatched=len(left),
        examples=[sample.id for sample in (images[:EXAMPLES] or rows[:EXAMPLES])],
    )


def _listed(left: Sequence[QuarantinedSample]) -> pa.Table:
    """What was left over, as the table that quarantine files are."""
    names = QuarantinedSample._fields
    return pa.table({name: pa.array([str(getattr(s, name)) for s in left], pa.string()) for name in names})


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
def merge_shards(shards: Sequence[Shard], options: MergeOptions, backend: str, span: str) -> list[MergeRecord]:
    """Join a group of shards as a job of the cluster this task runs on; see `merge_group`."""
    from distributed import worker_client

    with worker_client() as client:  # gives this task's thread back meanwhile: a lone worker would wait for itself
        return merge_group(shards, options, backend, client)
