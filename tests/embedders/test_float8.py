"""Linear layers in float8, and where they cannot be."""

from __future__ import annotations

import pytest
import timm
import torch

from embedders.errors import InputError
from embedders.float8 import Float8Linear, to_float8


def test_a_cpu_cannot() -> None:
    with pytest.raises(InputError, match=r"compute capability 8\.9"):
        to_float8(torch.nn.Sequential(torch.nn.Linear(1024, 1024)), "cpu")


@pytest.mark.gpu
def test_a_transformers_vectors_keep_their_direction() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("vit_base_patch32_224", num_classes=0).eval().requires_grad_(False).cuda().half()
    images = torch.randn(16, 3, 224, 224, device="cuda", dtype=torch.float16)
    with torch.inference_mode():
        expected = plain(images).float()
        model = to_float8(plain, "cuda")
        assert sum(isinstance(module, Float8Linear) for module in model.modules()) == 4 * 12
        assert torch.nn.functional.cosine_similarity(model(images).float(), expected).min() > 0.99


@pytest.mark.gpu
def test_a_model_without_large_linear_layers_is_refused() -> None:
    with pytest.raises(InputError, match="no linear layers"):
        to_float8(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).cuda(), "cuda")
