"""Finish the merged dataset: write its schema and card, and remove files that another layout has left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.counted import counted
from tasks.dataset.even_files import missing_parts, plan_parts
from tasks.dataset.schema import FORMER, SCHEMA, common_schema, metadata_folder
from tasks.plan import Plan
from tasks.records import read_merge_record, read_part_record
from tasks.storage.folder import Folder

CARD = "README.md"
CARD_MARK = "<!-- Written by shard-embed, and again when the dataset changes. Take this line away to keep your own. -->"


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
