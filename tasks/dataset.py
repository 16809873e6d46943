"""The merged dataset as a whole: the schema all its files share, its card, and files of an even size on request."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import task
from prefect.cache_policies import NO_CACHE

from embedders.errors import InputError
from tasks.counted import counted
from tasks.failures import RETRIES, ShardFailure, ShardsFailed
from tasks.footer import describe, footer
from tasks.merge import arrow_file
from tasks.metadata import conform
from tasks.plan import MergeOptions, Plan
from tasks.shards import PartRecord, digest, read_merge_record, read_part_record, with_record
from tasks.storage import Folder, in_bulk
from tasks.vectors import rows_a_group, write_groups

SCHEMA = "schema.parquet"
"""In the output: no rows, and the schema of all files in `metadata/`, where readers want nothing but the dataset."""
FORMER = "metadata/_common_metadata"
"""Where the schema was before; polars opens no folder with a file of another ending in it."""
UNIFIED = b"shard_embed_unified"
"""In the footer of the schema's file where its metadata columns are those that all shards were brought to."""
CARD = "README.md"
CARD_MARK = "<!-- Written by shard-embed, and again when the dataset changes. Take this line away to keep your own. -->"
TASKS = 64
"""Tasks that the parts are written in, at most."""


@dataclass(frozen=True)
class Part:
    """A file of the dataset with rows of several shards: (shard, first row, rows) of each, and what it depends on."""

    name: str
    slices: tuple[tuple[str, int, int], ...]
    key: str

    @property
    def label(self) -> str:
        """What a failure of it is told under."""
        return f"metadata/{self.name}"

    @property
    def rows(self) -> int:
        """How many rows it has."""
        return sum(count for _, _, count in self.slices)


def metadata_folder(output: str) -> Folder:
    """Where readers find the dataset."""
    return Folder(f"{output.rstrip('/')}/metadata")


# --- schema and card --------------------------------------------------------------------------------------------------


def held_schema(output: str, column: str) -> pa.Schema | None:
    """The schema that the metadata of an output was brought to, without the vectors; None where there is none."""
    schema = read_schema(output)
    if schema is None or UNIFIED not in (schema.metadata or {}):
        return None
    return pa.schema([field for field in schema if field.name != column])


def read_schema(output: str) -> pa.Schema | None:
    """Return the schema of all files of an output's dataset; None where there is none or it does not open."""
    for name in (SCHEMA, FORMER):
        with contextlib.suppress(OSError, pa.ArrowException), Folder(output).open(name) as file:
            return pq.read_schema(file)
    return None


