"""Tars of a store are on the local disk when they are needed, whole, within a bound, and gone after."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import s3fs

import tasks.storage.download_ahead
from embedders import TimmImageEmbedder
from tasks.dataset.metadata import check_metadata, open_rows
from tasks.records import read_layer_record
from tasks.shards import Shard, ShardReplaced, find_shards
from tasks.storage.download_ahead import Stage
from tasks.storage.folder import Folder
from tasks.storage.signed_download import signed_file
from tasks.storage.temporary_space import scratch
from tests.layers import embed_all
from tests.servers import Proxy

SIZE = 100_000


@pytest.fixture
def shards(proxy: Proxy) -> list[Shard]:
    """Eight files of 100 kB, each of other bytes, by the names of tars."""
    fs = s3fs.S3FileSystem()
    for i in range(8):
        fs.pipe_file(f"staging/data/{i}.tar", bytes([i]) * SIZE)
    return find_shards("s3://staging/data", "s3://staging/out")


def on_disk(folder: Path) -> list[Path]:
    return [path for path in folder.glob("shard-embed-*/*/*/*") if path.is_file()]


def wait_for(what: Path, files: int) -> None:
    """Wait until so many tars are there, and a little longer to see that there are no more."""
    deadline = time.monotonic() + 20
    while len(on_disk(what)) < files and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)


def test_tars_come_in_order_and_go_when_released(shards: list[Shard], tmp_path: Path) -> None:
    with Stage(shards) as stage:
        for i, tar in enumerate(stage):
            assert tar.shard.name == str(i)
            assert Path(tar.path()).read_bytes() == bytes([i]) * SIZE
            tar.release()
            assert not Path(tar.path()).exists()
    assert on_disk(tmp_path) == []
    assert tasks.storage.download_ahead._room.taken == 0


def test_no_more_is_downloaded_ahead_than_there_is_room_for(shards: list[Shard], tmp_path: Path) -> None:
    with Stage(shards, space=3 * SIZE + 1) as stage:
        held = [next(stage)]
        wait_for(tmp_path, 3)
        assert len(on_disk(tmp_path)) == 3
        held += [next(stage), next(stage)]
        held.pop(0).release()
        wait_for(tmp_path, 3)
        assert len(on_disk(tmp_path)) == 3
    assert tasks.storage.download_ahead._room.taken == 0


def test_a_tar_that_is_needed_comes_whatever_the_room(shards: list[Shard], tmp_path: Path) -> None:
    with Stage(shards, space=0) as stage:
        first, second = next(stage), next(stage)
        assert (Path(first.path()).stat().st_size, Path(second.path()).stat().st_size) == (SIZE, SIZE)
        wait_for(tmp_path, 2)
        assert len(on_disk(tmp_path)) == 2
    assert on_disk(tmp_path) == []


def test_two_stages_of_a_process_share_the_room(shards: list[Shard], tmp_path: Path) -> None:
    with Stage(shards[:4], space=3 * SIZE) as one, Stage(shards[4:], space=3 * SIZE) as other:
        next(one), next(other)
        wait_for(tmp_path, 4)
        assert len(on_disk(tmp_path)) == 4  # three, and the one that the second stage was asked for
    assert tasks.storage.download_ahead._room.taken == 0


def test_parts_are_downloaded_in_parallel(shards: list[Shard], proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tasks.storage.download_ahead, "PART", 10_000)
    running, most, lock = 0, 0, threading.Lock()

    def slowly(method: str, path: str) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.05)
        with lock:
            running -= 1

    proxy.fault = slowly
    with Stage(shards[3:4]) as stage:
        assert Path(next(stage).path()).read_bytes() == bytes([3]) * SIZE
    assert most > 4


def tar_requests(proxy: Proxy) -> list[tuple[str, bool]]:
    """The method of each request for a tar, and whether it came by a signed URL."""
    return [(method, "Signature=" in path) for method, path in proxy.requests if ".tar" in path]


def test_parts_come_by_signed_urls_and_nothing_else_is_asked(
    shards: list[Shard], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tasks.storage.download_ahead, "PART", SIZE // 4)
    proxy.requests.clear()
    with Stage(shards[3:4]) as stage:
        assert Path(next(stage).path()).read_bytes() == bytes([3]) * SIZE
    assert tar_requests(proxy) == [("GET", True)] * 4


@pytest.mark.parametrize("fault", ["503", "cut"])
def test_what_signed_urls_do_not_bring_the_client_does(shards: list[Shard], proxy: Proxy, fault: str) -> None:
    proxy.requests.clear()
    proxy.fault = lambda method, path: fault if "Signature=" in path else None
    with Stage(shards[3:4]) as stage:
        assert Path(next(stage).path()).read_bytes() == bytes([3]) * SIZE
    assert tar_requests(proxy)[-2:] == [("GET", False), ("HEAD", False)]  # the last proves that it is the listed one


def test_a_signed_url_is_not_shown(shards: list[Shard]) -> None:
    signed = signed_file(shards[0].source, shards[0].tar, shards[0].tar_etag)
    assert signed is not None
    assert "Signature" not in repr(signed)


def test_a_tar_that_was_replaced_is_not_taken_for_the_planned_one(shards: list[Shard], tmp_path: Path) -> None:
    s3fs.S3FileSystem().pipe_file("staging/data/0.tar", b"x" * SIZE)
    with Stage(shards[:1]) as stage, pytest.raises(ShardReplaced, match=r"0\.tar was replaced"):
        next(stage).path()
    s3fs.S3FileSystem().rm_file("staging/data/1.tar")
    with Stage(shards[1:2]) as stage, pytest.raises(FileNotFoundError):
        next(stage).path()
    assert on_disk(tmp_path) == []


def test_a_tar_that_comes_short_is_noticed(shards: list[Shard]) -> None:
    with Stage([replace(shards[0], tar_bytes=SIZE + 1)]) as stage, pytest.raises(OSError, match="bytes arrived"):
        next(stage).path()


def test_a_stage_that_is_left_early_leaves_nothing(shards: list[Shard], tmp_path: Path) -> None:
    with Stage(shards) as stage:
        next(stage)
    assert on_disk(tmp_path) == []
    assert tasks.storage.download_ahead._room.taken == 0


def test_what_a_killed_process_left_goes_at_the_next_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    code = (
        "import time; from tasks.storage.temporary_space import scratch\n"
        "with scratch() as folder: open(f'{folder}/0.tar', 'w').close(); print(folder, flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, env={**os.environ, "TMPDIR": str(tmp_path)}, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        theirs = Path(process.stdout.readline().decode().strip())
        with scratch() as mine:
            assert (theirs / "0.tar").exists()  # it lives
            process.send_signal(signal.SIGKILL)
            process.wait()
            with scratch():
                assert not theirs.exists()
                assert Path(mine).exists()


@pytest.mark.parametrize("kind", ["memory", "http"])
def test_any_store_of_fsspec_is_read(kind: str, tmp_path: Path, demo_dataset: Path, tiny: TimmImageEmbedder) -> None:
    """From the listing to vectors and metadata; the HTTP server knows neither ranges nor etags."""
    handler = partial(_Quiet, directory=str(demo_dataset.parent))
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        dataset = f"http://127.0.0.1:{server.server_address[1]}/{demo_dataset.name}"
        if kind == "memory":
            dataset = "memory://any/data"
            for path in demo_dataset.glob("0000*"):
                Folder(dataset).fs.put_file(path, f"/any/data/{path.name}")
        shards = find_shards(dataset, str(tmp_path / "out"))
        local = find_shards(str(demo_dataset), str(tmp_path / "local"))
        assert [(s.name, s.tar_bytes) for s in shards] == [(s.name, s.tar_bytes) for s in local]
        (record,) = embed_all(shards[:1], tiny)
        assert (record.samples, record.embedded) == (64, 63)
        assert read_layer_record(Folder(str(tmp_path / "out")), shards[0].layer_file("image_embedding")) == record
        check_metadata(shards[0], "key")
        with open_rows(shards[0], "key") as far, open_rows(local[0], "key") as near:
            assert far.schema.equals(near.schema)
            assert list(far.read(far.schema.names, 50)) == list(near.read(near.schema.names, 50))
    finally:
        server.shutdown()
        server.server_close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""
