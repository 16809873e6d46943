"""What makes a shard be embedded again and what does not: a row of docs/faults-and-caches.md each."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.fingerprint import digest
from flows.config import EmbedConfig
from tasks.keys import layer_key, merge_key
from tasks.merge_options import MergedColumn
from tasks.shards import Shard, find_shards, with_content_fingerprints


class Scaled(ImageEmbedder):
    """A custom embedder with a parameter."""

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def load_dataset_shard(self, tar_path: str) -> Any:
        raise NotImplementedError

    def load_embedding_model(self, device: str) -> Any:
        raise NotImplementedError


class Renamed(Scaled):
    """Another class with the same parameters."""


@pytest.fixture
def data(demo_dataset: Path, tmp_path: Path) -> Path:
    """One shard that a test may change."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("00000.tar", "00000.parquet"):
        shutil.copy2(demo_dataset / name, folder)
    return folder


def shard_of(data: Path, fingerprint: str = "stat", key_dot: Any = "first") -> Shard:
    shards = find_shards(str(data), "/out", key_dot)
    return (with_content_fingerprints(shards) if fingerprint == "content" else shards)[0]


def keys(data: Path, fingerprint: str = "stat", made: ImageEmbedder | None = None, **options: Any) -> tuple[str, str]:
    """The key of the shard's embeddings and that of its merged file, as a run with these options takes them."""
    given: dict[str, Any] = {"model_name": "test_vit.r160_in1k", "pretrained": False, "fingerprint": fingerprint}
    config = EmbedConfig(dataset=str(data), output="/out", **given | options)
    embedder = made or config.build_embedders()[0]
    shard = shard_of(data, fingerprint, config.key_dot)
    embedding = layer_key(shard, embedder.image_embedding_column, digest(embedder.fingerprint()), config.id_col)
    column = MergedColumn(embedder.image_embedding_column, embedder.image_embedding_column, "float32", (8,))
    joined = replace(config.merge_options(), columns=(column,))
    return embedding, merge_key(shard, {column.layer: embedding}, joined.as_dict())


def touch(data: Path) -> None:
    os.utime(data / "00000.tar", (1, 1))


def change_a_byte(data: Path) -> None:
    """Of an image, keeping size and time."""
    path = data / "00000.tar"
    before, content = path.stat(), bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def lengthen(data: Path) -> None:
    with (data / "00000.tar").open("ab") as file:
        file.write(bytes(1024))


def rename(data: Path) -> None:
    for ending in ("tar", "parquet"):
        (data / f"00000.{ending}").rename(data / f"1.{ending}")


def change_captions(data: Path) -> None:
    table = pq.read_table(data / "00000.parquet")
    captions = pa.array(["a longer caption than before"] * len(table))
    pq.write_table(table.set_column(1, "caption", captions), data / "00000.parquet")


@pytest.mark.parametrize("change", [touch, lengthen, rename])
def test_another_tar_is_another_key(data: Path, change: Callable[[Path], None]) -> None:
    before = keys(data)[0]
    change(data)
    assert keys(data)[0] != before


@pytest.mark.parametrize("change", [change_a_byte, lengthen, rename])
def test_other_bytes_are_another_key_by_content(data: Path, change: Callable[[Path], None]) -> None:
    before = keys(data, "content")[0]
    change(data)
    assert keys(data, "content")[0] != before


def test_by_content_another_time_is_nothing(data: Path) -> None:
    before = keys(data, "content")
    touch(data)
    assert keys(data, "content") == before


@pytest.mark.parametrize(
    "option",
    [
        {"model_name": "test_efficientnet.r160_in1k"},
        {"normalize_embeddings": False},
        {"autocast": False},
        {"precision": "bfloat16"},
        {"exif": "apply"},
        {"max_pixels": 1_000_000},
        {"image_component": "left.jpg"},
        {"id_col": "uid"},
        {"image_embedding_column": "vector"},
        {"key_dot": "last"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_what_changes_vectors_changes_the_key(data: Path, option: dict[str, Any]) -> None:
    assert keys(data, **option)[0] != keys(data)[0]


def test_weights_change_the_key(data: Path, checkpoint: Path) -> None:
    model = "tf_efficientnet_lite0"
    random = keys(data, model_name=model)
    assert keys(data, model_name=model, pretrained=True, checkpoint=str(checkpoint))[0] != random[0]


def test_another_embedder_or_parameter_changes_the_key(data: Path) -> None:
    found = {keys(data, made=made)[0] for made in (Scaled(), Scaled(2.0), Renamed())}
    assert len(found) == 3
    assert keys(data, made=Scaled())[0] in found


@pytest.mark.parametrize(
    "option",
    [
        {"batch_size": 7},
        {"num_threads_per_worker": 3},
        {"use_index_files": False},
        {"loader": "reference"},
        {"decode": "exact"},
        {"workers": 5},
        {"device": "cpu"},
        {"scheduler": "tcp://127.0.0.1:8786"},
        {"overwrite": True},
        {"verify": True},
        {"shard_timeout": 9.0},
        {"max_quarantined": "5%"},
    ],
    ids=lambda option: next(iter(option)),
)
def test_how_a_run_is_done_changes_nothing(data: Path, option: dict[str, Any]) -> None:
    assert keys(data, **option) == keys(data)


def test_how_rows_are_joined_merges_and_does_not_embed(data: Path) -> None:
    before, after = keys(data), keys(data, on_error="null")
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_captions_merge_and_do_not_embed(data: Path) -> None:
    before = keys(data)
    change_captions(data)
    after = keys(data)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_an_embedder_made_in_python_has_the_command_lines_key(data: Path) -> None:
    made = TimmImageEmbedder("test_vit.r160_in1k", pretrained=False, batch_size=3)
    assert keys(data, made=made) == keys(data)
