"""The schema that all files of the merged dataset share."""

from __future__ import annotations

import contextlib
from collections.abc import Collection

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.description import columns_made, describe, footer
from tasks.layer_rows import column_type
from tasks.plan import Plan
from tasks.storage.folder import Folder, in_bulk

SCHEMA = "schema.parquet"
"""In the output: no rows, and the schema of all files in `metadata/`, where readers want nothing but the dataset."""
UNIFIED = b"shard_embed_unified"
"""In the footer of the schema's file where its metadata columns are those that all shards were brought to."""


def metadata_folder(output: str) -> Folder:
    """Where readers find the dataset."""
    return Folder(f"{output.rstrip('/')}/metadata")


def held_schema(output: str, columns: Collection[str]) -> pa.Schema | None:
    """Return the schema that the metadata of an output was brought to; None where there is none.

    Args:
        output: The output.
        columns: The names of the layers' columns, which are left out.
    """
    schema = read_schema(output)
    if schema is None or UNIFIED not in (schema.metadata or {}):
        return None
    columns = {*columns_made(schema), *columns}
    return pa.schema([field for field in schema if field.name not in columns])


def read_schema(output: str) -> pa.Schema | None:
    """Return the schema of all files of an output's dataset; None where there is none or it does not open."""
    with contextlib.suppress(OSError, pa.ArrowException), Folder(output).open(SCHEMA) as file:
        return pq.read_schema(file)
    return None


def common_schema(plan: Plan) -> pa.Schema | None:
    """Return the schema of every file of the dataset, with what they say of their columns; None where it is empty.

    Raises:
        InputError: Json members of one name are not of one type.
    """
    options = plan.options
    if not plan.merged:
        return None
    records = {layer.name: next(iter(layer.records.values())) for layer in plan.layers if layer.records}
    described = [shard for shard in plan.shards if shard.name in plan.merged and shard.metadata is None]
    columns = [pa.field(column.name, column_type(column, options.form)) for column in options.columns]
    if options.schema is not None and not described:
        schema = pa.schema([*options.schema, *columns])
    else:

        def schema_of(name: str) -> pa.Schema:
            with plan.shards[0].target.open(name) as file:
                schema = pq.read_schema(file).remove_metadata()
            return pa.schema([field for field in schema if field.name not in options.names])

        folder = options.folder(plan.shards[0]).url.removeprefix(plan.shards[0].output.rstrip("/")).strip("/")
        found = in_bulk(schema_of, [f"{folder}/{name}.parquet" for name in plan.merged])
        try:
            metadata = pa.unify_schemas(list(dict.fromkeys(found)), promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise InputError(f"json members of one name are not of one type: {error}") from error
        schema = pa.schema([*metadata, *columns])
    notes = footer(schema, describe(options, records))
    return schema.with_metadata(notes | ({UNIFIED: b"1"} if options.schema is not None else {}))
