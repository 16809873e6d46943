"""One engine a worker: the shards of several tasks run through it as one stream, and each task gets its own back."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tasks.worker.shared_engine
from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.engine import Engine
from embedders.recipe import Recipe
from embedders.shard_batch import ShardBatch
from embedders.webdataset import OpenShard, open_shard
from tasks.worker.shared_engine import shared_engine
from tests.layers import embedded_shards

from ..conftest import MakeShard


class Sizes(ImageEmbedder):
    """The vector of an image is its size in bytes. Counts its models; `broken` names a shard that it fails at."""

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self._models: list[str] = []
        self._streams: list[list[str]] = []

    def load_dataset_shard(self, tar_path: str) -> Any:
        if self.broken and tar_path.endswith(self.broken):
            raise RuntimeError("the decoder went away")
        shard = open_shard(tar_path)
        yield [s.components[0].size for s in shard.index.samples], [{"key": s.key} for s in shard.index.samples]

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        seen: list[str] = []
        self._streams.append(seen)

        def noted() -> Iterator[OpenShard]:
            for shard in shards:
                seen.append(Path(shard.path).stem)
                yield shard

        return super().batches(noted(), device)

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        self._models.append(threading.current_thread().name)
        return lambda sizes: np.array(sizes, float)[:, None]


@pytest.fixture
def paths(make_shard: MakeShard) -> list[str]:
    """Six tars of three samples each."""
    made = [make_shard(f"{n:05}", keys=(f"{n}a", f"{n}b", f"{n}c")) for n in range(6)]
    return [shard.source.path(shard.tar) for shard in made]


def named(embedder: ImageEmbedder, name: str) -> tuple[Recipe, ...]:
    """The recipe of an embedder, under a fingerprint of the test's choice."""
    column = embedder.image_embedding_column
    return (Recipe(column, embedder, {"embedder": name}, name, name, (column,)),)


def ids(paths: Iterable[str], embedder: ImageEmbedder, name: str = "sizes") -> list[list[str]]:
    """The ids of each shard that came back, sorted."""
    with shared_engine(named(embedder, name), "cpu") as engine:
        return sorted(done.ids for done in embedded_shards(engine.embed(open_shard(path) for path in paths)))


def expected(numbers: Iterable[int]) -> list[list[str]]:
    return [[f"{n}a", f"{n}b", f"{n}c"] for n in numbers]


def test_an_engine_is_made_once_and_replaced_for_another_embedder(paths: list[str]) -> None:
    embedder = Sizes()
    assert ids(paths[:2], embedder, "kept") == expected([0, 1])
    assert ids(paths[2:3], embedder, "kept") == expected([2])
    assert len(embedder._models) == 1
    assert ids(paths[:1], embedder, "other") == expected([0])
    assert ids(paths[:1], embedder, "kept") == expected([0])
    assert len(embedder._models) == 3


class SelfReferring(Sizes):
    """Its model is in a cycle, as a compiled one is."""

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        class Model:
            def __init__(self) -> None:
                self.itself = self

            def __call__(self, sizes: Any) -> np.ndarray:
                return np.array(sizes, float)[:, None]

        model = Model()
        self._reference = weakref.ref(model)
        return model


class Parameter:
    """An attribute without a representation of its own."""


def test_the_copies_that_tasks_bring_share_one_engine(paths: list[str]) -> None:
    engines = set()
    for path in paths[:2]:
        embedder = Sizes()
        embedder.parameter = Parameter()  # type: ignore[attr-defined]
        with shared_engine(named(embedder, "copies"), "cpu") as engine:
            list(engine.embed([open_shard(path)]))
            engines.add(id(engine))
    assert len(engines) == 1


def test_a_model_is_freed_when_another_takes_its_place(paths: list[str]) -> None:
    embedder = SelfReferring()
    assert ids(paths[:1], embedder, "first") == expected([0])
    gc.collect()
    assert embedder._reference() is not None
    assert ids(paths[:1], Sizes(), "second") == expected([0])
    assert embedder._reference() is None


