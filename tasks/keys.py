"""What a shard's files are a pure function of, as one hash each: change an input, and the file is made again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from embedders.fingerprint import digest
from tasks.shards import Shard

FORMAT = 2
"""Version of what layer files hold; part of every key, so a change makes them again."""


def layer_key(shard: Shard, layer: str, recipe: str, id_col: str) -> str:
    """Return what a layer file is a pure function of: the tar's content, and the recipe.

    The shard's name is in it too: two tars of one size and time are told apart, and so are their outputs if they are
    swapped.

    Args:
        shard: The shard.
        layer: The layer's name: a folder that was renamed holds no layer of the new name.
        recipe: The digest of the recipe's fingerprint.
        id_col: The name of the id in the samples' json.
    """
    parts = {"shard": shard.name, "tar": shard.tar_fingerprint, "layer": layer, "recipe": recipe, "id": id_col}
    if shard.key_dot != "first":
        parts["key_dot"] = shard.key_dot
    return digest(parts | {"format": FORMAT})


def merge_key(shard: Shard, layers: Mapping[str, str], options: dict[str, Any]) -> str:
    """Return what a merged file is a pure function of: the layers, the metadata's content, how they are joined.

    Args:
        shard: The shard.
        layers: The version of each layer that is joined, by its name.
        options: How they are joined, as plain JSON.
    """
    parts = {"layers": dict(layers), "metadata": shard.metadata_fingerprint, "options": options}
    return digest(parts | {"format": FORMAT})
