"""The third stage: metadata joined with embeddings by id, one Dask DataFrame partition a shard.

The same dask.dataframe code runs on pandas and, where there are GPUs, on cuDF. A shard is joined with itself only,
so nothing is shuffled, and the vectors stay Arrow lists all the way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.tasks import exponential_backoff

from embedders.errors import InputError
from embedders.loader import Reason
from embedders.webdataset import open_shard, sample_json
from tasks.embed import write_vectors
from tasks.failures import ShardFailure, ShardsFailed, retry_if_it_can_pass
from tasks.plan import MergeOptions
from tasks.shards import MergeRecord, Shard, merge_key, read_embedding_record, with_record

SHARDS_A_TASK = 1000
"""Shards of one Dask job: a shard costs Dask milliseconds, a Prefect task a fifth of a second."""

ROW = "__shard_embed_row__"
ID = "__shard_embed_id__"


def merge_group(shards: Sequence[Shard], options: MergeOptions, backend: str, client: Any) -> list[MergeRecord]:
    """Join every shard of a group on the cluster and write its file.

    :param backend: "pandas" or "cudf": what the partitions are made of.
    :param client: a Dask client of the cluster.
    :raises ShardsFailed: some shards failed; all others are written.
    """
    import dask
    import dask.dataframe as dd

    with dask.config.set({"dataframe.backend": backend}):
        meta = read_metadata(shards[0], options.id_col, backend, empty=True)
        metadata = dd.from_map(read_metadata, shards, id_col=options.id_col, backend=backend, meta=meta)
        vectors = read_vectors(shards[0], backend, empty=True)
        embeddings = dd.from_map(read_vectors, shards, backend=backend, meta=vectors)
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


def read_metadata(shard: Shard, id_col: str, backend: str, *, empty: bool = False) -> Any:
    """A shard's metadata as a frame of the backend, with its row numbers and its ids as text.

    Without a Parquet beside the tar, its rows are the samples' json members.
    """
    if shard.metadata is None:
        table = json_metadata(shard, id_col)
    else:
        with shard.source.open(shard.metadata) as file:
            table = pq.read_table(file)
    if empty:
        table = table.slice(0, 0)
    if id_col not in table.column_names:
        raise InputError(f"{shard.metadata}: no id column {id_col!r}")
    ids = id_text(table.column(id_col))
    table = table.append_column(ROW, pa.array(range(len(table)), pa.int64())).append_column(ID, ids)
    return to_frame(table, backend)


def id_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Ids as the text they are compared by; see `embedders.webdataset.canonical_id`."""
    import pyarrow.compute as pc

    if pa.types.is_floating(column.type) and pc.all(pc.equal(column, pc.floor(column))).as_py() is not False:
        column = pc.cast(column, pa.int64())
    return pc.cast(column, pa.string())


def json_metadata(shard: Shard, id_col: str) -> pa.Table:
    """One row a sample from its json member, the id first where the json lacks it."""
    with shard.source.local_copy(shard.tar) as path:
        opened = open_shard(path, id_col)
        rows = [
            {id_col: sample_id, **sample_json(sample, opened.data)}
            for i, (sample, sample_id) in enumerate(zip(opened.index.samples, opened.ids, strict=True))
            if opened.unusable.get(i, (None,))[0] is not Reason.DUPLICATE_ID
        ]
    return pa.Table.from_pylist(rows) if rows else pa.table({id_col: pa.array([], pa.string())})


def read_vectors(shard: Shard, backend: str, *, empty: bool = False) -> Any:
    """A shard's ids and vectors as a frame of the backend; page checksums are verified."""
    with shard.target.open(shard.embeddings_file) as file:
        table = pq.read_table(file, page_checksum_verification=True)
    return to_frame((table.slice(0, 0) if empty else table).rename_columns([ID, *table.column_names[1:]]), backend)


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
        key=merge_key(shard, embedding.key, options.as_dict()),
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
    retries=3,
    retry_delay_seconds=exponential_backoff(backoff_factor=1),
    retry_jitter_factor=0.5,
    retry_condition_fn=retry_if_it_can_pass,
    cache_policy=NO_CACHE,  # the merged file's footer says what it was made of
)
def merge_shards(shards: Sequence[Shard], options: MergeOptions, backend: str, span: str) -> list[MergeRecord]:
    """Join a group of shards as a job of the cluster this task runs on; see `merge_group`."""
    from distributed import worker_client

    with worker_client() as client:  # gives this task's thread back meanwhile: a lone worker would wait for itself
        return merge_group(shards, options, backend, client)
