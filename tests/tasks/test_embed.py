"""A group of shards becomes files whose records tell the truth; what fails, fails alone and by name."""

from __future__ import annotations

import io
import os
import tarfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.logging import disable_run_logger

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.recipe import recipes_of
from embedders.webdataset import open_shard
from tasks.dataset.metadata import json_metadata
from tasks.dataset.vectors import vector_array, write_vectors
from tasks.embed import EmbedOptions, embed_shards
from tasks.records import LayerRecord, read_layer_record
from tasks.retries import ShardsFailed
from tasks.shards import Shard, find_shards
from tasks.storage.folder import Folder
from tasks.worker_count import TASKS_PER_GPU_WORKER
from tests.layers import LAYER, embed_all

from .conftest import MakeShard


class Lengths(ImageEmbedder):
    """The vector of an image is its size in bytes; at the shard of the name it is given it stops."""

    def __init__(self, stop_at: str = "", failing: str = "") -> None:
        self.stop_at = stop_at
        self.failing = failing

    def load_dataset_shard(self, tar_path: str) -> Any:
        if self.stop_at and tar_path.endswith(self.stop_at):
            raise RuntimeError("the decoder went away")
        shard = open_shard(tar_path)
        yield [s.components[0].size for s in shard.index.samples], [{"key": s.key} for s in shard.index.samples]

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        if self.failing:
            raise RuntimeError(self.failing)
        return lambda sizes: np.array(sizes, float)[:, None]


def options(embedder: ImageEmbedder, **other: Any) -> EmbedOptions:
    return EmbedOptions("key", device="cpu", **other)


def embed(shards: list[Shard], embedder: ImageEmbedder, **other: Any) -> list[LayerRecord]:
    return embed_all(shards, embedder, **other)


def failures(shards: list[Shard], embedder: ImageEmbedder, **other: Any) -> dict[str, str]:
    with pytest.raises(ShardsFailed) as caught:
        embed(shards, embedder, **other)
    return {failure.shard: failure.error for failure in caught.value.failures}


def files(folder: Folder) -> dict[str, int]:
    return {file.name: os.stat(folder.path(file.name)).st_mtime_ns for file in folder.list("")}


