"""Tokens beside the pooled vectors: what `forward_features` gives, and vectors that do not change."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import timm
import torch

from embedders import TimmImageEmbedder
from embedders.batch_size import Measured
from embedders.errors import InputError
from embedders.tokens import as_tokens, with_tokens


def embedder_of(model: str = "test_vit", tokens: bool = True, **options: Any) -> TimmImageEmbedder:
    return TimmImageEmbedder(model, pretrained=False, batch_size=2, output_tokens=tokens, **options)


def images_for(embedder: TimmImageEmbedder) -> torch.Tensor:
    return torch.randn((2, *embedder.data_config["input_size"]), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("model", "tokens", "dimensions"),
    [
        ("test_vit", 101, 64),  # 10 x 10 patches and a class token
        ("test_efficientnet", 25, 256),  # a map, NCHW
        ("mambaout_femto", 49, 288),  # a map, NHWC
        ("vit_xsmall_patch16_clip_224", 197, 256),  # its vectors are projected
    ],
)
@pytest.mark.parametrize("normalize", [True, False])
def test_tokens_come_beside_the_vectors(model: str, tokens: int, dimensions: int, normalize: bool) -> None:
    embedder = embedder_of(model, normalize_embeddings=normalize)
    images = images_for(embedder)
    with torch.inference_mode():
        found = embedder.open("cpu").model(images)
        vectors = embedder_of(model, False, normalize_embeddings=normalize).open("cpu").model(images)
        features = embedder.create_model().eval().forward_features(images)  # type: ignore[operator]
    assert tuple(found) == embedder.layers == ("image_embedding", "image_embedding_tokens")
    assert torch.equal(found["image_embedding"], vectors)
    assert found["image_embedding_tokens"].shape == (2, tokens, dimensions)
    assert found["image_embedding_tokens"].dtype == torch.float32
    if model == "test_efficientnet":
        assert torch.allclose(found["image_embedding_tokens"][1, 7], features[1, :, 1, 2], atol=1e-5)
    elif model == "mambaout_femto":
        assert torch.allclose(found["image_embedding_tokens"][1, 9], features[1, 1, 2], atol=1e-5)
    else:
        assert torch.allclose(found["image_embedding_tokens"], features, atol=1e-5)


def test_maps_become_sequences_row_by_row() -> None:
    nchw = torch.arange(2 * 5 * 3 * 4).view(2, 5, 3, 4)
    assert torch.equal(as_tokens(nchw), as_tokens(nchw.permute(0, 2, 3, 1), "NHWC"))
    assert torch.equal(as_tokens(nchw)[1, 6], nchw[1, :, 1, 2])


def test_half_precision_gives_float32() -> None:
    embedder = embedder_of(precision="bfloat16", image_embedding_column="vector")
    with torch.inference_mode():
        found = embedder.open("cpu").model(images_for(embedder))
    assert {name: array.dtype for name, array in found.items()} == {
        "vector": torch.float32,
        "vector_tokens": torch.float32,
    }


@pytest.mark.parametrize("model", ["crossvit_9_240", "coat_tiny"])
def test_a_model_with_several_features_is_refused_by_name(model: str) -> None:
    with pytest.raises(InputError, match=f"^{model} has no tokens to give; leave output_tokens out") as caught:
        embedder_of(model).open("cpu")
    assert "\n" not in str(caught.value)


def test_a_model_that_does_more_than_pool_is_refused() -> None:
    model: Any = timm.create_model("test_vit", num_classes=0).eval()
    usual = model.forward
    model.forward = lambda images: usual(images) * 2
    with pytest.raises(InputError, match="its vectors are not pooled from its features"):
        with_tokens(model, torch.randn(3, 160, 160), "mine")


def test_fingerprints_of_the_layers() -> None:
    plain, both = embedder_of(tokens=False), embedder_of()
    assert both.fingerprint() == both.fingerprint("image_embedding") == plain.fingerprint()
    assert both.fingerprint("image_embedding_tokens") == plain.fingerprint() | {"output": "tokens"}
    with pytest.raises(InputError, match=r"gives no layer 'image_embedding_tokens'; it gives image_embedding$"):
        plain.fingerprint("image_embedding_tokens")
    copy = pickle.loads(pickle.dumps(both))
    assert copy.layers == both.layers
    assert copy.fingerprint("image_embedding_tokens") == both.fingerprint("image_embedding_tokens")


class Sub(TimmImageEmbedder):
    """Has code of its own."""


def test_a_subclass_has_one_fingerprint_of_its_vectors_too() -> None:
    one, other = (Sub("test_vit", pretrained=False, output_tokens=tokens) for tokens in (True, False))
    assert one.fingerprint() == other.fingerprint()
    assert one.fingerprint("image_embedding_tokens") != one.fingerprint()


@pytest.mark.gpu
def test_on_a_gpu() -> None:
    embedder = TimmImageEmbedder("vit_small_patch16_224", pretrained=False, output_tokens=True)
    session = embedder.open("cuda")
    assert isinstance(session.measured, Measured)
    assert session.measured.rate > 0
    images = images_for(embedder).cuda()
    with torch.inference_mode():
        found = session.model(images)
        plain = TimmImageEmbedder("vit_small_patch16_224", pretrained=False, batch_size=2).open("cuda").model(images)
    assert found["image_embedding_tokens"].shape == (2, 197, 384)
    assert torch.nn.functional.cosine_similarity(found["image_embedding"], plain).min() > 0.999