def test_the_shards_of_two_tasks_are_one_stream(paths: list[str]) -> None:
    embedder = Sizes()
    both_opening = threading.Barrier(2)

    def task(mine: list[str]) -> list[list[str]]:
        def opened() -> Iterator[OpenShard]:
            yield open_shard(mine[0])
            both_opening.wait(20)
            for path in mine[1:]:
                yield open_shard(path)

        with shared_engine(named(embedder, "together"), "cpu") as engine:
            return sorted(done.ids for done in embedded_shards(engine.embed(opened())))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(task, [paths[:3], paths[3:]]))
    assert found == [expected(range(3)), expected(range(3, 6))]
    assert len(embedder._models) == 1
    assert len(embedder._streams) == 1
    assert sorted(embedder._streams[0]) == [f"{n:05}" for n in range(6)]


def test_an_error_in_opening_is_that_tasks_own(paths: list[str]) -> None:
    embedder = Sizes()
    failed = threading.Event()

    def failing() -> Iterator[OpenShard]:
        yield open_shard(paths[0])
        raise OSError("the disk went away")

    def slow() -> Iterator[OpenShard]:
        yield open_shard(paths[1])
        assert failed.wait(20)
        yield open_shard(paths[2])

    def first() -> None:
        with (
            shared_engine(named(embedder, "errors"), "cpu") as engine,
            pytest.raises(OSError, match="the disk went away"),
        ):
            list(engine.embed(failing()))
        failed.set()

    def second() -> list[list[str]]:
        with shared_engine(named(embedder, "errors"), "cpu") as engine:
            return sorted(done.ids for done in embedded_shards(engine.embed(slow())))

    with ThreadPoolExecutor(2) as pool:
        other = pool.submit(second)
        pool.submit(first).result(30)
        assert other.result(30) == expected([1, 2])
    assert len(embedder._models) == 1


def test_an_engine_that_fails_fails_all_its_tasks_and_the_next_gets_a_new_one(paths: list[str]) -> None:
    embedder = Sizes(broken="00003.tar")
    inside = threading.Barrier(2)

    def task(mine: list[str]) -> str:
        with shared_engine(named(embedder, "broken"), "cpu") as engine:
            inside.wait(20)
            with pytest.raises(RuntimeError) as caught:
                list(engine.embed(open_shard(path) for path in mine))
        return str(caught.value)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(task, [[paths[0], paths[3]], [*paths[1:3] * 50, paths[3]]]))
    assert found == ["the decoder went away"] * 2
    assert ids(paths[:1], embedder, "broken") == expected([0])
    assert len(embedder._models) == 2


