"""A custom embedder of two methods: whatever it yields, every sample is accounted for, under its own id."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from embedders.base import ImageEmbedder
from embedders.engine import Engine, Rows
from embedders.errors import InputError
from embedders.webdataset import OpenShard, open_shard
from tests.layers import Embedded, run_engine

Pairs = Iterator[tuple[Any, list[dict[str, Any]]]]


class Colours(ImageEmbedder):
    """An image's vector is its colour; batches of three, each a list of PIL images."""

    def load_dataset_shard(self, tar_path: str) -> Pairs:
        shard = open_shard(tar_path)
        samples = [sample for sample in shard.index.samples if (images := sample.images()) and images[0].size]
        for at in range(0, len(samples), 3):
            chunk = samples[at : at + 3]
            files = [io.BytesIO(shard.bytes_of(sample.components[0]).tobytes()) for sample in chunk]
            yield [Image.open(file) for file in files], [{"key": s.key} for s in chunk]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        return lambda images: np.array([image.getpixel((0, 0)) for image in images])


class Told(ImageEmbedder):
    """Yields the pairs it is told, for every shard, and runs the model it is told."""

    def __init__(self, pairs: list[tuple[Any, Sequence[Any]]], model: Callable[[Any], Any]) -> None:
        self.pairs = pairs
        self.model = model

    def load_dataset_shard(self, tar_path: str) -> Pairs:
        for batch, keys in self.pairs:
            yield batch, [{"key": key} for key in keys]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        return self.model


def png(colour: tuple[int, int, int]) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (2, 2), colour).save(out, "PNG")
    return out.getvalue()


def shard_of(path: Path, members: dict[str, bytes], id_col: str = "key") -> OpenShard:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return open_shard(path, id_col)


def embed(embedder: ImageEmbedder, *shards: OpenShard) -> list[Embedded]:
    return run_engine(embedder, shards)


@pytest.fixture
def abc(tmp_path: Path) -> OpenShard:
    return shard_of(tmp_path / "abc.tar", {f"{key}.png": png((i, 0, 0)) for i, key in enumerate("abc")})


def test_vectors_come_back_under_their_ids_in_the_order_of_the_tar(tmp_path: Path) -> None:
    colours = {f"{n}/{i:02}": (n, i, 7) for n in range(5) for i in range(n * 2)}
    shards = [
        shard_of(tmp_path / f"{n}.tar", {f"{k}.png": png(c) for k, c in colours.items() if k.startswith(f"{n}/")})
        for n in range(5)
    ]
    found = sorted(embed(Colours(), *shards), key=lambda embedded: embedded.shard.path)
    assert [embedded.samples for embedded in found] == [0, 2, 4, 6, 8]
    assert [i for embedded in found for i in embedded.ids] == list(colours)
    assert np.concatenate([e.vectors for e in found if e.ids]).tolist() == [list(c) for c in colours.values()]
    assert all(e.vectors.dtype == np.float32 and e.vectors.flags.c_contiguous for e in found)


def test_unusable_samples_are_quarantined_with_their_reasons(tmp_path: Path) -> None:
    members = {"a.png": png((1, 2, 3)), "b.txt": b"no image", "c.png": b"", "d.png": png((4, 5, 6))}
    (found,) = embed(Colours(), shard_of(tmp_path / "0.tar", members))
    assert found.ids == ["a", "d"]
    assert [(q.id, q.member, q.reason) for q in found.quarantined] == [
        ("b", "b.txt", "missing_image"),
        ("c", "c.png", "empty"),
    ]


@pytest.mark.parametrize("pairs", [[], [([0], "b")], [([0], "b"), ([1], "a")]], ids=len)
def test_forgotten_samples_are_quarantined(abc: OpenShard, pairs: list[Any]) -> None:
    given = sorted(key for _, keys in pairs for key in keys)
    for found in embed(Told(pairs, lambda b: np.ones((len(b), 2))), abc, abc, abc):
        assert found.ids == given
        assert [q.id for q in found.quarantined] == [key for key in "abc" if key not in given]
        assert {q.reason for q in found.quarantined} == {"not_embedded"}


@pytest.mark.parametrize(
    "pairs",
    [[([1, 2, 3, 4], "abca")], [([1, 2], "ab"), ([3, 4], "ca")], [([1, 2, 3], "abc"), ([4], "a"), ([5], "b")]],
    ids=["one batch", "two batches", "after all others"],
)
def test_the_first_vector_of_an_id_counts(abc: OpenShard, pairs: list[Any]) -> None:
    for found in embed(Told(pairs, lambda b: np.array(b)[:, None]), abc, abc):
        assert (found.ids, found.vectors.ravel().tolist(), found.quarantined) == (["a", "b", "c"], [1, 2, 3], [])


