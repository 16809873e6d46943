"""Room on the local disk for what only passes through: tars of a store, and files on their way to one."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator


@contextlib.contextmanager
def scratch() -> Iterator[str]:
    """A folder of this process on the local disk, below TMPDIR; it goes when the block ends.

    Those of processes that were killed go too: a folder in use is locked, and the system takes a lock back with its
    process.

    :raises OSError: the place belongs to another user, or is full.
    """
    root = os.path.join(tempfile.gettempdir(), f"shard-embed-{os.getuid()}")
    os.makedirs(root, mode=0o700, exist_ok=True)
    if os.stat(root).st_uid != os.getuid():
        raise PermissionError(f"{root} belongs to another user; set TMPDIR to a folder of your own")
    with _locked(root):
        _remove_leftovers(root)
        folder = tempfile.mkdtemp(dir=root)
        mine = os.open(folder, os.O_RDONLY)
        fcntl.flock(mine, fcntl.LOCK_EX)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(mine)


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _remove_leftovers(root: str) -> None:
    """Remove the folders that no living process holds."""
    for entry in os.scandir(root):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            handle = os.open(entry.path, os.O_RDONLY)
            stack.callback(os.close, handle)
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(entry.path, ignore_errors=True)
