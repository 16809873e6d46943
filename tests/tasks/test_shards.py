"""A key changes with all that its file depends on and with nothing else; a record is believed if it fits its file."""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders.errors import InputError
from embedders.fingerprint import digest
from embedders.tar import read_tar_file
from tasks.keys import layer_key, merge_key
from tasks.records import RECORD, LayerRecord, MergeRecord, read_layer_record, read_merge_record, with_record
from tasks.sample_account import Unbalanced
from tasks.shards import Shard, find_shards
from tasks.storage.folder import Folder
from tests.layers import layer_record

SHARD = Shard("a/00000", "/data", "/out", 10, "10-1.5", "20-2.5")
EMBEDDED = layer_record(2, {"empty": 1})
MERGED = MergeRecord("k", rows=2, rows_without_embedding=1, embeddings_without_row=0)


def write(folder: Path, record: LayerRecord | MergeRecord, rows: int = 2) -> Folder:
    table = pa.table({"id": [str(i) for i in range(rows)]})
    pq.write_table(table.cast(with_record(table.schema, record)), folder / "0.parquet")
    return Folder(str(folder))


@pytest.mark.parametrize("change", [{"tar_fingerprint": "10-1.6"}, {"recipe": "f"}, {"id_col": "id"}])
def test_the_embedding_key_follows_tar_embedder_and_id_column(change: dict[str, str]) -> None:
    shard = replace(SHARD, tar_fingerprint=change.get("tar_fingerprint", SHARD.tar_fingerprint))
    before = layer_key(SHARD, "image_embedding", "e", "key")
    assert layer_key(shard, "image_embedding", change.get("recipe", "e"), change.get("id_col", "key")) != before


def test_two_tars_of_one_size_and_time_have_keys_of_their_own() -> None:
    of_b = layer_key(replace(SHARD, name="b"), "image_embedding", "e", "key")
    assert of_b != layer_key(SHARD, "image_embedding", "e", "key") != layer_key(SHARD, "vectors", "e", "key")


def test_the_embedding_key_ignores_places_and_metadata() -> None:
    other = replace(SHARD, dataset="s3://moved", output="/else", metadata_fingerprint="changed")
    assert layer_key(other, "image_embedding", "e", "key") == layer_key(SHARD, "image_embedding", "e", "key")


def test_the_merge_key_follows_metadata_embeddings_and_options() -> None:
    captions = replace(SHARD, metadata_fingerprint="20-9.9")
    keys = [
        merge_key(SHARD, {"a": "k"}, {"null_rows": False}),
        merge_key(captions, {"a": "k"}, {"null_rows": False}),
        merge_key(replace(SHARD, metadata_fingerprint=None), {"a": "k"}, {"null_rows": False}),
        merge_key(SHARD, {"a": "l"}, {"null_rows": False}),
        merge_key(SHARD, {"b": "k"}, {"null_rows": False}),
        merge_key(SHARD, {"a": "k", "b": "k"}, {"null_rows": False}),
        merge_key(SHARD, {"a": "k"}, {"null_rows": True}),
    ]
    assert len(set(keys)) == len(keys)


def test_a_digest_ignores_the_order_of_keys() -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert len(digest("")) == 32


def test_a_record_that_does_not_balance_cannot_be_made() -> None:
    with pytest.raises(Unbalanced, match="4 samples, but 2 embedded and 1 quarantined"):
        replace(EMBEDDED, samples=4)


def test_records_come_back(tmp_path: Path) -> None:
    assert read_layer_record(write(tmp_path, EMBEDDED), "0.parquet") == EMBEDDED
    assert read_merge_record(write(tmp_path, MERGED), "0.parquet") == MERGED


