"""How long shards may take, and what becomes of one that hangs."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from embedders import ImageEmbedder
from embedders.webdataset import open_shard
from tasks.retries import ShardsFailed
from tasks.worker.hang_detection import Limit, Step, Watch, watch
from tests.layers import embed_all

from ..conftest import MakeShard


def let_go(embedder: Hangs) -> None:
    """End a hang, and wait until nothing is in hand; outside of a worker the process lives on with it."""
    embedder._go.set()
    for _ in range(300):
        if not watch._held:
            return
        time.sleep(0.1)
    raise AssertionError(f"still in hand: {watch._held}")


def test_limits_are_minutes_whatever_the_size_of_a_shard() -> None:
    million = 1_000_000
    for device, minutes in (("cuda", 12), ("cpu", 30)):
        limit = Limit(device)
        assert limit.samples(10) < limit.samples(1000) <= limit.samples(million) < 60 * minutes
    assert Limit("cpu").bytes(10**9) < Limit("cpu").bytes(10**11) < 3600
    assert (Limit("cpu", 7.0).bytes(10**12), Limit("cpu", 7.0).samples(million)) == (7.0, 7.0)


def overdue(own: Watch) -> bool:
    """Whether some shard is, a little later."""
    time.sleep(0.06)
    return own.overdue() is not None


def test_one_that_hangs_is_seen_however_well_others_get_on() -> None:
    own = Watch()
    hangs, other = own.take(0.05), own.take(60)
    own.got_on(other)
    assert overdue(own)
    own.got_on(hangs)
    assert own.overdue() is None
    assert overdue(own)
    own.leave(hangs)
    assert own.overdue() is None
    own.leave(other)
    assert not overdue(own)  # nothing in hand


def test_a_batch_is_progress_for_all_in_the_engine_and_for_none_that_is_opened() -> None:
    own = Watch()
    embedded = [own.take(60), own.take(60)]
    for held in embedded:
        own.move(held, Step.EMBED, 0.05)
    assert overdue(own)
    own.batch()
    assert own.overdue() is None
    own.take(0.05)
    time.sleep(0.06)
    own.batch()
    assert own.overdue() is not None


def test_the_engine_may_wait_for_a_file_that_is_written() -> None:
    own = Watch()
    waits, written = own.take(60), own.take(60)
    own.move(waits, Step.EMBED, 0.05)
    own.move(written, Step.WRITE, 60)
    assert not overdue(own)
    own.leave(written)
    assert own.overdue() is None
    assert overdue(own)


def test_two_runs_with_shards_of_one_name_do_not_unwatch_one_another(make_shard: MakeShard) -> None:
    hanging, quick = Hangs(), Hangs(stem="none")
    shards, fast = [make_shard("1")], [make_shard(str(number)) for number in range(2, 5)]

    def busy() -> None:
        held = watch.take(60)  # another run's shard 1, which gets on and is done again and again
        while not hanging._go.wait(0.05):
            watch.got_on(held)
            watch.leave(held)
            held = watch.take(60)
        watch.leave(held)

    thread = threading.Thread(target=busy)
    thread.start()
    try:
        with pytest.raises(ShardsFailed, match="1: hangs: nothing got on for"):
            embed_all(shards, hanging, shard_timeout=2)
    finally:
        hanging._go.set()
        thread.join()
        let_go(hanging)
    assert len(embed_all(fast, quick)) == 3


class Slow(ImageEmbedder):
    """Takes longer for a shard than its limit, and less for a batch."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        for sample_id in open_shard(tar_path).ids:
            time.sleep(1.2)
            yield [[1.0, 2.0]], [{"key": sample_id}]

    def load_embedding_model(self, device: str) -> Any:
        return np.asarray


def test_batches_are_progress_and_not_whole_shards(make_shard: MakeShard) -> None:
    shard, embedder = make_shard(keys=tuple("abcdef")), Slow()
    (record,) = embed_all([shard], embedder, shard_timeout=5)
    assert record.embedded == 6


class Hangs(ImageEmbedder):
    """Never comes back from one shard, until it is let go."""

    execution_parameters = ImageEmbedder.execution_parameters | {"_go"}

    def __init__(self, stem: str = "1") -> None:
        self._stem = stem
        self._go = threading.Event()

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        if tar_path.endswith(f"{self._stem}.tar"):
            self._go.wait(60)
        for sample_id in open_shard(tar_path).ids:
            yield [[1.0, 2.0]], [{"key": sample_id}]

    def load_embedding_model(self, device: str) -> Any:
        return np.asarray


def test_a_hung_shard_fails_by_name_and_what_waits_can_be_tried_alone(make_shard: MakeShard) -> None:
    shards = [make_shard(str(number)) for number in range(6)]
    embedder = Hangs()
    with pytest.raises(ShardsFailed) as failed:
        embed_all(shards, embedder, shard_timeout=0.5)
    let_go(embedder)
    found = {failure.shard: failure for failure in failed.value.failures}
    assert "hangs" in found["1"].error
    assert "--shard-timeout" in found["1"].error
    assert "waited behind" in found["5"].error
    assert all(failure.alone and not failure.transient for failure in found.values())