def common_schema(plan: Plan, embedder: Mapping[str, Any]) -> pa.Schema | None:
    """The schema of every file of the dataset, with what they say of their vectors; None where it is empty.

    :raises InputError: json members of one name that are not of one type.
    """
    options, record = plan.options, next(iter(plan.embedded.values()), None)
    if not plan.merged:
        return None
    described = [shard for shard in plan.shards if shard.name in plan.merged and shard.metadata is None]
    column = pa.field(options.column, options.form.arrow_type(options.dimensions))
    if options.schema is not None and not described:
        schema = pa.schema([*options.schema, column])
    else:

        def schema_of(name: str) -> pa.Schema:
            with plan.shards[0].target.open(name) as file:
                schema = pq.read_schema(file).remove_metadata()
            return pa.schema([field for field in schema if field.name != options.column])

        folder = options.folder(plan.shards[0]).url.removeprefix(plan.shards[0].output.rstrip("/")).strip("/")
        found = in_bulk(schema_of, [f"{folder}/{name}.parquet" for name in plan.merged])
        try:
            metadata = pa.unify_schemas(list(dict.fromkeys(found)), promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise InputError(f"json members of one name are not of one type: {error}") from error
        schema = pa.schema([*metadata, column])
    notes = footer(schema, describe(options.column, options.form, embedder, options.dimensions, record))
    return schema.with_metadata(notes | ({UNIFIED: b"1"} if options.schema is not None else {}))


def finish_dataset(plan: Plan, embedder: Mapping[str, Any]) -> None:
    """Write the dataset's common schema and its card where they say something else, and take away files that rows of
    this dataset were in before.

    :param embedder: the embedder's fingerprint.
    """
    if plan.options.in_place or not plan.merged:
        return
    target, folder = Folder(plan.shards[0].output), metadata_folder(plan.shards[0].output)
    try:
        schema = common_schema(plan, embedder)
    except InputError:
        schema = None  # each file has a schema of its own, and says so
    if schema is not None and not _says(target, schema):
        target.write(SCHEMA, lambda path: pq.write_metadata(schema, path))
    target.remove(FORMER)
    text = card(plan, embedder)
    before = target.read_text(CARD)
    if before is None or (CARD_MARK in before and before != text):
        target.write_text(CARD, text)
    if not (plan.to_embed or plan.to_merge or missing_parts(plan)):
        _remove_former(plan, folder)


def _says(target: Folder, schema: pa.Schema) -> bool:
    try:
        with target.open(SCHEMA) as file:
            return bool(pq.read_schema(file).equals(schema, check_metadata=True))
    except (OSError, pa.ArrowException):
        return False


def _remove_former(plan: Plan, folder: Folder) -> None:
    """Take away what another --rows-per-file has left: the same rows must not be there twice."""
    parts = plan.options.rows_per_file is not None
    wanted = {part.name for part in plan_parts(plan)} if parts else {f"{shard.name}.parquet" for shard in plan.shards}
    for found in folder.list(".parquet"):
        if found.name in wanted:
            continue
        ours = read_part_record(folder, found.name) or (parts and read_merge_record(folder, found.name))
        if ours:
            folder.remove(found.name)


def card(plan: Plan, embedder: Mapping[str, Any]) -> str:
    """The dataset's card: `datasets.load_dataset` finds the rows by it, and a person what the vectors are."""
    options = plan.options
    model = embedder.get("model") or embedder.get("embedder") or ""
    rows = sum(record.rows for record in plan.merged.values())
    precisions = sorted({record.computed for record in plan.embedded.values() if record.computed})
    computed = {"precision": ", ".join(precisions)} if precisions else {}
    normalised = ", each of length 1" if embedder.get("normalized") else ""
    values = f"{options.dimensions} {options.form.dtype} values a row{normalised}"
    return f"""---
configs:
- config_name: default
  data_files:
  - split: train
    path: metadata/**/*.parquet
tags:
- image-embeddings
---
{CARD_MARK}

# Image embeddings by {model}

{counted(rows, "row")} of {counted(len(plan.merged), "shard")}. The column `{options.column}` holds {values}.
`quarantine/` lists what has no embedding, and why.

```python
from datasets import load_dataset

rows = load_dataset("path/of/this/folder", split="train").with_format("numpy")
```

Made from:

```json
{json.dumps({**embedder, **computed}, indent=2)}
```
"""


# --- parts ------------------------------------------------------------------------------------------------------------


def plan_parts(plan: Plan) -> list[Part]:
    """The files that hold the merged rows of all shards in order, `rows_per_file` in each but the last."""
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
    """The parts that are not there as they should be."""
    parts = plan_parts(plan)
    if not parts:
        return []
    folder = metadata_folder(plan.shards[0].output)
    records = in_bulk(lambda part: read_part_record(folder, part.name), parts)
    return [part for part, record in zip(parts, records, strict=True) if record is None or record.key != part.key]


def part_groups(parts: Sequence[Part]) -> list[tuple[Part, ...]]:
    """Split parts into tasks."""
    size = max(1, -(-len(parts) // TASKS))
    return [tuple(parts[i : i + size]) for i in range(0, len(parts), size)]


def write_part(part: Part, output: str, options: MergeOptions, schema: pa.Schema) -> None:
    """Write a part from the merged files of its shards, a row group at a time.

    :param schema: of the whole dataset.
    """
    merged, size = Folder(f"{output.rstrip('/')}/merged"), rows_a_group(options.dimensions)
    record = PartRecord(part.key, part.rows)
    kept = {name: value for name, value in (schema.metadata or {}).items() if name != UNIFIED}
    schema = with_record(schema.with_metadata(kept), record)

    def save(path: str) -> None:
        pieces = (table for piece in part.slices for table in _read_slice(merged, *piece))
        tables = _even(pieces, schema, options, size)
        write_groups(schema, tables, path, options.column, size, options.form.encoding)

    metadata_folder(output).write(part.name, save)


def _read_slice(folder: Folder, shard: str, first: int, count: int) -> Iterator[pa.Table]:
    """Some rows of a merged file, by its row groups."""
    with arrow_file(folder, f"{shard}.parquet") as file:
        parquet, at = pq.ParquetFile(file, page_checksum_verification=True), 0
        for group in range(parquet.num_row_groups):
            rows = parquet.metadata.row_group(group).num_rows
            start, stop = max(first - at, 0), min(first + count - at, rows)
            if start < stop:
                yield parquet.read_row_group(group).slice(start, stop - start)
            at += rows


def _even(tables: Iterator[pa.Table], schema: pa.Schema, options: MergeOptions, size: int) -> Iterator[pa.Table]:
    """The same rows in tables of `size` rows, in one schema."""
    waiting: list[pa.Table] = []
    for table in tables:
        waiting.append(conform(table.replace_schema_metadata(None), schema, options.id_col).cast(schema))
        while sum(map(len, waiting)) >= size:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, size)
            waiting = [rest] if len(rest := whole.slice(size)) else []
    if waiting:
        yield pa.concat_tables(waiting)


@task(
    name="metadata-compaction",
    task_run_name="write {span}",
    cache_policy=NO_CACHE,  # a part's footer says what it was made of
    **RETRIES,
)
def write_parts(parts: Sequence[Part], output: str, options: MergeOptions, schema: pa.Schema, span: str) -> int:
    """Write some parts; how many rows they have.

    :raises ShardsFailed: some could not be written; all others are.
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
