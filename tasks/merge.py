"""The third stage: metadata joined with embeddings by id, one Dask DataFrame partition a shard.

The same dask.dataframe code runs on pandas and, where there are GPUs, on cuDF. A shard is joined with itself only,
so nothing is shuffled, and the vectors stay Arrow lists all the way.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from embedders.errors import InputError
from embedders.loader import Reason
from embedders.webdataset import canonical_id, open_shard, printable, sample_json
from tasks.embed import vector_array, write_vectors
from tasks.failures import RETRIES, ShardFailure, ShardsFailed
from tasks.plan import MergeOptions
from tasks.shards import MergeRecord, Shard, merge_key, read_embedding_record, with_record

SHARDS_A_TASK = 1000
"""Shards of one Dask job: a shard costs Dask milliseconds, a Prefect task a fifth of a second."""

ROW = "__shard_embed_row__"
ID = "__shard_embed_id__"
TEXT = pa.array([], pa.string())


def merge_group(shards: Sequence[Shard], options: MergeOptions, backend: str, client: Any) -> list[MergeRecord]:
    """Join every shard of a group on the cluster and write its file.

    :param backend: "pandas" or "cudf": what the partitions are made of.
    :param client: a Dask client of the cluster.
    :raises ShardsFailed: some shards failed; all others are written.
    """
    import dask
    import dask.dataframe as dd

    with dask.config.set({"dataframe.backend": backend}):
        meta = to_frame(pa.table({options.id_col: TEXT, ROW: pa.array([], pa.int64()), ID: TEXT}), backend)
        metadata = dd.from_map(read_metadata, shards, id_col=options.id_col, backend=backend, meta=meta)
        vectors = to_frame(pa.table({ID: TEXT, options.column: vector_array(np.zeros((0, 0)))}), backend)
        embeddings = dd.from_map(read_vectors, shards, backend=backend, meta=vectors)
        # The metas only name what `join` names: shards may differ in columns, and none is read here.
        joined = metadata.map_partitions(
            join, embeddings, options, meta=join(meta, vectors, options), align_dataframes=False, enforce_metadata=False
        )
        parts = zip(joined.to_delayed(), shards, strict=True)
        written = [dask.delayed(write_merged)(part, shard, options) for part, shard in parts]
        futures = client.compute(written)
    records, failures = [], []
    for shard, future in zip(shards, futures, strict=True):
        error = future.exception()
        if error is None:
            records.append(MergeRecord(**future.result()))
        else:
            failures.append(ShardFailure.of(shard.name, error))
        future.release()
    if failures:
        raise ShardsFailed(failures)
    return records


def read_metadata(shard: Shard, id_col: str, backend: str) -> Any:
    """A shard's metadata as a frame of the backend, with its row numbers and its ids as text.

    Without a Parquet beside the tar, its rows are the samples' json members.
    """
    if shard.metadata is None:
        table = json_metadata(shard, id_col)
    else:
        with shard.source.open(shard.metadata) as file:
            table = pq.read_table(file)
    if id_col not in table.column_names:
        raise InputError(f"{shard.metadata}: no id column {id_col!r}")
    ids = pa.array([None if v is None else canonical_id(v) for v in table.column(id_col).to_pylist()], pa.string())
    table = table.append_column(ROW, pa.array(range(len(table)), pa.int64())).append_column(ID, ids)
    return to_frame(table, backend)


def json_metadata(shard: Shard, id_col: str) -> pa.Table:
    """One row a sample from its json member, with every key of any of them as a column, the id first."""
    with shard.source.local_copy(shard.tar) as path:
        opened = open_shard(path, id_col)
        rows = [
            with_id(sample_json(sample, opened.data), id_col, sample_id)
            for i, (sample, sample_id) in enumerate(zip(opened.index.samples, opened.ids, strict=True))
            if opened.unusable.get(i, (None,))[0] is not Reason.DUPLICATE_ID
        ]
    names = dict.fromkeys([id_col, *(name for row in rows for name in row)])
    return pa.table({printable(name): json_column([row.get(name) for row in rows]) for name in names})


def with_id(row: dict[str, Any], id_col: str, sample_id: str) -> dict[str, Any]:
    """A json object whose id column is what the sample goes by, also where it was missing or null."""
    return row if row.get(id_col) is not None else {**row, id_col: sample_id}


def json_column(values: list[Any]) -> pa.Array:
    """Json values as a column; as text where they are not of one type, text staying as it is."""
    try:
        column = pa.array(values)
        same = not has_empty_struct(column.type)
    except (pa.ArrowException, UnicodeEncodeError, OverflowError):
        same = False
    if not same:
        texts = [v if v is None or isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in values]
        column = pa.array([None if text is None else printable(text) for text in texts], pa.string())
    return column.cast(pa.string()) if pa.types.is_null(column.type) else column


def has_empty_struct(kind: pa.DataType) -> bool:
    """Whether a type holds the json object `{}`, which Parquet cannot write."""
    if pa.types.is_struct(kind) and not kind.num_fields:
        return True
    return any(has_empty_struct(kind.field(i).type) for i in range(kind.num_fields))


def read_vectors(shard: Shard, backend: str) -> Any:
    """A shard's ids and vectors as a frame of the backend; page checksums are verified."""
    with shard.target.open(shard.embeddings_file) as file:
        table = pq.read_table(file, page_checksum_verification=True)
    return to_frame(table.rename_columns([ID, *table.column_names[1:]]), backend)


def to_frame(table: pa.Table, backend: str) -> Any:
    """An Arrow table as a frame whose columns keep their Arrow types."""
    if backend == "cudf":
        import cudf

        return cudf.DataFrame.from_arrow(table)
    import pandas as pd

    return table.replace_schema_metadata(None).to_pandas(types_mapper=pd.ArrowDtype)


def join(metadata: Any, vectors: Any, options: MergeOptions) -> Any:
    """Metadata rows with their vectors, by id, in the metadata's order; the account of the rest in the attributes."""
    (column,) = [name for name in vectors.columns if name != ID]
    vectors = vectors.rename(columns={column: options.column})
    if options.column in metadata.columns:
        metadata = metadata.drop(columns=[options.column])
    joined = metadata.merge(vectors, on=ID, how="left" if options.null_rows else "inner").sort_values(ROW)
    return joined.drop(columns=[ROW, ID])


def write_merged(frame: Any, shard: Shard, options: MergeOptions) -> dict[str, Any]:
    """Write a joined partition as the shard's file; its record as plain JSON."""
    table = frame.to_arrow() if hasattr(frame, "to_arrow") else pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata(None)
    embedding = read_embedding_record(shard.target, shard.embeddings_file)
    if embedding is None:
        raise OSError(f"{shard.embeddings_file} went away while it was merged")
    vectors = len(table) - table.column(options.column).null_count
    record = MergeRecord(
        key=merge_key(shard, embedding.version, options.as_dict()),
        rows=len(table),
        rows_without_embedding=metadata_rows(shard, embedding.samples) - vectors,
        embeddings_without_row=embedding.embedded - vectors,
    )
    table = table.cast(with_record(table.schema, record))
    shard.target.write(shard.merged_file, lambda path: write_vectors(table, path, options.column))
    return asdict(record)


def metadata_rows(shard: Shard, samples: int) -> int:
    """How many rows a shard's metadata has, by its footer; a sample each where there is no Parquet."""
    if shard.metadata is None:
        return samples
    with shard.source.open(shard.metadata) as file:
        return int(pq.read_metadata(file).num_rows)


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