def test_a_repeated_id_is_quarantined_and_the_first_one_embedded(tmp_path: Path) -> None:
    members = {
        f"{key}.{kind}": data for key in "ab" for kind, data in (("png", png((9, 9, 9))), ("json", b'{"id": 5}'))
    }
    shard = shard_of(tmp_path / "0.tar", members, "id")

    class ById(Colours):
        def load_dataset_shard(self, tar_path: str) -> Pairs:
            for images, metadata in super().load_dataset_shard(tar_path):
                yield images, [{"id": 5.0} for _ in metadata]

    (found,) = embed(ById(), shard)
    assert found.ids == ["5"]
    assert [(q.id, q.member, q.reason) for q in found.quarantined] == [("5", "b.png", "duplicate_id")]


def test_an_embedder_may_embed_what_is_no_image_to_others(tmp_path: Path) -> None:
    shards = [shard_of(tmp_path / f"{n}.tar", {f"{key}.npy": b"1" for key in "abc"}) for n in range(3)]
    for found in embed(Told([([1], "a"), ([2], "b"), ([3], "c")], lambda b: np.array(b)[:, None]), *shards):
        assert (found.ids, found.quarantined) == (["a", "b", "c"], [])


@pytest.mark.parametrize("shape", [(2,), (2, 4), (4, 3, 1), ()])
def test_vectors_of_a_wrong_shape_are_refused(abc: OpenShard, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"for a batch of 3; load_embedding_model must return"):
        embed(Told([([1, 2, 3], "abc")], lambda b: torch.zeros(shape)), abc)


def test_a_model_that_returns_a_pair_is_refused(abc: OpenShard) -> None:
    with pytest.raises(ValueError, match=r"\(2, 3, 4\) for a batch of 3"):
        embed(Told([([1, 2, 3], "abc")], lambda b: (np.zeros((3, 4)), np.zeros((3, 4)))), abc)


def test_dimensions_must_not_change(abc: OpenShard) -> None:
    with pytest.raises(ValueError, match=r"of shape \(1,\) for 'image_embedding' after \(2,\)"):
        embed(Told([([1, 2], "ab"), ([3], "c")], lambda b: np.ones((len(b), len(b)))), abc)


def test_nan_and_infinity_never_become_vectors(abc: OpenShard) -> None:
    values = np.array([[1, 2], [np.nan, 0], [np.inf, 0]])
    (found,) = embed(Told([([1, 2, 3], "abc")], lambda b: torch.tensor(values)), abc)
    assert (found.ids, found.vectors.tolist()) == (["a"], [[1, 2]])
    assert [(q.id, q.reason) for q in found.quarantined] == [("b", "not_embedded"), ("c", "not_embedded")]


def test_a_vector_after_or_before_nan_of_the_same_sample_counts(abc: OpenShard) -> None:
    for values in ([1, 2, np.nan, 3], [np.nan, 2, 1, 3]):
        pairs: list[Any] = [([values[0], values[1]], "ab"), ([values[2]], "a"), ([values[3]], "c")]
        (found,) = embed(Told(pairs, lambda b: np.array(b)[:, None]), abc)
        assert (found.vectors.ravel().tolist(), found.quarantined) == ([1, 2, 3], [])


def test_metadata_without_the_id_column_is_refused(tmp_path: Path) -> None:
    shard = shard_of(tmp_path / "0.tar", {"a.png": b"1", "a.json": json.dumps({"id": 1}).encode()}, "id")
    with pytest.raises(InputError, match=r"Told.load_dataset_shard.*without the id column 'id'; it has \['key'\]"):
        embed(Told([([1], "a")], np.array), shard)


def test_an_id_that_no_sample_has_is_refused(abc: OpenShard) -> None:
    with pytest.raises(InputError, match="yields id 'z', which no sample of the shard has"):
        embed(Told([([1], "z")], np.array), abc)


def test_what_batches_leaves_out_is_an_error_not_a_silence(abc: OpenShard) -> None:
    class Lossy(Told):
        def batches(self, shards: Any, device: str) -> Any:
            return (batch for batch in super().batches(shards, device) if batch.rows)

    with pytest.raises(RuntimeError, match=r"Lossy.batches left out samples of .*abc\.tar"):
        embed(Lossy([([1], "a")], lambda b: np.ones((1, 2))), abc)


