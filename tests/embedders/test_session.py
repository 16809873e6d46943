"""An embedder opened: everything loaded or measured is in the session, and overridden methods find it there."""

from __future__ import annotations

import functools
import gc
import io
import pickle
import tarfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedders import ImageEmbedder, TimmImageEmbedder, timm_session
from embedders.open_loader import open_loader
from embedders.shard_batch import ShardBatch
from embedders.timm_session import TimmSession, rate_together
from embedders.webdataset import OpenShard, open_shard

IMAGES = 7


@pytest.fixture
def shard(tmp_path: Path) -> OpenShard:
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for n in range(IMAGES):
            out = io.BytesIO()
            Image.effect_mandelbrot((64 + n, 96), (-2, -1, 1, 1), 50).convert("RGB").save(out, "JPEG")
            info = tarfile.TarInfo(f"{n:02}.jpg")
            info.size = len(out.getvalue())
            tar.addfile(info, io.BytesIO(out.getvalue()))
    return open_shard(tmp_path / "0.tar")


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """One entry per loader that was opened."""
    loaders: list[Any] = []

    def noted(*args: Any, **options: Any) -> Any:
        loaders.append(open_loader(*args, **options))
        return loaders[-1]

    monkeypatch.setattr(timm_session, "open_loader", noted)
    return loaders


def small(kind: type[TimmImageEmbedder] = TimmImageEmbedder, **options: Any) -> TimmImageEmbedder:
    return kind("test_vit", pretrained=False, batch_size=4, num_threads_per_worker=1, **options)


def embed(session: Any, *shards: OpenShard) -> dict[int, np.ndarray]:
    found = {}
    with torch.inference_mode():
        for batch in session.batches(shards):
            if not batch.rows:
                continue
            for row, vector in zip(batch.rows, session.model(batch.images).numpy(), strict=True):
                found[row.sample] = vector.copy()
    return found


def test_use_leaves_nothing_on_the_embedder(shard: OpenShard) -> None:
    embedder = small()
    before = embedder.fingerprint()
    attributes, pickled = dict(vars(embedder)), pickle.dumps(embedder)
    session = embedder.open("cpu", images=IMAGES)
    assert len(embed(session, shard)) == IMAGES
    assert session.decoder == "exact"
    assert vars(embedder) == attributes
    assert pickle.dumps(embedder) == pickled
    assert embedder.fingerprint() == before
    assert pickle.loads(pickled).fingerprint() == before
    session.close()


def test_what_is_cached_does_not_travel() -> None:
    embedder = small()
    sent = set(vars(pickle.loads(pickle.dumps(embedder))))
    embedder.check()
    _ = embedder.data_config, embedder.preprocessing
    received = pickle.loads(pickle.dumps(embedder))
    assert set(vars(received)) == sent | {"_planned_weights"}
    assert received._planned_weights == embedder.weights.identity


def test_a_session_does_not_travel_with_its_copy_of_the_embedder(shard: OpenShard) -> None:
    session = small().open("cpu")
    embed(session, shard)
    copy = pickle.loads(pickle.dumps(session.embedder))
    assert "_session" not in vars(copy)
    assert copy.fingerprint() == session.embedder.fingerprint() == small().fingerprint()


class Overriding(TimmImageEmbedder):
    """Overrides all that can be, each by way of `super()`, and keeps what it makes on itself."""

    def create_model(self) -> torch.nn.Module:
        model = super().create_model()
        self.parameters_counted = sum(p.numel() for p in model.parameters())
        return model

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        model = super().load_embedding_model(device)
        return lambda images: model(images) * 2

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        for batch in super().batches(shards, device):
            assert self.parameters_counted > 0
            yield batch


def test_overridden_methods_find_the_session(shard: OpenShard, opened: list[Any]) -> None:
    plain = embed(small().open("cpu"), shard)
    embedder = small(Overriding)
    before = embedder.fingerprint()
    session = embedder.open("cpu")
    opened.clear()
    for _ in range(3):
        found = embed(session, shard)
        assert found.keys() == plain.keys()
        assert all(np.array_equal(found[i], plain[i] * 2) for i in plain)
    assert len(opened) == 1  # the loader lives as long as the session
    assert session.decoder == "exact"
    assert embedder.fingerprint() == before
    assert not hasattr(embedder, "parameters_counted")


