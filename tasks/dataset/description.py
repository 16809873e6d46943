"""What the footers of merged files tell: how the vectors were made, and the features as `datasets` reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tasks.records import LayerRecord

if TYPE_CHECKING:
    from tasks.merge_options import MergedColumn, MergeOptions

DESCRIPTION = b"embeddings"
"""The key under which a footer describes the layers' columns, as JSON."""
ADDED = b"shard_embed_columns"
"""The key under which the footer of a user's own file has every column that was added to it and its layer, as JSON."""
HUGGINGFACE = b"huggingface"


def describe(options: MergeOptions, records: Mapping[str, LayerRecord]) -> list[dict[str, Any]]:
    """Return how each column of vectors or numbers was made, as plain JSON.

    Args:
        options: The columns, how they are held, and the fingerprints of what made them.
        records: Of the layers, for what decoded the images and the versions of the libraries.
    """
    return [_described(column, options, records.get(column.layer)) for column in options.columns]


def _described(column: MergedColumn, options: MergeOptions, record: LayerRecord | None) -> dict[str, Any]:
    made_of = options.made_of.get(column.layer, {})
    known = {name: made_of.get(name) for name in ("model", "weights", "preprocessing", "precision", "normalized")}
    other = {name: value for name, value in made_of.items() if name not in known}
    made: dict[str, Any] = {}
    if record is not None:
        made = {"decoder": record.decoder, "versions": record.versions}
        made |= {"precision": record.computed} if record.computed else {}
    form = options.form.as_dict() if column.shape else {}
    return {
        "column": column.name,
        "layer": column.layer,
        "dimensions": column.dimensions,
        **form,
        **known,
        "embedder": other,
        **made,
    }


def footer(schema: pa.Schema, description: Sequence[Mapping[str, Any]]) -> dict[bytes, bytes]:
    """The schema metadata of a merged file, for its footer."""
    features = {field.name: feature(field.type) for field in schema}
    told = {name: value for name, value in features.items() if value is not None}
    return {
        DESCRIPTION: json.dumps(list(description)).encode(),
        HUGGINGFACE: json.dumps({"info": {"features": told}}).encode(),
    }


def columns_made(schema: pa.Schema) -> dict[str, str]:
    """Return the columns of a file that this program wrote, by the file's footer; and the layer of each.

    Columns of earlier runs that a user's own file has kept are among them.
    """
    notes = schema.metadata or {}
    try:
        described, added = json.loads(notes.get(DESCRIPTION, b"[]")), json.loads(notes.get(ADDED, b"{}"))
        return {str(it["column"]): str(it["layer"]) for it in described} | {str(k): str(v) for k, v in added.items()}
    except (ValueError, KeyError, TypeError, AttributeError):  # somebody else's notes under these names
        return {}


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
