"""Finish the merged dataset: write its schema and card, and remove files that another layout has left."""

from __future__ import annotations

import json

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.even_files import missing_parts, plan_parts
from tasks.dataset.schema import SCHEMA, common_schema, metadata_folder
from tasks.merge_options import MergedColumn
from tasks.plan import Layer, Plan
from tasks.records import merge_record, part_record, read_footers
from tasks.storage.folder import Folder, in_bulk
from tasks.wording import counted

CARD = "README.md"
CARD_MARK = "<!-- Written by shard-embed, and again when the dataset changes. Take this line away to keep your own. -->"


def finish_dataset(plan: Plan) -> None:
    """Write the dataset's common schema and its card where they say something else, and take away files that rows of
    this dataset were in before.
    """
    if plan.options.in_place or not plan.merged:
        return
    target, folder = Folder(plan.shards[0].output), metadata_folder(plan.shards[0].output)
    try:
        schema = common_schema(plan)
    except InputError:
        schema = None  # each file has a schema of its own, and says so
    if schema is not None and not _says(target, schema):
        target.write(SCHEMA, lambda path: pq.write_metadata(schema, path))
    text = card(plan)
    before = target.read_text(CARD)
    if before is None or (CARD_MARK in before and before != text):
        target.write_text(CARD, text)
    if not (plan.unfinished or missing_parts(plan)):
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
    others = [file for file in folder.list(".parquet") if file.name not in wanted]
    footers = read_footers(folder, others)
    ours = [name for name, footer in footers if part_record(footer) or (parts and merge_record(footer))]
    in_bulk(folder.remove, ours)


def card(plan: Plan) -> str:
    """Return the dataset's card: `datasets.load_dataset` finds the rows by it, and a person what the columns are."""
    rows = sum(record.rows for record in plan.merged.values())
    models = ", ".join(dict.fromkeys(_model(layer) for layer in plan.layers))
    columns = "\n".join(f"- {_told(column, plan)}" for column in plan.options.columns)
    made_of = {layer.name: {**layer.made_of, **_precision(layer)} for layer in plan.layers}
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

# Image embeddings by {models}

{counted(rows, "row")} of {counted(len(plan.merged), "shard")}. New columns:

{columns}

`quarantine/` lists what has no embedding, and why.

```python
from datasets import load_dataset

rows = load_dataset("path/of/this/folder", split="train").with_format("numpy")
```

Made from:

```json
{json.dumps(made_of, indent=2)}
```
"""


def _model(layer: Layer) -> str:
    return str(layer.made_of.get("model") or layer.made_of.get("embedder") or layer.name)


def _told(column: MergedColumn, plan: Plan) -> str:
    made_of = plan.options.made_of.get(column.layer, {})
    if not column.shape:
        return f"`{column.name}`: {column.dtype}"
    dtype = plan.options.form.dtype if column.dtype == "float32" else column.dtype
    normalised = ", each of length 1" if made_of.get("normalized") else ""
    return f"`{column.name}`: {column.dimensions} {dtype} values per row{normalised}"


def _precision(layer: Layer) -> dict[str, str]:
    precisions = sorted({record.computed for record in layer.records.values() if record.computed})
    return {"precision": ", ".join(precisions)} if precisions else {}