class OwnShards(TimmImageEmbedder):
    """Takes its batches from `super().load_dataset_shard`."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        for images, metadata in super().load_dataset_shard(tar_path):
            yield images[1:], metadata[1:]


def test_an_overridden_load_dataset_shard_may_call_the_usual_one(shard: OpenShard, opened: list[Any]) -> None:
    session = small(OwnShards).open("cpu")
    for _ in range(2):
        assert sorted(embed(session, shard)) == [1, 2, 3, 5, 6]
    assert len(opened) == 1


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_methods_work_alone(shard: OpenShard, loader: str) -> None:
    embedder = small(loader=loader)
    embedder.check()
    attributes = set(vars(embedder))
    model = embedder.load_embedding_model("cpu")
    with torch.inference_mode():
        batches = list(embedder.batches([shard], "cpu"))  # they outlive the loader that was opened for this call
        vectors = torch.cat([model(batch.images) for batch in batches]).numpy()
        pairs = list(embedder.load_dataset_shard(shard.path))
        again = torch.cat([model(images) for images, _ in pairs]).numpy()
    expected = embed(embedder.open("cpu"), shard)
    np.testing.assert_array_equal(vectors, np.stack([expected[i] for i in range(IMAGES)]))
    np.testing.assert_array_equal(again, vectors)
    assert [m["key"] for _, metadata in pairs for m in metadata] == list(shard.ids)
    assert embedder.input_batch("cpu") == 4
    assert set(vars(embedder)) - attributes <= {"data_config", "preprocessing"}


def test_weights_that_are_resolved_are_not_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    embedder = small()
    embedder.check()
    monkeypatch.setattr("embedders.timm_parameters.resolve_weights", None)  # a call would fail
    embedder.open("cpu")


def test_a_session_frees_its_model_without_garbage_collection(shard: OpenShard) -> None:
    session = small(Overriding).open("cpu")
    embed(session, shard)
    held: list[Callable[[], Any]] = [weakref.ref(session), weakref.ref(session.model), weakref.ref(session.loader)]
    gc.disable()
    try:
        del session
        assert [reference() for reference in held] == [None] * 3
    finally:
        gc.enable()


def test_a_closed_session_has_let_go_of_its_threads(shard: OpenShard) -> None:
    session = small().open("cpu")
    embed(session, shard)
    session.close()
    assert session.decoder == ""
    session.close()


class Cached(TimmImageEmbedder):
    @functools.cached_property
    def table(self) -> object:
        return object()


class CachedToo(ImageEmbedder):
    @functools.cached_property
    def table(self) -> object:
        return (n for n in range(3))

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        yield [self.table, tar_path], [{"key": "00"}]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        return lambda batch: np.ones((len(batch) - 1, 2))


@pytest.mark.parametrize("embedder", [small(Cached), CachedToo()], ids=["timm", "custom"])
def test_a_cached_property_is_no_part_of_the_fingerprint(embedder: Any) -> None:
    before = embedder.fingerprint()
    assert embedder.table
    assert embedder.fingerprint() == before


def test_a_custom_embedder_is_opened_as_it_is(shard: OpenShard) -> None:
    embedder = CachedToo()
    session = embedder.open("cpu", images=5)
    assert session.embedder is embedder
    assert (session.device, session.images, session.decoder) == ("cpu", 5, "")
    batch, left_out = session.batches([shard])
    assert session.model(batch.images).shape == (1, 2)
    assert len(left_out.rejected) == IMAGES - 1


def test_models_together_take_the_time_of_all() -> None:
    assert rate_together([100.0]) == 100.0
    assert rate_together([100.0, 50.0]) == pytest.approx(100 / 3)
    assert rate_together([100.0, 0.0]) == 0.0


def test_a_call_for_another_device_is_none_of_the_session() -> None:
    session = TimmSession(small(), "cuda")
    embedder = session.embedder
    assert isinstance(embedder, TimmImageEmbedder)
    assert embedder._session_on("cuda") is session
    assert embedder._session_on("cpu") is not session
