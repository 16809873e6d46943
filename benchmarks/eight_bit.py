"""Measure linear layers of ViT-L/14 in eight bits: images per second of the compiled model, cosine of its vectors.

    python -m benchmarks.eight_bit float16 float8 float8_fixed int8      # an H100; int8 takes two minutes to compile

The cosine is to the same random weights in float32, on noise. `float8` is what `--precision float8` does; the others
were tried and are not offered.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from embedders.float8 import LARGEST, SMALLEST_SIDE, Float8Linear, row_scales

MODEL = "vit_large_patch14_clip_quickgelu_224.openai"
BATCH = 256
SECONDS = 3
REACH = 8.0
"""The largest activation that `float8_fixed` assumes; true of random weights, not of trained ones."""


class Float8Fixed(nn.Module):
    """A linear layer in float8 with one scale for the weights, and a fixed one for the activations."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = layer.weight.float().abs().amax() / LARGEST
        self.register_buffer("weight", (layer.weight.float() / scale).to(torch.float8_e4m3fn))
        self.register_buffer("scale", scale)
        self.register_buffer("reach", torch.tensor(REACH / LARGEST, device=scale.device))
        self.bias = layer.bias
        self.weight: torch.Tensor
        self.scale: torch.Tensor
        self.reach: torch.Tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        eight = (tokens.flatten(0, -2) / self.reach).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        product = torch._scaled_mm(
            eight, self.weight.t(), self.reach, self.scale, bias=self.bias, out_dtype=tokens.dtype, use_fast_accum=True
        )
        return product.view(*tokens.shape[:-1], -1)


class Int8(nn.Module):
    """A linear layer in int8 with one scale per row of the weights and one per token of the activations."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        scale = row_scales(layer.weight, 127)
        self.register_buffer("weight", (layer.weight.float() / scale).round().to(torch.int8))
        self.register_buffer("scale", scale.t().contiguous())
        self.bias = layer.bias
        self.weight: torch.Tensor
        self.scale: torch.Tensor

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        rows = tokens.flatten(0, -2)
        scale = row_scales(rows, 127)
        eight = (rows / scale).round().clamp(-127, 127).to(torch.int8)
        product = torch._int_mm(eight, self.weight.t()) * self.scale * scale
        product = product if self.bias is None else product + self.bias
        return product.to(tokens.dtype).view(*tokens.shape[:-1], -1)


VARIANTS: dict[str, tuple[type[nn.Module] | None, dict[str, Any]]] = {
    "float16": (None, {}),
    "float8": (Float8Linear, {}),
    "float8_fixed": (Float8Fixed, {}),
    "int8": (Int8, {"max_autotune_gemm": True, "force_fuse_int_mm_with_mul": True}),
}


def replace_layers(model: nn.Module, kind: type[nn.Module]) -> None:
    """Replace each large linear layer of the blocks by a `kind`."""
    for name, layer in list(model.named_modules()):
        if name.startswith("blocks.") and type(layer) is nn.Linear and min(layer.weight.shape) >= SMALLEST_SIDE:
            model.set_submodule(name, kind(layer))


def measure(plain: nn.Module, images: torch.Tensor, expected: torch.Tensor, variant: str) -> str:
    """Measure a variant and return one line about it."""
    kind, options = VARIANTS[variant]
    model = copy.deepcopy(plain).half()
    if kind is not None:
        replace_layers(model, kind)
    started = time.perf_counter()
    compiled = torch.compile(model, dynamic=False, options=options or None)
    vectors = compiled(images).float()
    torch.cuda.synchronize()
    ready = time.perf_counter()
    count = 0
    while time.perf_counter() - ready < SECONDS:
        compiled(images)
        torch.cuda.synchronize()
        count += len(images)
    rate = count / (time.perf_counter() - ready)
    cosines = torch.nn.functional.cosine_similarity(vectors, expected)
    return (
        f"{variant}: {rate:,.0f} images/s, cosine {cosines.mean():.6f} in the mean, {cosines.min():.6f} at worst; "
        f"{ready - started:.0f} s to compile"
    )


def main(arguments: Sequence[str]) -> None:
    """Measure the variants that the command line names, and print a line about each."""
    import timm

    torch.manual_seed(0)
    plain = timm.create_model(MODEL, pretrained=False).eval().requires_grad_(False).cuda()
    images = torch.randn(BATCH, 3, 224, 224, device="cuda").half()
    with torch.inference_mode():
        expected = torch.cat([plain(part.float()) for part in images.split(64)])
        for variant in arguments or list(VARIANTS):
            print(measure(plain, images, expected, variant), flush=True)
            torch._dynamo.reset()


if __name__ == "__main__":
    main(sys.argv[1:])
