"""Files for Arrow's readers."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from tasks.storage.folder import FileInfo, Folder

END_BYTES = 256 << 10
"""Read of a store's file at first: small files whole, and of others the footer."""


@contextlib.contextmanager
def arrow_file(folder: Folder, name: str) -> Iterator[Any]:
    """Open a file for Arrow's readers: without Python if it is local, and whole in one request if it is not.

    Raises:
        FileNotFoundError: It is not there.
    """
    if folder.is_local:
        with pa.OSFile(folder.path(name)) as file:
            yield file
    else:
        with folder.open(name) as file:
            yield file


@contextlib.contextmanager
def arrow_file_by_parts(folder: Folder, info: FileInfo) -> Iterator[Any]:
    """Open a file for a reader of its footer and a column or two; of a store, only what is read is requested.

    Args:
        folder: Where it is.
        info: Of the file, from a listing.

    Raises:
        FileNotFoundError: It is not there.
    """
    if folder.is_local or not folder.reads_ranges or info.size <= END_BYTES:
        with arrow_file(folder, info.name) as file:
            yield file
    else:
        with pa.PythonFile(_Parts(folder, info), mode="r") as file:
            yield file


class _Parts(io.RawIOBase):
    """A store's file whose end is held, and of which other parts are requested as they are read."""

    def __init__(self, folder: Folder, info: FileInfo) -> None:
        self._folder = folder
        self._info = info
        self._at = 0
        self._end_at = info.size - END_BYTES
        self._end = folder.read_range(info.name, self._end_at, info.size)

    def readable(self) -> bool:
        """Return that it can be read."""
        return True

    def seekable(self) -> bool:
        """Return that it can be read from any offset."""
        return True

    def tell(self) -> int:
        """Return the offset of what is read next."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Go to an offset."""
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._info.size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        """Return the next bytes; in one request unless they are in the end of the file that is held."""
        stop = self._info.size if size < 0 else min(self._at + size, self._info.size)
        start, self._at = self._at, max(stop, self._at)
        if start >= stop:
            return b""
        if start >= self._end_at:
            return self._end[start - self._end_at : stop - self._end_at]
        return self._folder.read_range(self._info.name, start, stop)
