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
from tasks.embed import EmbedOptions, embed_group
from tasks.failures import ShardsFailed
from tasks.shards import digest
from tasks.watch import Limit, Watch

from .conftest import MakeShard


def test_limits_follow_sizes() -> None:
    small, large = Limit("cpu").of(10_000_000, 100), Limit("cpu").of(1_000_000_000, 10_000)
    assert small < large
    assert Limit("cuda").of(1_000_000_000, 10_000) == 2000
    assert (Limit("cpu", 7.0).of(10**12, 10**6), Limit("cpu", 7.0).base) == (7.0, 0.0)


def test_progress_counts_from_the_last_thing_that_happened() -> None:
    watch = Watch()
    watch.take("a", 0.05)
    time.sleep(0.1)
    assert watch.overdue(0.0) is not None
    assert watch.overdue(10.0) is None
    watch.take("b", 0.0)
    assert watch.overdue(0.0) is None
    watch.leave("a")
    watch.leave("b")
    time.sleep(0.1)
    assert watch.overdue(0.0) is None  # nothing in hand


class Hangs(ImageEmbedder):
    """Never comes back from one shard, until it is let go."""

    def __init__(self) -> None:
        self._go = threading.Event()

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[Any, list[dict[str, Any]]]]:
        if tar_path.endswith("1.tar"):
            self._go.wait(60)
        for sample_id in open_shard(tar_path).ids:
            yield [[1.0, 2.0]], [{"key": sample_id}]

    def load_embedding_model(self, device: str) -> Any:
        return np.asarray


def test_a_hung_shard_fails_by_name_and_what_waits_can_be_tried_alone(make_shard: MakeShard) -> None:
    shards = [make_shard(str(number)) for number in range(6)]
    embedder = Hangs()
    options = EmbedOptions("key", digest(embedder.fingerprint()), "cpu", shard_timeout=0.5)
    with pytest.raises(ShardsFailed) as failed:
        embed_group(shards, embedder, options)
    embedder._go.set()
    found = {failure.shard: failure for failure in failed.value.failures}
    assert "hangs" in found["1"].error
    assert "--shard-timeout" in found["1"].error
    assert "waited behind" in found["5"].error
    assert all(failure.alone and not failure.transient for failure in found.values())
