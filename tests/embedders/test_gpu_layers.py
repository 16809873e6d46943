"""A rewritten model gives the vectors of the plain one."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import QuickGELU

from embedders.gpu_layers import Patches, rewrite


@pytest.mark.parametrize(
    ("name", "size", "patches", "activations"),
    [
        ("vit_small_patch32_224", 224, 1, 0),
        ("vit_base_patch32_clip_quickgelu_224", 224, 1, 12),
        ("resnet18", 64, 0, 0),  # nothing to rewrite
        ("convnext_atto", 64, 0, 0),  # its kernels lie side by side too, and are small
    ],
)
def test_the_vectors_stay_the_same(name: str, size: int, patches: int, activations: int) -> None:
    torch.manual_seed(0)
    plain = timm.create_model(name, pretrained=False).eval().requires_grad_(False)
    model = rewrite(copy.deepcopy(plain))
    assert sum(isinstance(module, Patches) for module in model.modules()) == patches
    assert sum(isinstance(module, torch.nn.SiLU) for module in model.modules()) == activations
    assert not any(isinstance(module, QuickGELU) for module in model.modules())
    images = torch.randn(2, 3, size, size)
    with torch.inference_mode():
        assert torch.allclose(model(images), plain(images), atol=1e-5)


def test_a_patch_that_does_not_fit_is_left_out_as_a_convolution_does() -> None:
    convolution = torch.nn.Conv2d(3, 5, 8, stride=8, bias=False).requires_grad_(False)
    images = torch.randn(2, 3, 20, 27)
    assert torch.allclose(Patches(convolution)(images), convolution(images), atol=1e-5)


def test_an_overlapping_or_padded_convolution_stays() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 16, stride=8), torch.nn.Conv2d(4, 4, 8, stride=8, padding=4))
    assert [type(module) for module in rewrite(model).children()] == [torch.nn.Conv2d, torch.nn.Conv2d]
