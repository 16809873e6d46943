"""The scratch folder is this user's own, and nothing in it is removed that was not put there here."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import pytest

from tasks.storage.temporary_space import MARK, scratch


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the scratch folders of this user will lie; it is not made yet."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path / f"shard-embed-{os.getuid()}"


def test_a_folder_is_private_and_goes(root: Path) -> None:
    with scratch() as folder:
        Path(folder, "0.tar").write_text("x")
        assert root.stat().st_mode & 0o777 == 0o700
    assert list(root.iterdir()) == []


def test_a_link_in_its_place_is_refused_in_one_line_and_its_target_left_alone(root: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    (theirs / "photographs").mkdir(parents=True)
    root.symlink_to(theirs)
    with pytest.raises(PermissionError, match=r"shard-embed-\d+ is a link; remove it, or set TMPDIR"), scratch():
        pass
    assert (theirs / "photographs").exists()


def test_a_file_in_its_place_is_refused(root: Path) -> None:
    root.write_text("a file")
    with pytest.raises(PermissionError, match="cannot be used"), scratch():
        pass


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_another_users_folder_is_refused(root: Path) -> None:
    root.mkdir()
    os.chown(root, 12345, 12345)
    with pytest.raises(PermissionError, match="belongs to another user"), scratch():
        pass


def test_only_what_carries_the_mark_is_removed(root: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for folder in (elsewhere, root / "mine", root / "theirs", root / "odd"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "0.tar").write_text("x")
    (root / "mine" / MARK).touch()
    (root / "mine" / "link").symlink_to(elsewhere)
    (elsewhere / MARK).touch()
    (root / "linked").symlink_to(elsewhere)
    (root / "odd" / MARK).symlink_to(elsewhere / MARK)
    (root / "file").write_text("x")
    with scratch() as mine:
        left = {path.name for path in root.iterdir()} - {Path(mine).name}
    assert left == {"theirs", "odd", "linked", "file"}
    assert (elsewhere / "0.tar").exists()
    assert (root / "theirs" / "0.tar").exists()


def test_what_others_could_write_to_becomes_private(root: Path) -> None:
    root.mkdir()
    root.chmod(0o777)
    with scratch():
        assert root.stat().st_mode & 0o777 == 0o700
