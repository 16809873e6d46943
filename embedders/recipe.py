"""Recipe: what a layer's values depend on, as a frozen value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedders.base import ImageEmbedder
from embedders.fingerprint import digest


@dataclass(frozen=True, eq=False)
class Recipe:
    """What one layer's values depend on, taken once, where the run is planned.

    A worker cannot take the fingerprint again: the source of a class that a script defines does not travel.

    Attributes:
        layer: The layer's name, which is also that of its folder and of its main column.
        embedder: What computes it. Recipes of one embedder share its session.
        fingerprint: Plain JSON, equal for equal values.
        digest: 32 hexadecimal digits that stand for the fingerprint in keys.
        source: The digest of the embedder's own fingerprint, equal for all layers of one embedder.
        columns: The names of the columns that it computes.
    """

    layer: str
    embedder: ImageEmbedder
    fingerprint: Mapping[str, Any]
    digest: str
    source: str
    columns: tuple[str, ...]

    @property
    def image_component(self) -> str | None:
        """Return which component of a sample it reads; None for the only image."""
        return self.embedder.image_component

    def accepts(self, decoder: str) -> bool:
        """Return whether values from images that `decoder` decoded are as good as this recipe's."""
        return self.embedder.accepts(decoder)


def recipes_of(embedder: ImageEmbedder) -> tuple[Recipe, ...]:
    """Return the recipe of each layer that an embedder makes.

    Raises:
        InputError: An attribute of the embedder has no stable representation, or its weights cannot be had.

    Example:
        >>> [recipe.layer for recipe in recipes_of(TimmImageEmbedder("resnet50"))]  # doctest: +SKIP
        ['image_embedding']
    """
    prints = {layer: embedder.fingerprint(layer) for layer in embedder.layers}
    source = digest([embedder.image_embedding_column, prints[embedder.layers[0]]])
    main, extra = embedder.layers[0], tuple(embedder.extra_columns)
    return tuple(
        Recipe(layer, embedder, found, digest(found), source, (layer, *extra) if layer == main else (layer,))
        for layer, found in prints.items()
    )
