"""Nothing of a shard stays once it is through: not its mapping, not its descriptor, not its vectors.

Garbage is not collected meanwhile: what only that would free stays for long in a worker, which collects it seldom.
"""

from __future__ import annotations

import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.webdataset import open_shard
from tasks.retries import ShardsFailed
from tasks.shards import Shard, find_shards
from tasks.storage.folder import Folder
from tests.layers import embed_all

from .conftest import MakeShard, write_tar

WIDTH = 100_000


class Held(NamedTuple):
    """What this process holds: tars mapped, descriptors of tars, and resident memory in MB."""

    mappings: int
    descriptors: int
    memory: float

    @classmethod
    def now(cls) -> Held:
        """Count them."""
        mappings = sum(line.rstrip().endswith(".tar") for line in Path("/proc/self/maps").read_text().splitlines())
        links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
        descriptors = sum(os.path.islink(link) and os.readlink(link).endswith(".tar") for link in links)
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return cls(mappings, descriptors, pages * os.sysconf("SC_PAGE_SIZE") / 1e6)


@pytest.fixture(autouse=True)
def garbage_stays() -> Iterator[None]:
    """Collect no garbage during a test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Wide(ImageEmbedder):
    """Gives vectors of 0.4 MB each, so that those of a shard would be missed."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        ids = open_shard(tar_path).ids
        yield len(ids), [{"key": sample_id} for sample_id in ids]

    def load_embedding_model(self, device: str) -> Callable[[int], np.ndarray]:
        return lambda count: np.ones((count, WIDTH), np.float32)


def run(shards: list[Shard], embedder: ImageEmbedder) -> tuple[int, set[str]]:
    """Embed a group: how many shards were done, and which failed."""
    try:
        return len(embed_all(shards, embedder)), set()
    except ShardsFailed as failed:
        return len(shards) - len(failed.failures), {failure.shard for failure in failed.failures}


def make_shards(folder: Path, jpeg: bytes, count: int) -> list[Shard]:
    """Shards of four samples; every tenth is cut short, every seventh holds an image that is none."""
    for number in range(count):
        members = {f"{number}{key}.jpg": jpeg for key in "abc"}
        path = folder / "data" / f"{number:05}.tar"
        write_tar(path, members | {f"{number}d.jpg": b"no image" if number % 7 == 0 else jpeg})
        if number % 10 == 9:
            path.write_bytes(path.read_bytes()[:1024])
    return find_shards(str(folder / "data"), str(folder / "out"))


def test_two_hundred_shards_leave_nothing(tmp_path: Path, jpeg: bytes) -> None:
    shards = make_shards(tmp_path, jpeg, 210)
    run(shards[:10], embedder := Wide())
    before = Held.now()
    for start in range(10, 210, 20):
        done, failed = run(shards[start : start + 20], embedder)
        assert (done, len(failed)) == (18, 2)
        held = Held.now()
        assert (held.mappings, held.descriptors) == (0, 0)
        assert held.memory < before.memory + 60  # the vectors of 200 shards are 300 MB


def test_shards_of_a_timm_model_leave_nothing(tmp_path: Path, jpeg: bytes, tiny: TimmImageEmbedder) -> None:
    shards = make_shards(tmp_path, jpeg, 20)
    for start in range(0, 20, 10):
        assert run(shards[start : start + 10], tiny)[0] == 9
        assert Held.now()[:2] == (0, 0)


class Broken(Wide):
    """Has a model that is of no use."""

    def load_embedding_model(self, device: str) -> Callable[[int], np.ndarray]:
        class Model:
            def __call__(self, count: int) -> np.ndarray:
                raise RuntimeError("the device is gone")

        model = Model()
        self._model = weakref.ref(model)
        return model


def test_an_engine_that_fails_leaves_neither_shards_nor_its_model(make_shard: MakeShard) -> None:
    shards = [make_shard(f"{number}") for number in range(6)]
    embedder = Broken()
    assert run(shards, embedder) == (0, {shard.name for shard in shards})
    assert Held.now()[:2] == (0, 0)
    assert embedder._model() is None


class Thing:
    """Something to be missed."""


def ask(folder: Folder) -> weakref.ref[Thing]:
    """Ask for a file that is not there, with a thing in hand."""
    thing = Thing()
    assert folder.fingerprint("missing") is None
    assert folder.read_text("missing") is None
    return weakref.ref(thing)


def test_a_file_that_is_missing_keeps_no_frame(tmp_path: Path) -> None:
    assert ask(Folder(str(tmp_path)))() is None


def test_a_file_that_is_missing_in_a_store_keeps_no_frame(tmp_path: Path) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        assert ask(Folder(f"http://127.0.0.1:{server.server_address[1]}"))() is None
    finally:
        server.shutdown()
        server.server_close()
