"""Images and models, without Prefect or Dask: what a notebook can use too."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from embedders.base import ImageEmbedder

if TYPE_CHECKING:
    from embedders.timm import TimmImageEmbedder

__all__ = ["ImageEmbedder", "TimmImageEmbedder"]


def __getattr__(name: str) -> Any:
    """Import timm, and so torch, only when it is asked for: `import embedders` stays quick."""
    if name == "TimmImageEmbedder":
        from embedders.timm import TimmImageEmbedder

        return TimmImageEmbedder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
