"""Give a timm model's tokens beside its pooled vector: the features before the pooling, as one sequence per image."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from embedders.errors import InputError

CLOSE = 1e-3
"""By how much of the largest number the pooled vectors may differ from those of the model as it is."""


class PooledAndTokens(nn.Module):
    """A timm model in its two parts, `forward_head(forward_features(images))`, that gives what comes of both."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Take (n, channels, height, width) and return (n, dimensions) and (n, tokens, dimensions)."""
        features = self.model.forward_features(images)
        return self.model.forward_head(features), as_tokens(features, getattr(self.model, "output_fmt", "NCHW"))


def as_tokens(features: torch.Tensor, map_format: str = "NCHW") -> torch.Tensor:
    """Return features as (n, tokens, dimensions): sequences as they are, maps row by row.

    Args:
        features: (n, tokens, dimensions), or a map.
        map_format: How a map is laid out, "NCHW" or "NHWC", as timm's `output_fmt` says it.
    """
    if features.ndim == 4:
        features = features.flatten(1, 2) if map_format == "NHWC" else features.flatten(2).transpose(1, 2)
    return features


def with_tokens(model: nn.Module, image: torch.Tensor, name: str) -> PooledAndTokens:
    """Return the model with its tokens, having seen that it pools them into the vectors that it gives anyway.

    Args:
        model: A timm model in evaluation mode.
        image: One input, (channels, height, width), on the model's device and of its dtype.
        name: How errors call the model.

    Raises:
        InputError: The model has no such form: its features are several, or it does more than pool them.
    """
    both = PooledAndTokens(model)
    images = image.expand(2, *image.shape)
    with torch.inference_mode():
        expected = model(images).float()
        try:
            pooled, tokens = both(images)
        except (AttributeError, TypeError, ValueError, IndexError, RuntimeError) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise InputError(f"{_none(name)}: {' '.join(str(error).split())[:200]}") from error
    within = CLOSE * float(torch.nan_to_num(expected).abs().max())
    if tokens.ndim != 3 or pooled.shape != expected.shape:
        raise InputError(f"{_none(name)}: its features have the shape {tuple(tokens.shape[1:])} per image")
    if not torch.allclose(pooled.float(), expected, rtol=CLOSE, atol=within, equal_nan=True):
        raise InputError(f"{_none(name)}: its vectors are not pooled from its features")
    return both


def _none(name: str) -> str:
    return f"{name} has no tokens to give; leave output_tokens out"
