"""An index is kept and is not believed for another tar."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prefect.logging import disable_run_logger

from tasks.index import index_shards, index_tar
from tasks.shards import Shard, ShardReplaced

from .conftest import MakeShard


def index(shard: Shard, *, keep: bool = True) -> list[str]:
    return [sample.key for sample in index_tar(shard, shard.source.path(shard.tar), keep=keep).samples]


def test_an_index_is_made_once_and_read_after(make_shard: MakeShard) -> None:
    shard = make_shard()
    made = index(shard)
    Path(shard.source.path(shard.tar)).unlink()
    assert made == index(shard) == ["a", "b", "c"]


def test_no_index_is_written_unless_kept(make_shard: MakeShard) -> None:
    shard = make_shard()
    assert index(shard, keep=False) == ["a", "b", "c"]
    assert shard.target.list("") == []


@pytest.mark.parametrize("content", [b"", b"\xff\x00\xfe", b"v1.2 1\njpg 512 3\n", b"cut", b"flipped"])
def test_an_index_that_does_not_hold_is_made_again(make_shard: MakeShard, content: bytes) -> None:
    shard = make_shard()
    index(shard)
    path = Path(shard.target.path(shard.index_file))
    whole = path.read_bytes()
    damaged = {b"cut": whole[:-5], b"flipped": whole.replace(b"c.jpg", b"C.jpg")}
    path.write_bytes(damaged.get(content, content))
    assert index(shard) == ["a", "b", "c"]
    assert path.read_bytes() == whole


def test_a_changed_tar_is_indexed_again(make_shard: MakeShard) -> None:
    index(make_shard())
    changed = make_shard(keys=("x", "y"))
    assert index(replace(changed, tar_fingerprint="other", tar_listed=changed.tar_fingerprint)) == ["x", "y"]


def test_the_index_of_a_tar_that_was_replaced_is_not_kept(make_shard: MakeShard) -> None:
    shard = make_shard()
    make_shard(keys=("x", "y"), z__txt=bytes(100_000))
    with pytest.raises(ShardReplaced, match=r"00000\.tar was replaced"):
        index(shard)
    assert shard.target.list("") == []


def test_a_shard_that_cannot_be_indexed_stops_no_other(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [make_shard(name) for name in ("0", "1", "2", "3")]
    (tmp_path / "data/0.tar").write_bytes(b"<html>")
    (tmp_path / "data/1.tar").unlink()
    with disable_run_logger():
        assert index_shards.fn(shards, "key", "all") == 6
    assert [file.name for file in shards[0].target.list(".idx")] == ["index/2.idx", "index/3.idx"]


def test_a_shard_of_a_store_is_left_to_its_embedding(caplog: pytest.LogCaptureFixture) -> None:
    shard = Shard("00000", "memory://data", "memory://out", 512, "512-0", None)
    with disable_run_logger():
        assert index_shards.fn([shard], "key") == 0
    assert not caplog.records
