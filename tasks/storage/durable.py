"""Write files and folders that survive a power cut: they are on the disk before they take their names."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

NOT_SUPPORTED = frozenset({errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EISDIR})
"""Errors of file systems that cannot sync a folder."""


def publish(temporary: Path, path: Path) -> None:
    """Give a finished file or folder its name, so that a power cut leaves either the old content or the new.

    The content reaches the disk before the name does.

    Args:
        temporary: What was written, beside `path`.
        path: The name it takes. A file of that name is replaced.

    Raises:
        OSError: The disk did not accept it. A former file of that name is unchanged.
    """
    for written in (temporary, *temporary.rglob("*")) if temporary.is_dir() else (temporary,):
        _sync(written)
    temporary.replace(path)
    _sync(path.parent)


def make_folder(folder: Path) -> None:
    """Create a folder and those above it, all of which survive a power cut."""
    if folder.is_dir():
        return
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for one in made:
        _sync(one.parent)


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if not (path.is_dir() and error.errno in NOT_SUPPORTED):  # some network file systems sync only files
            raise
    finally:
        os.close(handle)


@contextlib.contextmanager
def being_written(temporary: Path) -> Iterator[None]:
    """Create a file and lock it within the block. The kernel releases the lock if the process dies."""
    with temporary.open("xb") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def is_being_written(temporary: Path) -> bool:
    """Return whether a process holds the lock of `being_written` on a file."""
    try:
        with temporary.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # the file is gone by now, or the file system has no locks
        return False
    return False
