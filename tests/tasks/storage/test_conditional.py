"""Files that are written on a condition: on a disk, on a real S3 server, and in a store without conditions."""

from __future__ import annotations

import contextlib
import errno
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs

from tasks.storage.conditional import ChangedMeanwhile, agree, create, replace, version_of
from tasks.storage.folder import Folder
from tests.servers import s3_server


@pytest.fixture(scope="module")
def store() -> Iterator[Folder]:
    """A folder on a real S3 server."""
    variables = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # of servers that are gone
        s3fs.S3FileSystem(endpoint_url=url).mkdir("conditional")
        yield Folder("s3://conditional/folder")
        s3fs.S3FileSystem.clear_instance_cache()


def test_of_many_that_create_a_file_one_has(tmp_path: Path) -> None:
    folder, created = Folder(str(tmp_path / "new")), []
    together = threading.Barrier(8)

    def run(number: int) -> None:
        together.wait()
        if create(folder, "file", str(number)):
            created.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [folder.read_text("file")] == [str(number) for number in created]
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_folder_that_others_remove_meanwhile(tmp_path: Path) -> None:
    """Each creates a file and takes it and the empty folder away again; none of them fails."""
    folder = Folder(str(tmp_path / "folder"))
    failed: list[Any] = []

    def run(number: int) -> None:
        for _ in range(50):
            try:
                created = create(folder, f"{number}", "")
            except OSError as error:
                failed.append(error)
                return
            failed.extend([] if created else ["it was there"])
            folder.remove(f"{number}")
            with contextlib.suppress(OSError):
                Path(folder.path("")).rmdir()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        create(Folder(str(tmp_path / "file")), "name", "")


def test_a_store_compares_versions(store: Folder) -> None:
    assert version_of(store, "file") is None
    assert create(store, "file", "1")
    assert not create(store, "file", "2")
    version = version_of(store, "file")
    after = replace(store, "file", "3", version)
    assert (version_of(store, "file"), store.read_text("file")) == (after, "3")
    with pytest.raises(ChangedMeanwhile):
        replace(store, "file", "4", version)
    store.remove("file")
    with pytest.raises(ChangedMeanwhile):
        replace(store, "file", "5", after)
    assert replace(store, "file", "6", None) == version_of(store, "file")


def test_all_agree_on_what_the_first_one_wrote(store: Folder, tmp_path: Path) -> None:
    for folder in (store, Folder(str(tmp_path))):
        assert [agree(folder, "agreed", text) for text in ("exact", "fast", "exact")] == ["exact"] * 3


@pytest.mark.parametrize("place", ["disk", "memory"])
def test_elsewhere_there_are_no_versions(place: str, tmp_path: Path) -> None:
    folder = Folder(str(tmp_path) if place == "disk" else "memory://conditional")
    assert create(folder, "file", "1")
    assert not create(folder, "file", "2")
    assert version_of(folder, "file") is None
    assert replace(folder, "file", "3", None) is None
    assert folder.read_text("file") == "3"


def test_a_store_that_refuses_conditions(store: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some stores that speak S3's language do, with 501; then files are written without a condition."""
    unconditional = type(store.fs).pipe_file

    def pipe_file(self: Any, path: str, data: bytes, mode: str = "overwrite", **conditions: str) -> Any:
        if mode == "create" or conditions:
            raise OSError(errno.ENOSYS, "A header you provided implies functionality that is not implemented")
        return unconditional(self, path, data)

    monkeypatch.setattr(store.fs, "pipe_file", pipe_file.__get__(store.fs))
    assert create(store, "refused", "1")
    assert not create(store, "refused", "2")
    version = version_of(store, "refused")
    replace(store, "refused", "3", "any")
    assert version_of(store, "refused") != version
    assert store.read_text("refused") == "3"
