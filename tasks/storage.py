"""All file access: folders named by a path or an fsspec URL, read in bulk and written whole or not at all."""

from __future__ import annotations

import contextlib
import datetime
import functools
import os
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import fsspec

from embedders.errors import InputError

T = TypeVar("T")
R = TypeVar("R")
BULK_THREADS = 16
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""The name of a file on a disk that is not whole yet."""


@dataclass(frozen=True)
class FileInfo:
    """A file of a folder: its name relative to it, its bytes, and a text that changes when its content does."""

    name: str
    size: int
    fingerprint: str


@dataclass(frozen=True)
class Folder:
    """A folder on a disk or in a store. Names are relative to it and separated by slashes."""

    url: str

    @functools.cached_property
    def _resolved(self) -> tuple[Any, str]:
        try:
            fs, path = fsspec.core.url_to_fs(self.url)
        except ImportError as error:
            raise InputError(f"{self.url}: {error}") from error
        except ValueError as error:
            raise InputError(f"{self.url}: {error}; give a folder or an fsspec URL such as s3://bucket/path") from error
        return fs, path.rstrip("/") or "/"

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._resolved[0]

    @property
    def is_local(self) -> bool:
        """Whether its files can be opened by path on this machine."""
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    def path(self, name: str) -> str:
        """The file system's own path of a file; a local one can be opened."""
        return f"{self._resolved[1]}/{name}"

    def exists(self) -> bool:
        """Whether the folder is there."""
        return bool(self.fs.isdir(self._resolved[1]))

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self.fs.exists(self.path(name)))

    def list(self, *suffixes: str) -> list[FileInfo]:
        """Every file below the folder that ends in a suffix, sorted by name; hidden files and folders left out."""
        root = self._resolved[1]
        self.fs.invalidate_cache()  # other processes write here
        try:
            found = self.fs.find(root, detail=True)
        except FileNotFoundError:
            return []
        files = []
        for path, info in found.items():
            name = path.removeprefix(root).lstrip("/")
            if name.endswith(suffixes) and not any(part.startswith(".") for part in name.split("/")):
                files.append(FileInfo(name, int(info.get("size") or 0), _fingerprint(info)))
        return sorted(files, key=lambda file: file.name)

    def fingerprint(self, name: str) -> str | None:
        """What `list` says of a file's content, asked again for this file alone; None if it is not there."""
        self.fs.invalidate_cache()
        try:
            return _fingerprint(self.fs.info(self.path(name)))
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """Open a file for reading bytes at any place."""
        return self.fs.open(self.path(name), "rb")

    def read_text(self, name: str) -> str | None:
        """A small file's text, or None if it is not there."""
        try:
            return str(self.fs.cat_file(self.path(name)).decode("utf-8", "surrogateescape"))
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_head(self, name: str, size: int = 512) -> str:
        """The first bytes of a text; nothing if it is not there."""
        try:
            return str(self.fs.cat_file(self.path(name), end=size).decode("utf-8", "replace"))
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def write(self, name: str, save: Callable[[str], None]) -> None:
        """Write a file whole or not at all.

        :param save: gets a local path and writes there; the file then takes its name in one step.
        """
        if self.is_local:
            self._write_local(Path(self.path(name)), save)
            return
        with tempfile.TemporaryDirectory(prefix="shard-embed-") as scratch:
            local = os.path.join(scratch, "upload")
            save(local)
            self.fs.put_file(local, self.path(name))

    def _write_local(self, path: Path, save: Callable[[str], None]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            save(str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def sweep(self) -> None:
        """Take away what writers that were killed have left on a disk. Nobody may write meanwhile."""
        if not self.is_local:
            return
        for path in Path(self.path("")).rglob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name):
                path.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""

        def save(path: str) -> None:
            Path(path).write_text(text, "utf-8", "surrogateescape")

        self.write(name, save)

    def remove(self, name: str) -> None:
        """Take a file away if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self.fs.rm_file(self.path(name))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """A path on the local disk with the file's content: itself, or a copy that goes when the block ends."""
        if self.is_local:
            yield self.path(name)
            return
        with tempfile.TemporaryDirectory(prefix="shard-embed-") as scratch:
            local = os.path.join(scratch, os.path.basename(name))
            self.fs.get_file(self.path(name), local)
            yield local


def _fingerprint(info: dict[str, Any]) -> str:
    """Size and etag, or size and modification time: whichever the store keeps."""
    for field in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "mtime",
        "LastModified",
        "last_modified",
        "updated",
        "created",
    ):
        if value := info.get(field):
            if isinstance(value, datetime.datetime):  # some say it so in a listing, and as a number elsewhere
                value = value.timestamp()
            return f"{info.get('size')}-{str(value).strip(chr(34))}"
    return f"{info.get('size')}"


def in_bulk(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply a function that waits for files to many items at once, in order."""
    with ThreadPoolExecutor(BULK_THREADS) as pool:
        return list(pool.map(function, items))
