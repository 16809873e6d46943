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
from tasks.records import read_footers
from tasks.storage.folder import Folder

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
        found = _schemas(plan, options.folder(plan.shards[0]))
        try:
            metadata = pa.unify_schemas(found, promote_options="permissive")
        except (pa.ArrowTypeError, pa.ArrowInvalid) as error:
            raise InputError(f"json members of one name are not of one type: {error}") from error
        schema = pa.schema([*metadata, *columns])
    notes = footer(schema, describe(options, records))
    return schema.with_metadata(notes | ({UNIFIED: b"1"} if options.schema is not None else {}))


def _schemas(plan: Plan, folder: Folder) -> list[pa.Schema]:
    """Return the schemas that merged files have without the layers' columns, each once, by their footers."""
    names = {f"{name}.parquet" for name in plan.merged}
    files = [file for file in folder.list(".parquet") if file.name in names]
    found: dict[pa.Schema, None] = {}
    for _, content in read_footers(folder, files):
        schema = content.schema.to_arrow_schema().remove_metadata()
        found[pa.schema([field for field in schema if field.name not in plan.options.names])] = None
    return list(found)
