"""The parameters that an output was made with, as far as its manifest tells: what embeds new shards as the old ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedders.errors import InputError
from embedders.weights import RANDOM
from tasks.manifest import MANIFEST, LayerAccount, Manifest, read_manifest
from tasks.storage.folder import Folder

PRECISIONS = {"float16 on a GPU": {}, "float32": {"autocast": False}}
"""What a fingerprint says of the policies that have no name of their own."""
IMAGES = ("exif", "max_pixels", "image_component")
"""What it may say of the choice of images."""


def manifest_of(output: str, dataset: str) -> Manifest | None:
    """Return the manifest of an output; None if it has none yet.

    Raises:
        InputError: There is one that does not open.
    """
    return read_manifest(output, dataset) if Folder(output).has(MANIFEST) else None


def parameters_of(manifest: Manifest) -> dict[str, Any]:
    """Return the groups of parameters with which a run adds to an output what its layers have.

    Args:
        manifest: The output's manifest.

    Raises:
        InputError: One run of `flows.embed` cannot make them: a custom embedder, whose module no manifest names, or
            layers that were made with different settings.

    Example:
        >>> parameters_of(manifest)["model"]  # doctest: +SKIP
        {'model_name': ['resnet50']}
    """
    layers = {name: layer for name, layer in manifest.layers.items() if layer.made_of.get("output") != "tokens"}
    if not layers:
        return {}
    names = sorted(layers, key=lambda name: name != manifest.column)
    made = [_of_layer(manifest, name, layers[name]) for name in names]
    shared, *others = ({key: value for key, value in one.items() if key != "model_name"} for one in made)
    if any(other != shared for other in others):
        raise _unclear(manifest, "its layers were made with different settings")
    if Folder(Folder(manifest.output).place("merged")).list(".parquet"):
        raise _unclear(manifest, "it was made with --rows-per-file")
    model = {key: value for key, value in shared.items() if key not in IMAGES}
    model["model_name"] = [one["model_name"] for one in made]
    if len(layers) < len(manifest.layers):
        model["output_tokens"] = True
    if manifest.checkpoint:
        model["checkpoint"] = manifest.checkpoint
    images = {key: value for key, value in shared.items() if key in IMAGES}
    table: dict[str, Any] = {"image_embedding_column": names}
    if is_in_place(manifest):
        table["in_place"] = True
    return {"model": model, "images": images | {"id_col": manifest.id_col}, "table": table}


def is_in_place(manifest: Manifest) -> bool:
    """Return whether the columns were added to the Parquets beside the tars."""
    return bool(manifest.dataset) and manifest.metadata == manifest.dataset


def _of_layer(manifest: Manifest, name: str, layer: LayerAccount) -> dict[str, Any]:
    made_of: Mapping[str, Any] = layer.made_of
    if made_of.get("embedder") != "TimmImageEmbedder" or "attributes" in made_of:
        raise _unclear(manifest, f"its layer {name} was made by the custom embedder {made_of.get('embedder')}")
    precision = str(made_of["precision"])
    found = {"model_name": made_of["model"], **PRECISIONS.get(precision, {"precision": precision})}
    found |= {} if made_of["normalized"] else {"normalize_embeddings": False}
    found |= {"pretrained": False} if made_of["weights"] == RANDOM else {}
    return found | {key: made_of[key] for key in IMAGES if key in made_of}


def _unclear(manifest: Manifest, why: str) -> InputError:
    return InputError(
        f"{manifest.output}: {why}, so its manifest does not say how to embed new shards; give the sensor "
        'parameters, such as {"model": {"model_name": "resnet50"}}'
    )
