"""An index is kept, is not believed for another tar, and metadata that cannot be joined is refused beforehand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from prefect.logging import disable_run_logger

from embedders.errors import InputError
from tasks.index import check_metadata, index_shards, index_tar
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


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"id": ["a"], "text": ["x"]}, "no id column 'key'; give --id-col one of: id, text"),
        ({"key": ["a", "b", "a"]}, "id 'a' is there twice, again in row 2"),
        ({"key": [1.0, 2.0, 1.0]}, r"id 1\.0 is there twice"),
        ({"key": ["x", "y"]}, "none of its ids is a sample's: column 'key' has 'x', the tar has 'a'"),
    ],
)
def test_metadata_that_cannot_be_joined_is_refused(
    make_shard: MakeShard, metadata: dict[str, list[Any]], message: str
) -> None:
    shard = make_shard(metadata=metadata)
    with pytest.raises(InputError, match=message):
        check_metadata(shard, "key", ("a", "b", "c"))


def test_metadata_that_is_no_parquet_is_refused(make_shard: MakeShard, tmp_path: Path) -> None:
    shard = make_shard(metadata={"key": ["a"]})
    (tmp_path / "data/00000.parquet").write_bytes(b"key,text\n")
    with pytest.raises(InputError, match=r"00000\.parquet: not readable as Parquet"):
        check_metadata(shard, "key")


def test_metadata_that_fits_or_is_not_there_passes(make_shard: MakeShard) -> None:
    check_metadata(make_shard(), "key", ("a",))
    check_metadata(make_shard(metadata={"key": ["z", "a"]}), "key", ("a", "b"))
    check_metadata(make_shard(metadata={"key": pa.array([], pa.string())}), "key", ("a", "b"))
    check_metadata(make_shard(metadata={"key": [1, 2]}), "key", ("1",))


def test_a_shard_that_cannot_be_indexed_stops_no_other(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [make_shard(name) for name in ("0", "1", "2", "3")]
    (tmp_path / "data/0.tar").write_bytes(b"<html>")
    (tmp_path / "data/1.tar").unlink()
    with disable_run_logger():
        assert index_shards.fn(shards, "key", "all") == 6
    assert [file.name for file in shards[0].target.list(".idx")] == ["index/2.idx", "index/3.idx"]
