"""Linear layers in 8-bit floating point, for vision transformers on GPUs that have it: quicker, and less exact.

Weights have a scale a row, activations one a token, worked out batch by batch. What e4m3's three bits of mantissa leave
of a vector is measured by `python -m benchmarks.throughput --only model_float8`.
"""

from __future__ import annotations

import torch
from torch import nn

from embedders.errors import InputError

LARGEST = 448.0
"""The largest number of float8_e4m3fn."""
ALIKE_IN_FLOAT8 = 0.99
"""Cosine that a compiled model's vectors must have to those of the same model as it is: what is fused is rounded
elsewhere, and a number on the border of two of e4m3's falls to the other side (0.998 for ViT-L/14)."""
SMALLEST_SIDE = 512
"""Layers with a side shorter than this gain nothing."""


def row_scales(rows: torch.Tensor, largest: float) -> torch.Tensor:
    """Return what to divide each row of (n, features) by so that it just reaches `largest`: (n, 1), float32."""
    return (rows.abs().amax(dim=1, keepdim=True).float() / largest).clamp(min=1e-12)


class Float8Linear(nn.Module):
    """A linear layer whose product is computed in float8, accumulated in float32."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        weight = layer.weight.float()
        scale = row_scales(weight, LARGEST)
        self.register_buffer("weight", (weight / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = layer.bias
        self.weight: torch.Tensor
        self.scale: torch.Tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Take (…, in features) and return (…, out features), of the same dtype."""
        rows = tokens.flatten(0, -2)
        scale = row_scales(rows, LARGEST)
        eight = (rows / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        # A scale a row comes with bfloat16 results only; the sums behind them are float32.
        product = torch._scaled_mm(eight, self.weight.t(), scale, self.scale, out_dtype=torch.bfloat16)
        product = product.to(tokens.dtype)
        return (product if self.bias is None else product + self.bias).view(*tokens.shape[:-1], -1)


def to_float8(model: nn.Module, device: str) -> nn.Module:
    """Put Float8Linear in place of the large linear layers of the blocks of a model that lies on `device`.

    Raises:
        InputError: The device cannot multiply so, or the model has no such layer.
    """
    if not device.startswith("cuda") or torch.cuda.get_device_capability(device) < (8, 9):
        raise InputError("precision float8 needs a GPU of compute capability 8.9 or newer (H100, L40S, RTX 4090)")
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and "." in name and min(layer.weight.shape) >= SMALLEST_SIDE
    }
    if not layers:
        raise InputError("precision float8: the model has no linear layers large enough; use float16")
    for name, layer in layers.items():
        model.set_submodule(name, Float8Linear(layer))
    return model