def test_a_run_with_another_embedder_gets_its_turn(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """One run's tasks overlap, so that its engine is never without a user; the other's wait all the same."""
    monkeypatch.setattr(tasks.worker.shared_engine, "TURN", 0.3)
    over, longest = threading.Event(), 60.0

    def busy(delay: float) -> None:
        time.sleep(delay)
        until = time.monotonic() + longest
        while not over.is_set() and time.monotonic() < until:
            with shared_engine(named(Sizes(), "busy"), "cpu"):
                over.wait(0.2)

    with ThreadPoolExecutor(2) as pool:
        others = [pool.submit(busy, delay) for delay in (0.0, 0.1)]
        time.sleep(0.3)
        began = time.monotonic()
        try:
            assert ids(paths[:1], Sizes(), "waits") == expected([0])
            waited = time.monotonic() - began
        finally:
            over.set()
        for other in others:
            other.result(20)
    assert waited < 20


def test_a_task_that_leaves_does_not_hold_the_others_up(paths: list[str]) -> None:
    embedder = Sizes()
    with shared_engine(named(embedder, "leaves"), "cpu") as engine:
        first = engine.embed(open_shard(path) for path in paths)
        next(iter(first))
        first.close()  # type: ignore[attr-defined]
        assert sorted(
            done.ids for done in embedded_shards(engine.embed(open_shard(path) for path in paths[:4]))
        ) == expected(range(4))


def test_a_model_that_does_not_load_says_why_and_can_be_tried_again(paths: list[str]) -> None:
    class Loads(Sizes):
        def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
            super().load_embedding_model(device)
            if len(self._models) == 1:
                raise MemoryError("no room")
            return lambda sizes: np.array(sizes, float)[:, None]

    embedder = Loads()
    with pytest.raises(MemoryError, match="no room"):
        ids(paths[:1], embedder, "loads")
    assert ids(paths[:1], embedder, "loads") == expected([0])


def test_batches_of_a_timm_model_run_on_across_tasks(paths: list[str]) -> None:
    embedder = TimmImageEmbedder("test_vit", pretrained=False, batch_size=4, num_threads_per_worker=1)
    alone = {}
    for path in paths:
        with shared_engine(named(embedder, "timm"), "cpu") as engine:
            (done,) = embedded_shards(engine.embed(iter([open_shard(path)])))
        alone.update(dict(zip(done.ids, done.vectors, strict=True)))

    def task(mine: list[str]) -> dict[str, np.ndarray]:
        with shared_engine(named(embedder, "timm"), "cpu") as engine:
            return {
                i: v
                for done in embedded_shards(engine.embed(open_shard(path) for path in mine))
                for i, v in zip(done.ids, done.vectors, strict=True)
            }

    with ThreadPoolExecutor(3) as pool:
        together = [pair for found in pool.map(task, [paths[:2], paths[2:4], paths[4:]]) for pair in found.items()]
    assert {key for key, _ in together} == alone.keys()
    assert all(np.dot(vector, alone[key]) > 0.99999 for key, vector in together)


def test_an_engine_takes_the_cores_of_workers_that_have_gone(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while its shards never end, as with many tasks, and with a loader that has as many threads as before."""
    share = [1]
    monkeypatch.setattr(tasks.worker.shared_engine, "share_of_cores", lambda before=0: share[0])
    monkeypatch.setattr(tasks.worker.shared_engine, "CORES_KNOWN_FOR", 0.0)
    recipes = named(TimmImageEmbedder("test_vit", pretrained=False, batch_size=2), "cores")
    changed = threading.Event()

    def first() -> Iterator[OpenShard]:
        for path in paths[:3]:
            yield open_shard(path)
        assert changed.wait(20)
        for path in paths[3:]:
            yield open_shard(path)

    def threads(engine: Any) -> tuple[int, int]:
        return engine._call_inside(lambda engine: (engine.sessions[0].loader._num_threads, torch.get_num_threads()))

    with shared_engine(recipes, "cpu") as engine, ThreadPoolExecutor(1) as pool:
        assert threads(engine) == (1, 1)
        running = pool.submit(lambda: [done.ids for done in embedded_shards(engine.embed(first()))])
        share[0] = 2
        with shared_engine(recipes, "cpu") as same:
            assert same is engine
            assert threads(engine) == (2, 2)
        changed.set()
        assert sorted(running.result(30)) == expected(range(6))


def test_what_a_call_into_an_engine_raises_is_its_callers(paths: list[str]) -> None:
    def broken(engine: Engine) -> None:
        raise OSError("the disk went away")

    with shared_engine(named(Sizes(), "calls"), "cpu") as engine:
        with pytest.raises(OSError, match="the disk went away"):
            engine._call_inside(broken)
        assert len(list(embedded_shards(engine.embed([open_shard(paths[0])])))) == 1

    with shared_engine(named(Sizes(broken="00000.tar"), "calls"), "cpu") as engine:
        with pytest.raises(RuntimeError, match="the decoder went away"):
            list(engine.embed([open_shard(paths[0])]))
        with pytest.raises(RuntimeError, match="the decoder went away"):
            engine._call_inside(lambda engine: None)
