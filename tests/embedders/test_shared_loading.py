"""Several models in one pass: one decoding, and for each model the very tensors that it gets alone."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedders import ImageEmbedder, TimmImageEmbedder, images, reference_loader, timm_session
from embedders.batch_size import Measured
from embedders.decision import Decision
from embedders.errors import InputError
from embedders.image_headers import inspect
from embedders.open_loader import open_loader
from embedders.quarantine import Reason
from embedders.session import Session
from embedders.shard_batch import ShardBatch
from embedders.shared_loading import batches_for, can_share, decide_together, open_together, take_decision, use_cores
from embedders.timm_session import TimmSession
from embedders.webdataset import OpenShard, open_shard
from tests.kinds import ARITHMETIC_JPEG, photograph, saved

from .test_engine import Colours


class Model(TimmImageEmbedder):
    """A small model with the transform of others; `changes` are made to its data configuration."""

    def __init__(self, changes: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__("test_vit", pretrained=False, **({"batch_size": 4, "num_threads_per_worker": 2} | options))
        self.changes = changes or {}

    @property
    def data_config(self) -> dict[str, Any]:
        return {**super().data_config, **self.changes}


SAME: dict[str, Any] = {}
OTHER_MEAN = {"mean": (0.1, 0.2, 0.3), "std": (0.3, 0.3, 0.3)}
SQUASHED = {"crop_mode": "squash", "crop_pct": 1.0}
BORDER = {"crop_mode": "border", "crop_pct": 1.0, "interpolation": "bilinear"}
OTHER_BORDER = BORDER | {"mean": (0.2, 0.9, 0.5)}
NEAREST = {"interpolation": "nearest"}


def members() -> dict[str, bytes]:
    """Sound images of many sizes, and those that go other ways."""
    photo = photograph()
    found = {f"{n:02}.jpg": saved(photo.resize((60 + 9 * n, 97)), "JPEG", quality=90) for n in range(17)}
    thin = Image.new("RGB", (17, 6000), "red")  # nothing is left of it where the longer edge becomes 160
    return found | {
        "20.jpg": ARITHMETIC_JPEG,
        "21.jpg": found["03.jpg"][: len(found["03.jpg"]) // 2],
        "22.jpg": saved(thin, "JPEG"),
        "23.png": saved(photo.resize((15, 12)), "PNG"),
        "24.gif": saved(photo, "GIF"),
        "25.jpg": b"no image at all, whatever its name says",
        "26.jpg": found["05.jpg"],
        "27.jpg": saved(thin.resize((1, 400)), "JPEG"),
    }


@pytest.fixture
def shards(tmp_path: Path) -> list[OpenShard]:
    everything = members()
    for number in range(2):
        with tarfile.open(tmp_path / f"{number}.tar", "w") as tar:
            for name, data in everything.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return [open_shard(tmp_path / f"{number}.tar") for number in range(2)]


def taken(batches: list[ShardBatch]) -> tuple[dict[Any, torch.Tensor], dict[Any, Any]]:
    """The images and the rejections of a session by their row; none twice."""
    found: dict[Any, torch.Tensor] = {}
    rejected: dict[Any, Any] = {}
    for batch in batches:
        assert len(batch.rows) == len(batch.images)
        for row, image in zip(batch.rows, batch.images, strict=True):
            assert row not in found
            found[row] = image.clone()
        for each in batch.rejected:
            assert each.tag not in rejected
            rejected[each.tag] = each
    assert not found.keys() & rejected.keys()
    return found, rejected


def together(embedders: list[TimmImageEmbedder], shards: list[OpenShard]) -> list[tuple[Any, Any]]:
    sessions = open_together(embedders, "cpu")
    tuples = list(batches_for(sessions, shards))
    for session in sessions:
        session.close()
    return [taken(list(batches)) for batches in zip(*tuples, strict=True)]


def alone(embedder: TimmImageEmbedder, shards: list[OpenShard]) -> tuple[Any, Any]:
    session = embedder.open("cpu")
    found = taken(list(session.batches(shards)))
    session.close()
    return found


@pytest.mark.parametrize(
    ("loader", "changes"),
    [
        ("dali", [SAME, OTHER_MEAN]),
        ("dali", [SAME, SQUASHED, BORDER]),
        ("dali", [BORDER, OTHER_BORDER, SAME]),
        ("reference", [SAME, OTHER_MEAN, BORDER]),
        ("auto", [NEAREST, NEAREST | {"crop_mode": "border"}]),  # which only the reference loader follows
    ],
)
def test_each_gets_the_tensors_that_it_gets_alone(
    shards: list[OpenShard], loader: str, changes: list[dict[str, Any]]
) -> None:
    embedders: list[TimmImageEmbedder] = [Model(each, loader=loader) for each in changes]
    assert all(can_share(embedders[0], other) for other in embedders)
    for embedder, (found, rejected) in zip(embedders, together(embedders, shards), strict=True):
        expected, refused = alone(embedder, shards)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[row], expected[row]) for row in expected)
        assert rejected == refused
        assert len(found) + len(rejected) == 2 * len(members())


def test_the_images_test_what_they_are_for(shards: list[OpenShard]) -> None:
    assert not inspect(ARITHMETIC_JPEG).dali
    assert inspect(members()["22.jpg"]).dali
    centre, border = together([Model(), Model(BORDER)], shards)
    names = list(members())

    def why(rejected: dict[Any, Any]) -> dict[str, Reason]:
        return {names[row.sample]: each.reason for row, each in rejected.items() if row.shard == 0}

    both = {"21.jpg": Reason.TRUNCATED, "25.jpg": Reason.NOT_AN_IMAGE}
    assert why(centre[1]) == both
    assert why(border[1]) == both | {"22.jpg": Reason.UNSUPPORTED, "27.jpg": Reason.UNSUPPORTED}


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_what_is_the_same_is_made_once(shards: list[OpenShard], loader: str) -> None:
    sessions = open_together([Model(loader=loader), Model(OTHER_MEAN, loader=loader), Model(loader=loader)], "cpu")
    for one, other, same in batches_for(sessions, shards):
        assert same is one
        assert other is not one
        assert other.rows == one.rows  # these two reject the same
    assert {session.decoder for session in sessions} == {"reference" if loader == "reference" else "exact"}


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_an_image_that_pillow_decodes_is_decoded_once(
    shards: list[OpenShard], loader: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes: list[int] = []

    def counted(data: Any, *args: Any) -> Image.Image:
        sizes.append(len(data))
        return images.decode(data, *args)

    monkeypatch.setattr(reference_loader, "decode", counted)
    together([Model(loader=loader), Model(SQUASHED, loader=loader)], shards[:1])
    assert sizes.count(len(ARITHMETIC_JPEG)) == 1
    assert sizes.count(len(members()["07.jpg"])) == (1 if loader == "reference" else 0)


def test_vectors_are_those_of_the_models_alone(shards: list[OpenShard]) -> None:
    embedders: list[TimmImageEmbedder] = [Model(batch_size=8), Model(SQUASHED, batch_size=4)]
    sessions = open_together(embedders, "cpu")
    sizes = []
    with torch.inference_mode():
        found: list[dict[Any, np.ndarray]] = [{}, {}]
        for batches in batches_for(sessions, shards):
            sizes.append(len(batches[0].rows) + len(batches[0].rejected))
            for number, batch in enumerate(batches):
                if batch.rows:
                    found[number].update(zip(batch.rows, sessions[number].model(batch.images).numpy(), strict=True))
        assert set(sizes[:-1]) == {4}  # the smaller of the two sizes
        for embedder, vectors in zip(embedders, found, strict=True):
            expected, _ = alone(embedder, shards)
            model = embedder.load_embedding_model("cpu")
            assert vectors.keys() == expected.keys()
            for row, image in expected.items():
                np.testing.assert_allclose(vectors[row], model(image[None]).numpy()[0], atol=1e-5)


def test_one_embedder_goes_its_own_way(shards: list[OpenShard]) -> None:
    (session,) = open_together([Colours()], "cpu", images=7)
    assert type(session) is Session
    assert session.images == 7
    (timm,) = open_together([Model()], "cpu")
    assert isinstance(timm, TimmSession)
    usual = [batch.rows for batch in Model().open("cpu").batches(shards)]
    assert [batch.rows for (batch,) in batches_for([timm], shards)] == usual


class OwnBatches(Model):
    def batches(self, shards: Any, device: str) -> Any:
        return super().batches(shards, device)


class OwnShards(Model):
    def load_dataset_shard(self, tar_path: str) -> Any:
        return super().load_dataset_shard(tar_path)


class OwnModel(Model):
    def load_embedding_model(self, device: str) -> Any:
        model = super().load_embedding_model(device)
        return lambda images: model(images) + 1


GREY = {"input_size": (1, 160, 160), "mean": (0.5,), "std": (0.5,)}


@pytest.mark.parametrize(
    "other",
    [
        Model(loader="reference"),
        Model(decode="exact"),
        Model(exif="apply"),
        Model(max_pixels=10**6),
        Model(image_component="png"),
        Model(GREY),
        Model(NEAREST),
        OwnBatches(),
        OwnShards(),
        Colours(),
    ],
    ids=["loader", "decode", "exif", "max_pixels", "component", "grey", "reference", "batches", "shards", "custom"],
)
def test_those_that_decode_otherwise_do_not_share(other: ImageEmbedder) -> None:
    assert not can_share(Model(), other)
    assert not can_share(other, Model())
    with pytest.raises(ValueError, match="do not decode images in the same way"):
        open_together([Model(), other], "cpu")


def test_what_a_model_does_with_images_is_its_own_affair(shards: list[OpenShard]) -> None:
    embedders: list[ImageEmbedder] = [Model(), OwnModel(BORDER, precision="bfloat16", normalize_embeddings=False)]
    assert can_share(*embedders)
    sessions = open_together(embedders, "cpu")
    one, other = next(batches_for(sessions, shards))
    assert one.images.dtype == other.images.dtype == torch.float32
    assert sessions[0].model(one.images).shape == sessions[1].model(other.images).shape


def test_a_transform_that_dali_cannot_follow_is_refused_where_dali_is_asked_for() -> None:
    with pytest.raises(InputError, match="DALI cannot follow its transform"):
        can_share(Model(loader="dali"), Model(NEAREST, loader="dali"))


def test_sessions_that_were_opened_apart_are_refused(shards: list[OpenShard]) -> None:
    apart: list[Session] = [Model().open("cpu"), Model().open("cpu")]
    with pytest.raises(ValueError, match="not opened together"):
        next(batches_for(apart, shards))


def test_a_shared_session_gives_its_own_batches_too(shards: list[OpenShard]) -> None:
    sessions = open_together([Model(), Model(SQUASHED)], "cpu")
    expected, _ = alone(Model(SQUASHED), shards)
    found, _ = taken(list(sessions[1].batches(shards)))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[row], expected[row]) for row in expected)


@pytest.mark.gpu
@pytest.mark.parametrize("decode", ["exact", "fast", "auto"])
def test_on_a_gpu_models_agree_on_a_batch_size(shards: list[OpenShard], decode: str) -> None:
    sizes: list[Any] = ["auto", 8]
    embedders = [
        Model(changes, decode=decode, batch_size=size) for changes, size in zip([SAME, BORDER], sizes, strict=True)
    ]
    sessions = open_together(embedders, "cuda")
    assert [session.batch_size for session in sessions if isinstance(session, TimmSession)] == [8, 8]
    tuples = list(batches_for(sessions, shards))
    for embedder, batches in zip(embedders, zip(*tuples, strict=True), strict=True):
        found, rejected = taken(list(batches))
        single = embedder.open("cuda")
        expected, refused = taken(list(single.batches(shards)))
        assert rejected == refused
        assert found.keys() == expected.keys()
        for row, image in found.items():
            # With "auto" the two may have chosen otherwise, by what they measured.
            assert (image - expected[row]).abs().max() < (1e-2 if decode == "exact" else 0.1)


def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch, rate: float, *embedders: ImageEmbedder) -> list[Session]:
    """Sessions that are opened together as on a GPU whose models were measured; their loaders are a CPU's."""

    def build(*args: Any, fast: bool, **options: Any) -> tuple[Any, str]:
        return open_loader(*args, fast=False, **options | {"device": "cpu"})[0], "fast" if fast else "exact"

    def place(session: TimmSession) -> None:
        session.measured = Measured(8, rate)

    monkeypatch.setattr(timm_session, "open_loader", build)
    monkeypatch.setattr(TimmSession, "place", place)
    monkeypatch.setattr(TimmSession, "load", lambda session: lambda images: images)
    return open_together(embedders, "cuda")


