"""List and read many files of a local disk: system calls without a Python object per file around them."""

from __future__ import annotations

import os
from collections.abc import Iterator


def names_below(root: str, suffixes: tuple[str, ...]) -> Iterator[str]:
    """Yield the names of the files below a folder, relative to it, without hidden ones and those in hidden folders.

    Links to folders are not followed.

    Args:
        root: The folder.
        suffixes: Ends of the names to yield.

    Raises:
        OSError: A folder cannot be listed.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            entries = os.scandir(os.path.join(root, folder))
        except (FileNotFoundError, NotADirectoryError):  # it went meanwhile
            continue
        with entries:
            for entry in entries:
                name = entry.name
                if name.startswith("."):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    folders.append(f"{folder}{name}/")
                elif name.endswith(suffixes):
                    yield folder + name


def size_and_time(path: str) -> tuple[int, float] | None:
    """Return the bytes of a file and when it was written, in seconds since 1970; None if it is gone.

    Of a link they are those of the file. One that leads nowhere has no bytes, and the time of the link.
    """
    try:
        status = os.stat(path)
        size = status.st_size
    except FileNotFoundError:
        try:
            status, size = os.lstat(path), 0
        except FileNotFoundError:
            return None
    return size, status.st_mtime or status.st_ctime


def read_part(path: str, start: int, size: int) -> bytes | None:
    """Return some bytes of a file; None if there is no such file.

    Args:
        path: The file.
        start: The offset of the first byte; less than 0 counts from the end.
        size: How many at most; the file may end earlier.
    """
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        at = start if start >= 0 else max(0, os.fstat(handle).st_size + start)
        return os.pread(handle, size, at)
    except IsADirectoryError:
        return None
    finally:
        os.close(handle)
