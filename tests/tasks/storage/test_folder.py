"""Files are written whole or not at all, on a disk and in a store."""

from __future__ import annotations

import errno
import os
import re
import stat
import uuid
from collections.abc import Callable
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.local import LocalFileSystem

from embedders.errors import InputError
from tasks.shards import sweep
from tasks.storage.durable import publish
from tasks.storage.folder import Folder, in_bulk
from tasks.storage.remote import has_secret


@pytest.fixture(params=["disk", "memory"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    return Folder(str(tmp_path / "new") if request.param == "disk" else f"memory://{uuid.uuid4().hex}/new")


def saving(data: bytes) -> Callable[[str], None]:
    def save(path: str) -> None:
        Path(path).write_bytes(data)

    return save


def test_what_is_written_is_listed_and_read(folder: Folder) -> None:
    folder.write_text("b/1.idx", "one")
    folder.write("a/2.idx", saving(b"\x00two"))
    folder.write_text("a/3.txt", "three")
    assert [(file.name, file.size) for file in folder.list(".idx")] == [("a/2.idx", 4), ("b/1.idx", 3)]
    assert folder.read_text("b/1.idx") == "one"
    with folder.open("a/2.idx") as file:
        assert file.read() == b"\x00two"


def test_a_missing_folder_is_empty(folder: Folder) -> None:
    assert folder.list("") == []
    assert not folder.exists()
    assert folder.read_text("0.idx") is None
    folder.remove("0.idx")


def test_a_write_that_fails_leaves_nothing_behind(folder: Folder) -> None:
    def half(path: str) -> None:
        Path(path).write_text("half")
        raise OSError("disk full")

    folder.write_text("0.idx", "whole")
    with pytest.raises(OSError, match="disk full"):
        folder.write("0.idx", half)
    with pytest.raises(OSError, match="disk full"):
        folder.write("1.idx", half)
    assert folder.read_text("0.idx") == "whole"
    assert list(folder.fs.find(folder.path(""), withdirs=False)) == [folder.path("0.idx")]


def test_hidden_files_and_folders_are_left_out(folder: Folder) -> None:
    for name in (".0.tar", "a/.1.tar", ".ipynb_checkpoints/2.tar", "a/3.tar"):
        folder.write_text(name, "x")
    assert [file.name for file in folder.list(".tar")] == ["a/3.tar"]


def test_a_text_comes_back_with_any_bytes(folder: Folder) -> None:
    folder.write_text("0.idx", "caf\udce9 日本")
    assert folder.read_text("0.idx") == "caf\udce9 日本"
    folder.write("1.idx", saving(b"\xff\xfe\x00"))
    assert folder.read_text("1.idx") == "\udcff\udcfe\x00"


def test_a_fingerprint_follows_the_content(folder: Folder) -> None:
    folder.write_text("0.tar", "one")
    (before,) = folder.list(".tar")
    assert folder.list(".tar") == [before]
    folder.write_text("0.tar", "two")
    if folder.is_local:
        os.utime(folder.path("0.tar"), (1, 2))
    assert folder.list(".tar")[0].fingerprint != before.fingerprint


def test_a_local_copy_is_the_file_itself_or_goes_away(folder: Folder) -> None:
    folder.write_text("a/0.tar", "data")
    with folder.local_copy("a/0.tar") as path:
        assert Path(path).read_text() == "data"
        assert Path(path).name == "0.tar"
    assert Path(path).exists() is folder.is_local


def test_a_removed_file_is_gone(folder: Folder) -> None:
    folder.write_text("0.idx", "x")
    folder.remove("0.idx")
    assert folder.list("") == []


@pytest.mark.parametrize("url", ["nothere://x", "gibberish://"])
def test_a_store_that_nobody_knows_is_named(url: str) -> None:
    with pytest.raises(InputError, match=url):
        Folder(url).list("")


def test_bulk_work_keeps_its_order() -> None:
    assert in_bulk(lambda n: n * n, range(100)) == [n * n for n in range(100)]


class Growing(LocalFileSystem):
    """A store that shows files as they grow, such as sftp://, over a real disk."""

    protocol = "growing"


def test_where_files_are_seen_to_grow_they_get_their_names_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsspec.register_implementation("growing", Growing, clobber=True)
    folder = Folder(f"growing://{tmp_path}/new")
    assert not folder.is_local
    folder.write_text("a/0.idx", "whole")
    assert folder.read_text("a/0.idx") == "whole"

    def half(self: object, local: str, path: str, **other: object) -> None:
        Path(path).write_text("half")
        raise PermissionError("cut")

    monkeypatch.setattr(Growing, "put_file", half)
    with pytest.raises(PermissionError):
        folder.write_text("a/0.idx", "another")
    assert [path.read_text() for path in tmp_path.rglob("*.*")] == ["whole"]


def test_a_name_that_leads_out_of_the_folder_is_refused() -> None:
    folder = Folder(f"memory://{uuid.uuid4().hex}/in")
    folder.fs.pipe_file("/file", b"x")
    folder.fs.store[f"{folder.path('')}../../evil.tar"] = folder.fs.store.pop("/file")
    with pytest.raises(InputError, match=r"\.\./\.\./evil\.tar"):
        folder.list(".tar")


@pytest.mark.parametrize(
    "url",
    [
        "sftp://user@host/data",
        "hf://datasets/org/name@main/data",
        "abfs://box@account.dfs.core.windows.net/x",
        "/a@b:c",
    ],
)
def test_a_user_or_a_revision_is_no_secret(url: str) -> None:
    assert not has_secret(url)


def test_tails_are_read_many_at_a_time(folder: Folder) -> None:
    for i in range(40):
        folder.write_text(f"{i:02}.idx", "x" * i + str(i))
    files = folder.list(".idx")
    folder.remove("07.idx")
    found = {file.name: tail for file, tail in folder.read_tails(files, 2)}
    assert len(found) == 39
    assert (found["05.idx"], found["39.idx"]) == (b"x5", b"39")
    assert folder.read_tail("39.idx", 3) == b"x39"
    assert folder.read_tail("00.idx", 100) == b"0"


def test_what_a_killed_writer_left_is_swept(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))

    def killed(path: str) -> None:
        Path(path).write_text("half")
        os._exit(9)

    folder.write_text("a/whole.parquet", "")
    (tmp_path / "a/.mine.tmp").touch()
    if (child := os.fork()) == 0:
        folder.write("a/b/0.parquet", killed)
    os.waitpid(child, 0)
    assert len(list((tmp_path / "a/b").iterdir())) == 1
    folder.sweep()
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == ["a/.mine.tmp", "a/whole.parquet"]


def test_a_file_that_is_being_written_is_not_swept(tmp_path: Path) -> None:
    folder = Folder(str(tmp_path))

    def save(path: str) -> None:
        Path(path).write_text("half")
        folder.sweep()
        assert Path(path).read_text() == "half"

    folder.write("a/0.parquet", save)
    assert (tmp_path / "a/0.parquet").read_text() == "half"


def test_every_folder_of_an_output_is_swept_and_no_other(tmp_path: Path) -> None:
    temporary = f".x.{uuid.uuid4().hex}.tmp"
    swept = (".", "layers/a/b", "index/a", "merged", "metadata/a/b", "quarantine/a", "unmatched")
    for name in (*swept, "mine", "export/npy"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
        (tmp_path / name / temporary).touch()
    sweep(str(tmp_path))
    left = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(temporary)}
    assert left == {"mine", "export/npy"}


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What reaches the disk, in its order: "sync NAME" and "rename NAME"."""
    done: list[str] = []
    fsync, rename = os.fsync, os.replace

    def sync(handle: int) -> None:
        done.append(f"sync {re.sub('[0-9a-f]{32}', '*', os.path.basename(os.readlink(f'/proc/self/fd/{handle}')))}")
        fsync(handle)

    def replace(source: Path, target: Path) -> None:
        done.append(f"rename {os.path.basename(target)}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    monkeypatch.setattr(Path, "replace", replace)
    return done


def test_content_reaches_the_disk_before_the_name(tmp_path: Path, synced: list[str]) -> None:
    """A power cut may come at any time: a name must never stand for content that is not there yet."""
    Folder(str(tmp_path)).write_text("a/b/0.idx", "x")
    assert synced == [
        *(f"sync {name}" for name in ("a", tmp_path.name)),  # the folders that were made
        *("sync .0.idx.*.tmp", "rename 0.idx", "sync b"),
    ]


def test_a_folder_reaches_the_disk_with_all_its_files(tmp_path: Path, synced: list[str]) -> None:
    (tmp_path / "new/sub").mkdir(parents=True)
    (tmp_path / "new/sub/file").write_text("x")
    publish(tmp_path / "new", tmp_path / "old")
    assert synced == ["sync new", "sync sub", "sync file", "rename old", f"sync {tmp_path.name}"]


def test_a_disk_that_does_not_take_it_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Folder(str(tmp_path))
    folder.write_text("0.idx", "old")

    def fails(handle: int) -> None:
        raise OSError(errno.EIO, "lost")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="lost"):
        folder.write_text("0.idx", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_a_file_system_that_cannot_sync_folders_will_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsync = os.fsync

    def only_files(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "no folders")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", only_files)
    Folder(str(tmp_path)).write_text("a/0.idx", "new")
    assert (tmp_path / "a/0.idx").read_text() == "new"


def test_a_linked_file_is_listed_with_the_time_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "folder").mkdir()
    file = tmp_path / "elsewhere" / "a.tar"
    file.write_bytes(b"content")
    os.utime(file, (1, 1))
    (tmp_path / "folder" / "a.tar").symlink_to(file)
    (tmp_path / "folder" / "b.tar").symlink_to(tmp_path / "gone.tar")
    folder = Folder(str(tmp_path / "folder"))
    listed = folder.list(".tar")
    assert [info.name for info in listed] == ["a.tar", "b.tar"]
    assert listed[0] == folder.info("a.tar")
    assert listed[0].fingerprint == "7-1.0"