@pytest.mark.parametrize(("rate", "decoder"), [(0.001, "exact"), (1e12, "fast")])
def test_models_of_one_decoding_decide_together(
    shards: list[OpenShard], monkeypatch: pytest.MonkeyPatch, rate: float, decoder: str
) -> None:
    monkeypatch.setattr(timm_session, "surely_fast", lambda *args: False)
    sessions = as_on_a_gpu(monkeypatch, rate, Model(batch_size="auto"), Model(BORDER, batch_size=4))
    assert decide_together(sessions, shards[0]) == Decision(decoder, 4)
    assert [session.decision for session in sessions] == [Decision(decoder, 4)] * 2
    assert [session.decoder for session in sessions] == [decoder] * 2
    first = next(batches_for(sessions, shards))
    assert [len(batch.rows) + len(batch.rejected) for batch in first] == [4, 4]


def test_sessions_keep_one_loader_when_they_get_other_cores(
    shards: list[OpenShard], monkeypatch: pytest.MonkeyPatch
) -> None:
    sessions = open_together([Model(num_threads_per_worker=None), Model(BORDER, num_threads_per_worker=None)], "cpu")
    use_cores(sessions, 3)
    ours = [session for session in sessions if isinstance(session, TimmSession)]
    assert {session.num_threads for session in ours} == {3}
    assert ours[0].loader is ours[1].loader
    before = ours[0].loader
    use_cores(sessions, 3)
    assert ours[0].loader is before
    assert sum(1 for _ in batches_for(sessions, shards[:1])) > 0


def test_sessions_opened_before_the_decision_take_it_if_their_batches_are_of_that_size() -> None:
    sessions = open_together([Model(), Model(OTHER_MEAN)], "cpu")
    assert sessions[0].batch_size == 4
    assert not take_decision(sessions, Decision("exact", 8))
    assert [session.decision for session in sessions] == [None, None]
    assert take_decision(sessions, Decision("exact", 4))
    assert [session.decision for session in sessions] == [Decision("exact", 4)] * 2
    for session in sessions:
        session.close()