def test_a_group_becomes_embeddings_quarantine_and_index(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    whole, bad = make_shard("0"), make_shard("1", d__jpg=b"<html>", e__txt=b"1", f__jpg=b"")
    records = embed([whole, bad], tiny)
    assert list(files(whole.target)) == [
        "index/0.idx",
        "index/1.idx",
        "layers/image_embedding/0.parquet",
        "layers/image_embedding/1.parquet",
        "quarantine/image_embedding/1.parquet",
    ]
    assert [read_layer_record(s.target, s.layer_file("image_embedding")) for s in (whole, bad)] == records
    assert [(r.samples, r.embedded, r.dimensions) for r in records] == [(3, 3, 64), (6, 3, 64)]
    assert records[1].quarantined == {"not_an_image": 1, "missing_image": 1, "empty": 1}
    found = pq.read_table(bad.target.path(bad.quarantine_file(LAYER))).to_pylist()
    assert [(row["id"], row["member"], row["reason"]) for row in found] == [
        ("d", "d.jpg", "not_an_image"),
        ("e", "e.txt", "missing_image"),
        ("f", "f.jpg", "empty"),
    ]


def test_vectors_are_normalised_contiguous_lists_of_float32(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shard = make_shard(keys=tuple("abcde"))
    embed([shard], tiny)
    table = pq.read_table(shard.target.path(shard.layer_file("image_embedding")), page_checksum_verification=True)
    assert table.column("id").to_pylist() == list("abcde")
    assert str(table.schema.field("image_embedding").type) == "list<element: float not null>"
    matrix = table.column("image_embedding").combine_chunks().flatten().to_numpy().reshape(5, 64)
    np.testing.assert_allclose(np.linalg.norm(matrix, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(matrix - matrix[0], 0, atol=1e-5)  # five times the same photograph


groups_at_once: list[int] = []
"""How many groups were being embedded at each batch of `Slow`."""


class Slow(Lengths):
    """Takes its time, and notes how many groups are being embedded meanwhile."""

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        def embed(sizes: Any) -> np.ndarray:
            time.sleep(0.1)
            groups_at_once.append(sum(thread.name == "group" for thread in threading.enumerate()))
            return np.array(sizes, float)[:, None]

        return embed


def test_few_groups_are_embedded_at_once_outside_of_a_dask_worker(make_shard: MakeShard) -> None:
    """Prefect's default task runner begins with all tasks at once."""
    for number in range(9):
        make_shard(str(number))
    last = make_shard("9")
    shards, embedder = find_shards(last.dataset, last.output), Slow()
    with disable_run_logger(), ThreadPoolExecutor(10) as pool:
        done = [pool.submit(embed_shards.fn, [shard], recipes_of(embedder), options(embedder)) for shard in shards]
    assert all(future.result() for future in done)
    assert len(groups_at_once) == 10
    assert max(groups_at_once) == TASKS_PER_GPU_WORKER


def test_a_second_call_changes_nothing(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shards = [make_shard("0"), make_shard("1", d__jpg=b"")]
    first, before = embed(shards, tiny), files(shards[0].target)
    assert embed(shards, tiny) == first
    assert files(shards[0].target) == before


def renamed(shard: Shard, fingerprint: str) -> Shard:
    """The same tar under another fingerprint."""
    return replace(shard, tar_fingerprint=fingerprint, tar_listed=shard.tar_fingerprint)


def test_a_tar_that_was_replaced_fails_by_name(make_shard: MakeShard) -> None:
    shards = [make_shard("0"), make_shard("1")]
    make_shard("1", keys=("x", "y"), z__txt=bytes(100_000))
    assert list(failures(shards, Lengths())) == ["1"]
    assert "layers/image_embedding/1.parquet" not in files(shards[0].target)


def test_a_tar_that_is_replaced_while_it_is_read_fails_by_name(make_shard: MakeShard) -> None:
    shard = make_shard("0")

    class Replaces(Lengths):
        def load_dataset_shard(self, tar_path: str) -> Any:
            os.utime(tar_path, (1, 1))
            return super().load_dataset_shard(tar_path)

    assert "was replaced" in failures([shard], Replaces())["0"]
    assert "layers/image_embedding/0.parquet" not in files(shard.target)


def test_an_old_quarantine_goes_when_its_shard_is_whole(make_shard: MakeShard) -> None:
    shard = make_shard(d__jpg=b"")
    shard.target.write_text(shard.quarantine_file(LAYER), "old")
    embed([renamed(make_shard(), "mended")], Lengths())
    assert "quarantine/image_embedding/00000.parquet" not in files(shard.target)


def test_a_damaged_tar_fails_by_name_and_stops_no_other(make_shard: MakeShard, tmp_path: Path) -> None:
    shards = [make_shard(name) for name in ("0", "1", "2", "3")]
    whole = (tmp_path / "data/1.tar").read_bytes()
    (tmp_path / "data/1.tar").write_bytes(whole[:1500])
    (tmp_path / "data/2.tar").unlink()
    found = failures(shards, Lengths())
    assert list(found) == ["1", "2"]
    assert found["1"].startswith("1.tar: cut short")
    assert "FileNotFoundError" in found["2"]
    assert [file.name for file in Folder(f"{tmp_path}/out/layers/image_embedding").list("")] == [
        "0.parquet",
        "3.parquet",
    ]


def test_an_empty_tar_is_done(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    for embedder in (Lengths(), tiny):
        shard = renamed(make_shard(keys=()), type(embedder).__name__)
        (record,) = embed([shard], embedder)
        assert (record.samples, record.embedded) == (0, 0)
        assert read_layer_record(shard.target, shard.layer_file("image_embedding")) == record


def test_a_tar_of_bad_images_only_is_done(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shard = make_shard(keys=(), a__jpg=b"<html>", b__jpg=b"")
    (record,) = embed([shard], tiny)
    assert (record.samples, record.embedded, sum(record.quarantined.values())) == (2, 0, 2)
    assert pq.read_metadata(shard.target.path(shard.layer_file("image_embedding"))).num_rows == 0


def test_raise_fails_the_shard_of_a_bad_image(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shards = [make_shard("0"), make_shard("1", d__jpg=b"<html>")]
    found = failures(shards, tiny, raise_on_bad_image=True)
    assert list(found) == ["1"]
    assert found["1"].startswith("1.tar: d.jpg: not_an_image")
    assert "layers/image_embedding/1.parquet" not in files(shards[0].target)


def test_an_embedder_that_stops_fails_the_rest_and_only_the_rest(make_shard: MakeShard) -> None:
    shards = [make_shard(name) for name in ("0", "1", "2", "3")]
    shards = [renamed(shard, "same") for shard in shards]  # copied in one go, shards may have one fingerprint
    found = failures(shards, Lengths(stop_at="2.tar"))
    assert set(found.values()) == {"RuntimeError: the decoder went away"}
    done = {
        file.name.removesuffix(".parquet") for file in Folder(f"{shards[0].output}/layers/image_embedding").list("")
    }
    assert done | set(found) == {"0", "1", "2", "3"}
    assert done.isdisjoint(found)
    assert {"2", "3"} <= set(found)


def test_a_model_that_does_not_load_fails_every_shard_with_its_reason(make_shard: MakeShard) -> None:
    found = failures([make_shard("0"), make_shard("1")], Lengths(failing="no weights"))
    assert found == {"0": "RuntimeError: no weights", "1": "RuntimeError: no weights"}


def test_names_that_are_not_utf8_reach_the_files(make_shard: MakeShard, tiny: TimmImageEmbedder) -> None:
    shard = make_shard()
    path = shard.source.path(shard.tar)
    with tarfile.open(path, "a", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        for name, data in {"caf\xe9.jpg": b"", "\xfc.jpg": b"no image"}.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    (shard,) = find_shards(shard.dataset, shard.output)
    (record,) = embed([shard], tiny)
    assert (record.embedded, sum(record.quarantined.values())) == (3, 2)
    found = pq.read_table(shard.target.path(shard.quarantine_file(LAYER))).to_pylist()
    assert [row["member"] for row in found] == ["caf\\udce9.jpg", "\\udcfc.jpg"]


def test_a_store_without_paths_is_read_and_written(make_shard: MakeShard, tmp_path: Path) -> None:
    make_shard()
    Folder("memory://embed/data").fs.put_file(tmp_path / "data/00000.tar", "/embed/data/00000.tar")
    (shard,) = find_shards("memory://embed/data", "memory://embed/out")
    (record,) = embed([shard], Lengths())
    assert read_layer_record(shard.target, shard.layer_file("image_embedding")) == record


@pytest.mark.parametrize("column", ["image_embedding", "clip.image", "an embedding"])
def test_vectors_come_back_whatever_their_column_is_called(tmp_path: Path, column: str) -> None:
    matrix = np.arange(12, dtype=np.float32).reshape(4, 3)
    write_vectors(pa.table({"id": list("abcd"), column: vector_array(matrix)}), str(tmp_path / "0.parquet"), column)
    assert pq.read_table(tmp_path / "0.parquet").column(column).to_pylist() == matrix.tolist()
    group = pq.read_metadata(tmp_path / "0.parquet").row_group(0)
    assert [group.column(i).compression for i in range(2)] == ["ZSTD", "UNCOMPRESSED"]


def test_the_record_tells_what_is_part_of_no_sample_and_of_a_doubtful_end(
    make_shard: MakeShard, tiny: TimmImageEmbedder, tmp_path: Path
) -> None:
    shard = make_shard(README=b"x", _hidden=b"x")
    path = tmp_path / "data/00000.tar"
    path.write_bytes(path.read_bytes().rstrip(b"\0"))
    (shard,) = find_shards(shard.dataset, shard.output)
    for indexed in (False, True):  # by the headers, then by the kept index
        (record,) = embed([shard], tiny, verify=False)
        assert (record.embedded, record.ignored, record.ignored_examples) == (3, 2, ["README", "_hidden"])
        assert record.doubt == "it has no end-of-archive mark"
        assert shard.target.has(shard.index_file)
        if not indexed:
            os.remove(shard.target.path(shard.layer_file("image_embedding")))


def test_keys_by_the_last_dot_join_their_metadata(
    make_shard: MakeShard, tiny: TimmImageEmbedder, jpeg: bytes, tmp_path: Path
) -> None:
    names = ("at 10.13.22", "at 10.14.01")
    shard = make_shard(keys=names, json_of={name: {"caption": name} for name in names})
    (by_first,) = embed([shard], tiny)
    assert (by_first.embedded, by_first.quarantined) == (0, {"ambiguous_image": 1})
    (shard,) = find_shards(shard.dataset, shard.output, "last")
    (by_last,) = embed([shard], tiny)
    assert (by_last.embedded, by_last.quarantined) == (2, {})
    assert json_metadata(shard, "key").to_pylist() == [{"key": name, "caption": name} for name in names]


class Leaves(Lengths):
    """Raises, in the engine or while its result is written, what it is given."""

    execution_parameters = ImageEmbedder.execution_parameters | {"_error"}

    def __init__(self, where: str, error: BaseException) -> None:
        super().__init__()
        self._where, self._error = where, error

    def load_embedding_model(self, device: str) -> Callable[[Any], Any]:
        if self._where == "engine":
            raise self._error
        return super().load_embedding_model(device)

    def precision_on(self, device: str) -> str:
        if self._where == "write":
            raise self._error
        return ""


@pytest.mark.parametrize("where", ["engine", "write"])
@pytest.mark.parametrize(
    ("error", "line", "transient"),
    [
        (SystemExit(3), "SystemExit: 3", False),
        (OSError("the disk went away"), "OSError: the disk went away", True),
    ],
)
def test_whatever_leaves_a_groups_loop_is_a_failure_of_its_shards(
    make_shard: MakeShard, where: str, error: BaseException, line: str, transient: bool
) -> None:
    shards = [make_shard("0"), make_shard("1")]
    with pytest.raises(ShardsFailed) as caught:
        embed(shards, Leaves(where, error))
    assert [(f.shard, f.error, f.transient) for f in sorted(caught.value.failures, key=lambda f: f.shard)] == [
        (shard.name, line, transient) for shard in shards
    ]
