"""What the footers of merged files tell: how the vectors were made, and the features as `datasets` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from tasks.dataset.vectors import VectorFormat
from tasks.records import EmbeddingRecord

DESCRIPTION = b"embedding"
"""The key under which a footer describes the vectors, as JSON."""
ADDED = b"shard_embed_columns"
"""The key under which the footer of a user's own file names every column that was added to it, as JSON."""
HUGGINGFACE = b"huggingface"


def describe(
    column: str, form: VectorFormat, embedder: Mapping[str, Any], dimensions: int, record: EmbeddingRecord | None = None
) -> dict[str, Any]:
    """How a column of vectors was made, as plain JSON.

    :param embedder: the embedder's fingerprint.
    :param record: of the embeddings, for what decoded the images and the versions of the libraries.
    """
    known = {name: embedder.get(name) for name in ("model", "weights", "preprocessing", "precision", "normalized")}
    other = {name: value for name, value in embedder.items() if name not in known}
    made: dict[str, Any] = {}
    if record is not None:
        made = {"decoder": record.decoder, "versions": record.versions}
        made |= {"precision": record.computed} if record.computed else {}
    return {"column": column, "dimensions": dimensions, **form.as_dict(), **known, "embedder": other, **made}


def footer(schema: pa.Schema, description: Mapping[str, Any]) -> dict[bytes, bytes]:
    """The schema metadata of a merged file, for its footer."""
    features = {field.name: feature(field.type) for field in schema}
    told = {name: value for name, value in features.items() if value is not None}
    return {
        DESCRIPTION: json.dumps(description).encode(),
        HUGGINGFACE: json.dumps({"info": {"features": told}}).encode(),
    }


def columns_made(schema: pa.Schema) -> set[str]:
    """Return the columns of a file that this program wrote, by the file's footer."""
    notes = schema.metadata or {}
    try:
        described, added = json.loads(notes.get(DESCRIPTION, b"{}")), json.loads(notes.get(ADDED, b"[]"))
        return {str(described.get("column", "")), *map(str, added)} - {""}
    except (ValueError, AttributeError, TypeError):  # somebody else's notes under these names
        return set()


def feature(kind: pa.DataType) -> dict[str, Any] | None:
    """A type as a feature of HuggingFace datasets; None where it is left to infer one."""
    if pa.types.is_struct(kind):
        inner = {kind.field(i).name: feature(kind.field(i).type) for i in range(kind.num_fields)}
        return inner if all(inner.values()) else None
    if pa.types.is_list(kind) or pa.types.is_fixed_size_list(kind):
        of = feature(kind.value_type)
        size = {"length": kind.list_size} if pa.types.is_fixed_size_list(kind) else {}
        return {"feature": of, **size, "_type": "List"} if of else None
    name = NAMES.get(kind)
    return {"dtype": name, "_type": "Value"} if name else None


NAMES = {
    kind: name or str(kind)
    for kind, name in (
        *((kind, "") for kind in (pa.bool_(), pa.int8(), pa.int16(), pa.int32(), pa.int64())),
        *((kind, "") for kind in (pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64())),
        *((kind, "") for kind in (pa.string(), pa.large_string(), pa.binary(), pa.large_binary(), pa.date32())),
        (pa.float16(), "float16"),
        (pa.float32(), "float32"),
        (pa.float64(), "float64"),
    )
}
"""Arrow's plain types, by the names that `datasets` has for them."""