def scarce(limit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def model(images: torch.Tensor) -> torch.Tensor:
        if len(images) > limit:
            raise torch.OutOfMemoryError(f"{len(images)} images")
        return images * 2

    return model


def test_a_batch_that_does_not_fit_is_run_in_halves(abc: OpenShard) -> None:
    images = torch.tensor([[1.0], [2.0], [3.0]])
    (found,) = embed(Told([(images, "abc")], scarce(1)), abc)
    assert found.vectors.tolist() == [[2], [4], [6]]


def test_one_image_that_does_not_fit_is_an_error(abc: OpenShard) -> None:
    with pytest.raises(torch.OutOfMemoryError):
        embed(Told([(torch.zeros(3, 1), "abc")], scarce(0)), abc)


def test_the_model_runs_without_gradients(abc: OpenShard) -> None:
    layer = torch.nn.Linear(1, 4)
    (found,) = embed(Told([(torch.zeros(3, 1), "abc")], layer), abc)
    assert found.vectors.shape == (3, 4)


def test_the_fingerprint_follows_attributes_and_code_and_not_the_column() -> None:
    first = Told([([1], "a")], print)
    assert first.fingerprint() == Told([([1], "a")], print).fingerprint()
    assert first.fingerprint() != Told([([1], "b")], print).fingerprint()
    assert first.fingerprint() != Colours().fingerprint()
    first.image_embedding_column = "other"
    assert first.fingerprint() == Told([([1], "a")], print).fingerprint()
    assert json.loads(json.dumps(first.fingerprint())) == first.fingerprint()


def test_classifiers_are_refused() -> None:
    with pytest.raises(InputError, match="classifiers are not supported"):
        Colours(classifiers=["aesthetic"])


def test_a_batch_that_a_cpu_has_no_memory_for_is_halved(abc: OpenShard) -> None:
    def narrow(images: torch.Tensor) -> torch.Tensor:
        if len(images) > 1:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")
        return images

    (shard,) = embed(Told([(torch.arange(6.0).view(3, 2), ["a", "b", "c"])], narrow), abc)
    assert shard.ids == ["a", "b", "c"]
    np.testing.assert_array_equal(shard.vectors, np.arange(6.0).reshape(3, 2))


def test_an_image_that_a_model_has_no_memory_for_says_so(abc: OpenShard) -> None:
    def none_fits(images: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes")

    with pytest.raises(MemoryError, match="more memory for a single image than there is"):
        embed(Told([(torch.zeros(3, 2), ["a", "b", "c"])], none_fits), abc)


class Several(Told):
    """Gives what it is told beside its vectors, batch after batch of one image."""

    extra_columns = ("score",)

    def __init__(self, *batches: dict[str, np.ndarray]) -> None:
        given = iter(batches)
        vectors = {"image_embedding": np.zeros((1, 2))}
        super().__init__([(None, [key]) for key in "abc"], lambda images: vectors | next(given))


ONE = np.zeros(1)


@pytest.mark.parametrize(
    ("batches", "line"),
    [
        ([{}], "the model gave a mapping without 'score'; it has image_embedding"),
        ([{"score": ONE, "id": ONE}], "the model gave 'id' too; name it in the embedder's extra_columns"),
        ([{"score": ONE}, {}], "the model gave a mapping without 'score'"),
        ([{"score": ONE}, {"score": np.zeros(1, np.int64)}], "the model gave int64 for 'score' after float64"),
        ([{"score": ONE}, {"score": np.zeros((1, 2))}], r"shape \(2,\) for 'score' after \(\)"),
        ([{"score": ONE, "image_embedding": ONE}], "the model gave 'image_embedding' as an array of shape"),
    ],
)
def test_columns_are_those_that_were_named_and_stay_as_they_are(
    abc: OpenShard, batches: list[dict[str, np.ndarray]], line: str
) -> None:
    with pytest.raises(ValueError, match=line):
        embed(Several(*batches, *batches, *batches), abc)


def test_numbers_beside_the_vectors_keep_their_type(abc: OpenShard) -> None:
    numbers = [2.0**53 + i for i in (0, 2, 4)]
    engine = Engine([Several(*({"score": np.array([number])} for number in numbers)).open("cpu")])
    rows = [found for found in engine.embed([abc]) if isinstance(found, Rows)]
    assert [value for found in rows for value in found.columns["score"].tolist()] == numbers
