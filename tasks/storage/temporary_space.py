"""Temporary folders on the local disk, for tars downloaded from a store and files to upload to one.

Anybody may write to the folder above them, so nothing there is trusted: ours must be a folder of this user and no
link, and only folders that carry our mark are ever removed from it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator

MARK = ".shard-embed-scratch"
"""A file in each folder made here. The folder's process holds a lock on it for as long as it lives."""

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """Create a folder of this process below TMPDIR, and remove it after the block.

    This also removes the folders of killed processes: a folder in use has its mark locked, and the kernel releases the
    lock when the process dies.

    Raises:
        PermissionError: Our folder below TMPDIR is a link, no folder, or another user's.
        OSError: The disk is full.
    """
    root = os.path.join(tempfile.gettempdir(), f"shard-embed-{os.getuid()}")
    with _own_folder(root) as root_fd:
        _remove_leftovers(root_fd)
        folder = tempfile.mkdtemp(dir=root)
        mark = os.open(os.path.join(folder, MARK), os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        fcntl.flock(mark, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(mark)


@contextlib.contextmanager
def _own_folder(path: str) -> Iterator[int]:
    """Open and lock a folder that only this user can write to; create it if it is missing."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, 0o700)
    try:
        handle = os.open(path, _FOLDER)
    except OSError as error:
        what = "is a link" if os.path.islink(path) else f"cannot be used ({error.strerror})"
        raise PermissionError(f"{path} {what}; remove it, or set TMPDIR to a folder of your own") from error
    try:
        if os.fstat(handle).st_uid != os.getuid():
            raise PermissionError(f"{path} belongs to another user; set TMPDIR to a folder of your own")
        os.fchmod(handle, 0o700)
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def _remove_leftovers(root: int) -> None:
    """Remove the folders that carry our mark and that no living process holds."""
    for name in os.listdir(root):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            folder = os.open(name, _FOLDER, dir_fd=root)
            stack.callback(os.close, folder)
            mark = os.open(MARK, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            stack.callback(os.close, mark)
            if not _is_own_file(mark):
                continue
            fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(name, ignore_errors=True, dir_fd=root)  # follows no link, not even below the folder


def _is_own_file(handle: int) -> bool:
    """Return whether an open file is an ordinary file of this user."""
    status = os.fstat(handle)
    return stat.S_ISREG(status.st_mode) and status.st_uid == os.getuid()
