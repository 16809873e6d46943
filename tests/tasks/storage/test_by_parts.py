"""Of a store's files only what is needed is requested, and only once."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs
from fsspec.config import conf

from embedders.errors import InputError
from tasks.dataset.metadata import check_metadata
from tasks.dataset.schema import common_schema
from tasks.layers import LayerWriter
from tasks.merge_options import MergeOptions
from tasks.plan import Plan
from tasks.records import LayerRecord, MergeRecord, read_layer_records
from tasks.shards import Shard, find_shards
from tasks.storage.folder import Folder
from tasks.storage.remote import CONNECTIONS
from tests.layers import LAYER, layer_record
from tests.servers import Proxy

LARGE = 3 << 20


def put_large(path: str, ids: list[str], folder: Path) -> None:
    """Write a Parquet with an id column and some megabytes that do not compress to the store."""
    payload = pa.array([os.urandom(LARGE // len(ids)) for _ in ids])
    pq.write_table(pa.table({"payload": payload, "key": ids}), folder / "parquet")
    s3fs.S3FileSystem().put_file(str(folder / "parquet"), path)


def test_of_a_large_parquet_the_ids_are_read_and_not_the_rest(proxy: Proxy, tmp_path: Path) -> None:
    fs = s3fs.S3FileSystem()
    for name, ids in (("good", ["a", "b", "c"]), ("bad", ["a", "b", "a"])):
        fs.pipe_file(f"staging/data/{name}.tar", b"")
        put_large(f"staging/data/{name}.parquet", ids, tmp_path)
    bad, good = find_shards("s3://staging/data", "s3://staging/out")
    proxy.bytes_sent = 0
    check_metadata(good, "key", ["a", "b", "c"])
    assert 0 < proxy.bytes_sent < LARGE / 4
    with pytest.raises(InputError, match="'a' is there twice"):
        check_metadata(bad, "key")


def test_the_schema_of_the_dataset_is_read_from_footers(proxy: Proxy, tmp_path: Path) -> None:
    put_large("staging/out/metadata/0.parquet", ["a", "b"], tmp_path)
    shard = Shard("0", "s3://staging/data", "s3://staging/out", 0, "0-1", None)
    plan = Plan((shard,), (), MergeOptions("key"), (), {"0": MergeRecord("k", 2, 0, 0)})
    proxy.bytes_sent = 0
    schema = common_schema(plan)
    assert schema is not None
    assert schema.names == ["payload", "key"]
    assert 0 < proxy.bytes_sent < LARGE / 4


def test_a_record_that_is_held_is_not_requested_again(proxy: Proxy) -> None:
    shard = Shard("0", "s3://staging/data", "s3://staging/out", 0, "0-1", None)
    folder = Folder("s3://staging/out/layers")

    def write(key: str) -> LayerRecord:
        with LayerWriter(shard, LAYER) as writer:
            record = layer_record(0, {"empty": 1}, key=key, dimensions=0)
            writer.finish(replace(record, columns={}), [])
        return record

    def read() -> list[str]:
        proxy.requests.clear()
        held.update(read_layer_records(folder, folder.list(".parquet")))
        return [method for method, path in proxy.requests if path.endswith(".parquet")]

    held: dict[str, LayerRecord] = {}
    write("one")
    assert (read(), read()) == (["GET"], [])
    write("two")
    assert read() == ["GET"]
    assert [record.key for record in held.values()] == ["two"]


def test_as_many_connections_as_requests(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Folder("s3://staging").fs.config_kwargs["max_pool_connections"] == CONNECTIONS
    monkeypatch.setitem(conf, "s3", {"config_kwargs": {"read_timeout": 3, "max_pool_connections": 5}})
    assert Folder("s3://staging/x").fs.config_kwargs == {"read_timeout": 3, "max_pool_connections": 5}
