"""A model made quick gives the plain model's vectors, for batches of every size, or is left as it is."""

from __future__ import annotations

import shutil

import pytest
import torch

from embedders import TimmImageEmbedder
from embedders.compile import Prepared, prepare

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")


class Drifting(torch.nn.Module):
    """Gives other vectors every time it is called."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return torch.nn.functional.one_hot(torch.full((len(images),), self.calls % 5), 5).float()


def test_batches_of_every_size_get_the_plain_models_vectors() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5)).eval().requires_grad_(False)
    buffer = torch.zeros(4, 3, 2, 2)
    runs = []

    def run() -> torch.Tensor:
        runs.append(len(buffer))
        return model(buffer)

    prepared = Prepared(model, run, buffer)
    kept = []
    for size in (4, 3, 2, 1, 5, 4):
        images = torch.randn(size, 3, 2, 2)
        kept.append((prepared(images), model(images)))
    assert runs == [4, 4, 4, 4]  # one image alone and five are the plain model's
    assert all(torch.allclose(found, expected, atol=1e-6) for found, expected in kept)


def test_a_model_whose_vectors_change_when_it_is_made_quick_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model = Drifting()
    # No compiler makes this mistake on demand.
    monkeypatch.setattr(torch, "compile", lambda module, **_: module)
    assert prepare(model, torch.zeros(4, 3, 2, 2), compiled=True) is model
    assert "cosine of 0.0000" in caplog.text


def test_where_there_is_no_compiler_the_model_stays_as_it_is(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def no_compiler(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("no C compiler found")

    model = torch.nn.Flatten()
    # The machine that runs this test may have a compiler.
    monkeypatch.setattr(torch, "compile", lambda module, **_: no_compiler)
    assert prepare(model, torch.ones(4, 3, 2, 2), compiled=True) is model
    assert "not compiled: no C compiler found" in caplog.text


@needs_compiler
@pytest.mark.slow
def test_a_compiled_model_gives_the_plain_models_vectors() -> None:
    plain = TimmImageEmbedder("test_vit", pretrained=False, batch_size=4, compile_model=False).load_embedding_model(
        "cpu"
    )
    compiled = TimmImageEmbedder("test_vit", pretrained=False, batch_size=4, compile_model=True)
    model = compiled.load_embedding_model("cpu")
    for size in (4, 3, 1):
        images = torch.randn(size, 3, 160, 160)
        assert torch.allclose(model(images), plain(images), atol=1e-5)


@pytest.mark.parametrize(("expected", "compiles"), [(0, False), (10, False), (10**9, True)])
def test_a_model_is_compiled_where_the_run_is_long_enough(
    monkeypatch: pytest.MonkeyPatch, expected: int, compiles: bool
) -> None:
    asked = []

    def noted(module: torch.nn.Module, **_: object) -> torch.nn.Module:
        asked.append(module)
        return module

    monkeypatch.setattr(torch, "compile", noted)  # only whether it is asked for: compiling itself takes minutes
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=2)
    embedder.open("cpu", images=expected)
    assert bool(asked) == compiles


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_a_recorded_model_gives_the_plain_models_vectors(precision: str) -> None:
    embedder = TimmImageEmbedder(
        "vit_small_patch16_224", pretrained=False, batch_size=8, precision=precision, compile_model=False
    )
    model = embedder.load_embedding_model("cuda")
    plain = embedder.create_model().eval().cuda()
    for size in (8, 5, 2, 11, 8):
        images = torch.randn(size, 3, 224, 224, device="cuda")
        with torch.inference_mode():
            expected = torch.nn.functional.normalize(plain(images), dim=-1)
            assert (model(images) * expected).sum(dim=-1).min() > 0.999
