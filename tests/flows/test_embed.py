"""The whole flow on two worker processes, against timm's own preprocessing."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
import torch
from PIL import Image

from embedders import TimmImageEmbedder
from flows.demo_data import BROKEN
from flows.embed import embed_dataset
from tasks.manifest import Manifest, read_manifest
from tasks.relocation import RELATIVE

MODEL = "tf_efficientnet_lite0"
TINY = "test_vit.r160_in1k"


def vectors(output: Path) -> dict[str, np.ndarray]:
    """id: vector, of every row of an output's merged metadata."""
    table = pq.read_table(output / "metadata")
    matrix = table.column("image_embedding").combine_chunks().values.to_numpy().reshape(len(table), -1)
    return dict(zip(table.column("key").to_pylist(), matrix, strict=True))


def written(folder: Path) -> dict[str, int]:
    """Every file below a folder, with the time it was written."""
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def dali(
    server: str, demo_dataset: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """The demo embedded through DALI on two workers."""
    output = tmp_path_factory.mktemp("out") / "dali"
    return output, embed_dataset(
        str(demo_dataset), str(output), model_name=MODEL, checkpoint=str(checkpoint), workers=2, device="cpu"
    )


@pytest.fixture(scope="module")
def expected(demo_dataset: Path, checkpoint: Path) -> dict[str, np.ndarray]:
    """id: the vector of each photograph that timm itself gives: Pillow, timm's transform, float32, one by one."""
    model: Any = timm.create_model(MODEL, checkpoint_path=str(checkpoint)).eval()
    model.reset_classifier(0)
    transform: Any = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    found = {}
    for key, data in photographs(demo_dataset):
        try:
            image = Image.open(io.BytesIO(data)).convert("RGB")
        except OSError:
            continue
        with torch.inference_mode():
            found[key] = torch.nn.functional.normalize(model(transform(image)[None]), dim=-1)[0].numpy()
    return found


def photographs(dataset: Path) -> Iterator[tuple[str, bytes]]:
    """(key, bytes) of every image member, by Python's own tar reader."""
    for path in sorted(dataset.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                key, _, extension = member.name.partition(".")
                if extension in {"jpg", "jpeg", "png"}:
                    yield key, tar.extractfile(member).read()  # type: ignore[union-attr]


def cosines(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> np.ndarray:
    assert found.keys() == expected.keys()
    return np.array([np.dot(found[key].astype(np.float64), expected[key].astype(np.float64)) for key in expected])


def test_every_photograph_has_timms_vector(dali: tuple[Path, Manifest], expected: dict[str, np.ndarray]) -> None:
    agreement = cosines(vectors(dali[0]), expected)
    assert len(agreement) == 254
    assert agreement.min() >= 0.999
    assert agreement.mean() >= 0.9999


def test_the_reference_loader_gives_timms_very_vectors(
    server: str, demo_dataset: Path, checkpoint: Path, tmp_path: Path, expected: dict[str, np.ndarray]
) -> None:
    embed_dataset(
        str(demo_dataset),
        str(tmp_path / "out"),
        model_name=MODEL,
        checkpoint=str(checkpoint),
        loader="reference",
        workers=2,
        device="cpu",
    )
    assert cosines(vectors(tmp_path / "out"), expected).min() > 0.999999


def test_the_account_names_every_sample(dali: tuple[Path, Manifest], demo_dataset: Path) -> None:
    output, manifest = dali
    assert (manifest.samples, manifest.embedded, manifest.quarantined) == (256, 254, 2)
    assert manifest.quarantined_by_reason == {"not_an_image": 1, "truncated": 1}
    stored = json.loads((output / "manifest.json").read_text())
    assert {name: stored[name] for name in stored if name != RELATIVE} == manifest.model_dump(mode="json")
    assert stored[RELATIVE]["metadata"] == "metadata"
    assert read_manifest(str(output)) == manifest
    quarantine = pq.read_table(output / "quarantine/image_embedding").to_pylist()
    assert {row["id"] for row in quarantine} == {f"{shard * 64 + sample:09}" for shard, sample in BROKEN}
    assert all(row["member"] == f"{row['id']}.jpg" and row["detail"] for row in quarantine)
    everything = {key for key, _ in photographs(demo_dataset)}
    assert everything == vectors(output).keys() | {row["id"] for row in quarantine}


def test_metadata_keeps_its_rows_order_and_types(dali: tuple[Path, Manifest], demo_dataset: Path) -> None:
    for path in sorted(demo_dataset.glob("*.parquet")):
        before, after = pq.read_table(path), pq.read_table(dali[0] / "metadata" / path.name)
        kept = [key in set(after["key"].to_pylist()) for key in before["key"].to_pylist()]
        assert after.drop_columns("image_embedding").replace_schema_metadata(None) == before.filter(pa.array(kept))
        assert after.schema.field("image_embedding").type.value_type == pa.float32()
        assert pa.types.is_list(after.schema.field("image_embedding").type)


def test_the_dataset_opens_in_pandas(dali: tuple[Path, Manifest]) -> None:
    frame = pd.read_parquet(dali[0] / "metadata")
    matrix = np.stack(frame["image_embedding"].to_list())
    assert matrix.shape == (254, 1280)
    assert np.allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-5)


@pytest.fixture(scope="module")
def pristine(server: str, demo_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a copy of the demo's shards in data/, embedded by a tiny model into out/."""
    folder = tmp_path_factory.mktemp("pristine")
    shutil.copytree(demo_dataset, folder / "data")
    assert embed_tiny(folder / "data", folder / "out").shards_failed == 0
    return folder


@pytest.fixture
def small(pristine: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A dataset that a test may change, and what was made of it."""
    shutil.copytree(pristine, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", tmp_path / "out"


def embed_tiny(dataset: Path, output: Path, **parameters: Any) -> Manifest:
    return embed_dataset(
        str(dataset), str(output), TimmImageEmbedder(TINY, pretrained=False), workers=2, device="cpu", **parameters
    )


def test_only_what_is_missing_is_done_again(small: tuple[Path, Path]) -> None:
    dataset, output = small
    before = written(output)
    vectors_before = vectors(output)
    (output / "layers/image_embedding/00001.parquet").unlink()
    cut = output / "layers/image_embedding/00002.parquet"
    cut.write_bytes(cut.read_bytes()[:-100])
    manifest = embed_tiny(dataset, output)
    after = written(output)
    changed = {name for name in after if after[name] != before[name]}
    assert (manifest.shards, manifest.shards_cached) == (4, 2)
    assert changed == {
        "manifest.json",
        "report.html",
        "layers/image_embedding/00001.parquet",
        "layers/image_embedding/00002.parquet",
        "quarantine/image_embedding/00002.parquet",
    }
    assert all((vectors(output)[key] == vector).all() for key, vector in vectors_before.items())


def test_a_changed_caption_merges_and_does_not_embed(small: tuple[Path, Path]) -> None:
    dataset, output = small
    before = written(output)
    table = pq.read_table(dataset / "00003.parquet")
    captions = pa.array(["a new caption"] * len(table))
    pq.write_table(table.set_column(1, "caption", captions), dataset / "00003.parquet")
    assert embed_tiny(dataset, output).shards_cached == 4
    after = written(output)
    assert {name for name in after if after[name] != before[name]} == {
        "manifest.json",
        "metadata/00003.parquet",
        "report.html",
    }
    assert set(pq.read_table(output / "metadata/00003.parquet")["caption"].to_pylist()) == {"a new caption"}


def test_a_changed_tar_is_embedded_again(small: tuple[Path, Path]) -> None:
    dataset, output = small
    os.utime(dataset / "00000.tar")
    assert embed_tiny(dataset, output).shards_cached == 3


def test_a_damaged_tar_fails_by_name_and_stops_no_other(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    dataset, output = tmp_path / "data", tmp_path / "out"
    shutil.copytree(demo_dataset, dataset)
    whole = (dataset / "00001.tar").read_bytes()
    (dataset / "00001.tar").write_bytes(whole[: len(whole) // 2])
    manifest = embed_tiny(dataset, output)
    assert (manifest.shards_failed, manifest.embedded) == (1, 3 * 64 - 2)
    assert list(manifest.failures) == ["00001"]
    assert "cut short" in manifest.failures["00001"]
    assert not (output / "layers/image_embedding/00001.parquet").exists()
    (dataset / "00001.tar").write_bytes(whole)
    manifest = embed_tiny(dataset, output)
    assert (manifest.shards_failed, manifest.shards_cached, manifest.embedded) == (0, 3, 254)


def test_a_shard_decoded_less_exactly_than_asked_for_is_done_again(small: tuple[Path, Path]) -> None:
    dataset, output = small
    manifest = embed_tiny(dataset, output)
    assert (manifest.shards_cached, manifest.decoders) == (4, {"exact": 4})
    reference = TimmImageEmbedder(TINY, pretrained=False, loader="reference")
    manifest = embed_dataset(str(dataset), str(output), reference, device="cpu")
    assert (manifest.shards_cached, manifest.decoders) == (0, {"reference": 4})
    merged = pq.read_table(output / "metadata/00000.parquet")
    embedded = pq.read_table(output / "layers/image_embedding/00000.parquet")
    vectors_of = dict(zip(embedded["id"].to_pylist(), embedded["image_embedding"].to_pylist(), strict=True))
    assert merged["image_embedding"].to_pylist() == [vectors_of[key] for key in merged["key"].to_pylist()]
    assert embed_tiny(dataset, output).shards_cached == 4  # by default either will do


def test_null_keeps_the_rows_of_bad_images(small: tuple[Path, Path]) -> None:
    dataset, output = small
    assert embed_tiny(dataset, output, on_error="null").shards_cached == 4
    table = pq.read_table(output / "metadata")
    assert (len(table), table["image_embedding"].null_count) == (256, 2)


def test_raise_fails_the_shards_of_bad_images(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    manifest = embed_tiny(demo_dataset, tmp_path / "out", on_error="raise")
    assert set(manifest.failures) == {"00000", "00002"}
    assert manifest.embedded == 128
