"""Read a store's file over plain sockets by a signed URL: many threads at once, without the client's event loop.

A client such as s3fs moves all bytes of a process through one thread of Python. Here a thread per request moves them
from its socket to the disk, nearly all of the time outside of Python. What does not work out is left to the client,
which repeats requests and knows more ways to reach a store.
"""

from __future__ import annotations

import functools
import http.client
import os
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import SplitResult, urlsplit

from fsspec.config import conf

from tasks.storage.folder import Folder

SIGNED_FOR = 3600
"""Seconds for which a URL is good: far longer than a tar takes."""
TIMEOUT = 15.0
"""Seconds without a byte, unless the store's configuration says so; the same as in s3fs."""
PIECE = 1 << 20
"""Bytes that a thread has in memory."""
SIGNING = frozenset({"s3", "s3a"})


class Replaced(Exception):
    """The store has another file under this name than the one that was listed."""


class _Broken(Exception):
    """A connection failed, or its answer is none."""


@dataclass(frozen=True)
class SignedFile:
    """A file of a store that can be read by its URL. The URL is as good as a password: show it nowhere.

    Attributes:
        etag: What the listing said; a file with another one is refused. None if the store has none.
    """

    _url: SplitResult
    etag: str | None

    def __repr__(self) -> str:
        return f"SignedFile({self._url.path!r})"

    def copy(self, start: int, stop: int, handle: int) -> bool:
        """Copy bytes from `start` to before `stop` to the same place of an open file.

        Returns:
            Whether all of them came.

        Raises:
            Replaced: It is another file by now.
            OSError: The disk is full.
        """
        for connection in _connections(self._url):
            try:
                response = self._request(connection, start, stop)
                for at, piece in _pieces(response, start, stop):
                    write_at(handle, piece, at)
            except _Broken:
                connection.close()
            except BaseException:
                connection.close()
                raise
            else:
                _kept()[self._url.netloc] = connection
                return True
        return False

    def _request(self, connection: http.client.HTTPConnection, start: int, stop: int) -> http.client.HTTPResponse:
        """Return the store's answer, which is the part of the file.

        Raises:
            Replaced: It is another file by now.
            _Broken: There is no answer, or another one.
        """
        match = {"If-Match": f'"{self.etag}"'} if self.etag else {}
        try:
            connection.request(
                "GET", f"{self._url.path}?{self._url.query}", headers={"Range": f"bytes={start}-{stop - 1}"} | match
            )
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise _Broken from error
        if response.status == http.client.PRECONDITION_FAILED:
            raise Replaced
        if response.status != http.client.PARTIAL_CONTENT or response.length != stop - start:
            raise _Broken
        return response


def _pieces(response: http.client.HTTPResponse, start: int, stop: int) -> Iterator[tuple[int, memoryview]]:
    """Yield the bytes of an answer with their places in the file, a piece at a time in the same memory.

    Raises:
        _Broken: Not all of them come.
    """
    piece = memoryview(_thread.__dict__.setdefault("piece", bytearray(PIECE)))
    at = start
    while at < stop:
        try:
            size = response.readinto(piece[: min(PIECE, stop - at)])
        except (OSError, http.client.HTTPException) as error:
            raise _Broken from error
        if not size:
            raise _Broken
        yield at, piece[:size]
        at += size
    response.close()


def signed_file(folder: Folder, name: str, etag: str | None) -> SignedFile | None:
    """Return a file of a store by its signed URL; None where that is not the way to reach it.

    Args:
        folder: Where it is.
        name: Its name.
        etag: What the listing said.
    """
    if folder.protocol not in SIGNING:
        return None
    try:
        url = urlsplit(folder.fs.sign(folder.path(name), expiration=SIGNED_FOR))
    except Exception:  # whatever is wrong, the client says it better
        return None
    proxied = url.scheme in urllib.request.getproxies() and not urllib.request.proxy_bypass(url.hostname or "")
    return None if proxied or url.scheme not in ("http", "https") else SignedFile(url, etag)


_thread = threading.local()


def _kept() -> dict[str, http.client.HTTPConnection]:
    """Return this thread's connections that can be used again, by host."""
    connections: dict[str, http.client.HTTPConnection] = _thread.__dict__.setdefault("connections", {})
    return connections


def _connections(url: SplitResult) -> Iterator[http.client.HTTPConnection]:
    """Yield this thread's connection to a host, if it has one, and then a new one: a kept one may be closed by now."""
    if (connection := _kept().pop(url.netloc, None)) is not None:
        yield connection
    given: dict[str, Any] = conf.get("s3", {}).get("config_kwargs", {})
    timeout = float(given.get("read_timeout") or TIMEOUT)
    if url.scheme == "https":
        yield http.client.HTTPSConnection(url.netloc, timeout=timeout, context=_tls())
    else:
        yield http.client.HTTPConnection(url.netloc, timeout=timeout)


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))


def write_at(handle: int, data: bytes | memoryview, at: int) -> None:
    """Write all bytes at an offset of an open file; one system call may write fewer."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written
