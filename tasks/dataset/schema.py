"""The schema that all files of the merged dataset share."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.description import describe, footer
from tasks.plan import Plan
from tasks.storage.folder import Folder, in_bulk

SCHEMA = "schema.parquet"
"""In the output: no rows, and the schema of all files in `metadata/`, where readers want nothing but the dataset."""
FORMER = "metadata/_common_metadata"
"""Where the schema was before; polars opens no folder with a file of another ending in it."""
UNIFIED = b"shard_embed_unified"
"""In the footer of the schema's file where its metadata columns are those that all shards were brought to."""


def metadata_folder(output: str) -> Folder:
    """Where readers find the dataset."""
    return Folder(f"{output.rstrip('/')}/metadata")


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
