"""Small datasets of real photographs, as a person finds them."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders import TimmImageEmbedder
from flows.demo_data import load_photograph
from tasks.shards import Shard, find_shards

MakeShard = Callable[..., Shard]


def write_tar(path: Path, members: dict[str, bytes]) -> None:
    """Write members in their order."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


@pytest.fixture(scope="session")
def jpeg() -> bytes:
    """A small photograph of a cat."""
    out = io.BytesIO()
    load_photograph("skimage", "data/chelsea.png").resize((96, 64)).save(out, "JPEG")
    return out.getvalue()


@pytest.fixture
def make_shard(tmp_path: Path, jpeg: bytes) -> MakeShard:
    """A function that writes a shard into the test's dataset: samples by key, and metadata if there is any."""

    def make(
        name: str = "00000",
        keys: tuple[str, ...] = ("a", "b", "c"),
        json_of: dict[str, Any] | None = None,
        metadata: dict[str, Any] | pa.Table | None = None,
        **members: bytes,
    ) -> Shard:
        images = {f"{key}.jpg": jpeg for key in keys}
        texts = {f"{key}.json": json.dumps(value).encode() for key, value in (json_of or {}).items()}
        named = {key.replace("__", "."): data for key, data in members.items()}
        write_tar(tmp_path / "data" / f"{name}.tar", images | texts | named)
        if metadata is not None:
            table = metadata if isinstance(metadata, pa.Table) else pa.table(metadata)
            pq.write_table(table, tmp_path / "data" / f"{name}.parquet")
        shards = find_shards(str(tmp_path / "data"), str(tmp_path / "out"))
        return next(shard for shard in shards if shard.name == name)

    return make


@pytest.fixture
def tiny() -> TimmImageEmbedder:
    """A small model with random weights; 64 dimensions."""
    return TimmImageEmbedder("test_vit", pretrained=False, batch_size=2, num_threads_per_worker=1)