def test_a_record_that_does_not_fit_its_file_is_none(tmp_path: Path) -> None:
    assert read_layer_record(write(tmp_path, EMBEDDED, rows=1), "0.parquet") is None
    unbalanced = json.dumps(asdict(EMBEDDED) | {"samples": 9}).encode()
    pq.write_table(pa.table({"id": ["0", "1"]}).replace_schema_metadata({RECORD: unbalanced}), tmp_path / "0.parquet")
    assert read_layer_record(Folder(str(tmp_path)), "0.parquet") is None
    assert read_merge_record(write(tmp_path, MERGED, rows=3), "0.parquet") is None
    assert read_merge_record(write(tmp_path, EMBEDDED), "0.parquet") is None
    assert read_layer_record(write(tmp_path, MERGED), "0.parquet") is None


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"\xff",
        b"[]",
        b'{"version": 2}',
        json.dumps(asdict(EMBEDDED) | {"quarantined": None}).encode(),
        json.dumps(asdict(EMBEDDED) | {"quarantined": {"empty": "1"}}).encode(),
    ],
)
def test_a_foreign_record_is_none(text: bytes, tmp_path: Path) -> None:
    table = pa.table({"id": ["0", "1"]}).replace_schema_metadata({RECORD: text})
    pq.write_table(table, tmp_path / "0.parquet")
    assert read_layer_record(Folder(str(tmp_path)), "0.parquet") is None
    assert read_merge_record(Folder(str(tmp_path)), "0.parquet") is None


def test_a_cut_or_missing_or_foreign_file_is_none(tmp_path: Path) -> None:
    folder = write(tmp_path, EMBEDDED)
    whole = (tmp_path / "0.parquet").read_bytes()
    for content in [whole[:-1], whole[: len(whole) // 2], whole[:4], b"", b"<html>", b"PAR1PAR1"]:
        (tmp_path / "0.parquet").write_bytes(content)
        assert read_layer_record(folder, "0.parquet") is None
    assert read_layer_record(folder, "1.parquet") is None


def found(folder: Path) -> list[tuple[str, Any, str]]:
    return [(s.name, s.metadata, s.tar) for s in find_shards(str(folder), "/out")]


def test_shards_are_tars_with_the_parquet_beside_them(tmp_path: Path) -> None:
    for name in ("b/0.tar", "b/0.parquet", "a.tar", "c.parquet", ".hidden.tar", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    assert found(tmp_path) == [("a", None, "a.tar"), ("b/0", "b/0.parquet", "b/0.tar")]


def test_no_folder_and_no_tars_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no \.tar files"):
        find_shards(str(tmp_path), "/out")
    with pytest.raises(InputError, match="no such folder"):
        find_shards(str(tmp_path / "x"), "/out")


@pytest.mark.parametrize(
    ("names", "dataset", "says"),
    [
        (
            ["b.txt", "x/a.jpg", "x/c.JFIF"],
            "",
            r"pictures such as x/a\.jpg \(2 in all\); pack them: mkdir shards && tar -C ",
        ),
        (["a.zip", "b.zip"], "", r"no \.tar files, but zip archives such as a\.zip \(2 in all\); unpack them"),
        (["a.zip"], "a.zip", r"a\.zip: a zip archive; unpack it .*: unzip a\.zip -d pictures && mkdir shards"),
        (["0.tar"], "0.tar", r"0\.tar: this is one shard; give the folder that holds it: \S+$"),
        (["list.txt"], "list.txt", "a file; give the folder"),
        (["a.parquet"], "", r"no \.tar files; give the folder"),
    ],
)
def test_a_dataset_without_shards_is_called_what_it_is(
    tmp_path: Path, names: list[str], dataset: str, says: str
) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InputError, match=says) as error:
        find_shards(str(tmp_path / dataset), "/out")
    assert "\n" not in str(error.value)


def test_the_command_that_packs_a_folder_makes_a_dataset_of_it(tmp_path: Path) -> None:
    (tmp_path / "my pictures").mkdir()
    for name in ("a.jpg", "b.png"):
        (tmp_path / "my pictures" / name).write_bytes(b"x")
    with pytest.raises(InputError) as error:
        find_shards(str(tmp_path / "my pictures"), "/out")
    command = str(error.value).partition("pack them: ")[2].partition(", and")[0]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    (shard,) = find_shards(str(tmp_path / "shards"), "/out")
    keys = [sample.key for sample in read_tar_file(shard.source.path(shard.tar), "tar").samples]
    assert sorted(keys) == ["a", "b"]


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    """Neither Parquet nor Prefect can store it."""
    (tmp_path / os.fsdecode(b"caf\xe9.tar")).touch()
    with pytest.raises(InputError, match=r"/caf\\xe9.tar: its name is not UTF-8; rename it"):
        find_shards(str(tmp_path), str(tmp_path / "out"))
