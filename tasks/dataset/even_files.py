"""Write the dataset again in files with an even number of rows, if the user asked for it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from embedders.fingerprint import digest
from tasks.dataset.metadata import conform
from tasks.dataset.schema import UNIFIED, metadata_folder
from tasks.dataset.vectors import write_groups
from tasks.layer_rows import group_rows, vector_columns
from tasks.merge_options import MergeOptions
from tasks.plan import Plan
from tasks.records import PartRecord, read_part_record, seal_footer, with_record
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.run_names import run_name
from tasks.storage.arrow_file import arrow_file
from tasks.storage.folder import Folder, in_bulk

TASKS = 64
"""The most tasks that the parts are written in."""


@dataclass(frozen=True)
class Part:
    """A file of the dataset with the rows of several shards."""

    name: str
    slices: tuple[tuple[str, int, int], ...]
    """Shard, first row and number of rows of each piece."""
    key: str
    """Hash of everything that the file depends on."""

    @property
    def label(self) -> str:
        """Return the name under which its failure is reported."""
        return f"metadata/{self.name}"

    @property
    def rows(self) -> int:
        """Return how many rows it has."""
        return sum(count for _, _, count in self.slices)


def plan_parts(plan: Plan) -> list[Part]:
    """Return the files for the merged rows of all shards in order, with `rows_per_file` rows in each but the last."""
    size = plan.options.rows_per_file
    if size is None:
        return []
    parts: list[Part] = []
    slices: list[tuple[str, int, int]] = []
    room = size

    def close() -> None:
        name = f"part-{len(parts):05}.parquet"
        keys = [(plan.merged[shard].key, first, count) for shard, first, count in slices]
        parts.append(Part(name, tuple(slices), digest([*keys, str(plan.options.schema)])))

    for shard in plan.shards:
        first, rows = 0, plan.merged[shard.name].rows if shard.name in plan.merged else 0
        while first < rows:
            count = min(room, rows - first)
            slices.append((shard.name, first, count))
            first, room = first + count, room - count
            if not room:
                close()
                slices, room = [], size
    if slices:
        close()
    return parts


def missing_parts(plan: Plan) -> list[Part]:
    """Return the parts that are missing or out of date."""
    parts = plan_parts(plan)
    if not parts:
        return []
    folder = metadata_folder(plan.shards[0].output)
    records = in_bulk(lambda part: read_part_record(folder, part.name), parts)
    return [part for part, record in zip(parts, records, strict=True) if record is None or record.key != part.key]


def part_groups(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Split parts into the groups of the tasks."""
    size = max(1, -(-len(parts) // TASKS))
    return [tuple(parts[i : i + size]) for i in range(0, len(parts), size)]


def write_part(part: Part, output: str, options: MergeOptions, schema: pa.Schema) -> None:
    """Write a part from the merged files of its shards, one row group at a time.

    Args:
        part: What to write.
        output: The output's folder.
        options: How the dataset is written.
        schema: The schema of the whole dataset.
    """
    merged, size = Folder(f"{output.rstrip('/')}/merged"), group_rows(options)
    record = PartRecord(part.key, part.rows)
    kept = {name: value for name, value in (schema.metadata or {}).items() if name != UNIFIED}
    schema = with_record(schema.with_metadata(kept), record)

    def save(path: str) -> None:
        pieces = (table for piece in part.slices for table in _read_slice(merged, *piece))
        tables = _even(pieces, schema, options, size)
        write_groups(schema, tables, path, vector_columns(options), size, options.form.encoding)
        seal_footer(path)

    metadata_folder(output).write(part.name, save)


def _read_slice(folder: Folder, shard: str, first: int, count: int) -> Iterator[pa.Table]:
    """Yield some rows of a merged file, one table per row group."""
    with arrow_file(folder, f"{shard}.parquet") as file:
        parquet, at = pq.ParquetFile(file, page_checksum_verification=True), 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            start, stop = max(first - at, 0), min(first + count - at, rows)
            if start < stop:
                yield parquet.read_row_group(group).slice(start, stop - start)
            at += rows


def _even(tables: Iterator[pa.Table], schema: pa.Schema, options: MergeOptions, size: int) -> Iterator[pa.Table]:
    """Yield the same rows in tables of `size` rows, in one schema."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(conform(table.replace_schema_metadata(None), schema, options.id_col).cast(schema))
        while sum(map(len, waiting)) >= size:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size)
            rest = whole.slice(size)
            waiting = [rest] if len(rest) else []
    if waiting:
        yield pa.concat_tables(waiting)


@task(
    name="metadata-compaction",
    task_run_name=run_name("write", "parts"),
    cache_policy=NO_CACHE,  # a part's footer says what it was made of
    persist_result=False,
    **RETRIES,
)
def write_parts(parts: Sequence[Part], output: str, options: MergeOptions, schema: pa.Schema, span: str = "") -> int:
    """Write some parts and return how many rows they have.

    Args:
        parts: What to write.
        output: The output's folder.
        options: How the dataset is written.
        schema: The schema of the whole dataset.
        span: The group's name in Prefect's UI; by default those of its first and last part.

    Raises:
        ShardsFailed: Some parts failed; all others are written.
    """
    failures = []
    for part in parts:
        try:
            write_part(part, output, options, schema)
        except Exception as error:
            failures.append(ShardFailure.of(part.label, error))
    if failures:
        raise ShardsFailed(failures)
    return sum(part.rows for part in parts)
