"""Read and write files in folders on a disk or in a store; each file is written completely or not at all."""

from __future__ import annotations

import contextlib
import datetime
import functools
import io
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import fsspec

from embedders.errors import InputError, drop_locals, one_line
from tasks.storage.durable import being_written, is_being_written, make_folder, publish
from tasks.storage.local_files import names_below, read_part, size_and_time
from tasks.storage.remote import (
    PERMANENT,
    as_os_error,
    beyond_the_end,
    client_options,
    has_secret,
    missing_package,
    redacted,
    way_out,
)
from tasks.storage.temporary_space import scratch

T = TypeVar("T")
R = TypeVar("R")
BULK_THREADS = 16
AT_ONCE = 64
"""Items that a thread takes at a time where there are many: to hand over each alone costs more than a small read."""
CHUNK = 4096
"""Files of which parts are in memory at a time when parts of many are read."""
TRIES = 4
"""Attempts at a request before it fails; most clients of stores retry by themselves too."""

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "hf", "memory", "oci", "oss"})
"""In these, an upload is visible only when it is complete. Elsewhere it gets its name afterwards."""

READ_ONLY = frozenset({"http", "https"})
WALKED = frozenset({"file", "local", "memory", "http", "https"})
"""Where fsspec lists a tree folder by folder."""
TEMPORARY = re.compile(r"\..+\.[0-9a-f]{32}\.tmp")
"""The name of a file on a disk that is still being written."""


@dataclass(frozen=True, slots=True)
class FileInfo:
    """A file: its name relative to its folder, its bytes, and a text that changes whenever the content does."""

    name: str
    size: int
    fingerprint: str

    @classmethod
    def of(cls, name: str, fingerprint: str) -> FileInfo:
        """Return what a listing said of a file, by its name and fingerprint; 0 bytes where it said nothing of them."""
        size = fingerprint.partition("-")[0]  # see `_fingerprint`
        return cls(name, int(size) if size.isdecimal() else 0, fingerprint)


@dataclass(frozen=True)
class Folder:
    """A folder on a disk or in a store. Names of files are relative to it and separated by slashes.

    Requests that a store does not answer are repeated. If they still fail they raise an OSError, whatever the store's
    client raises.

    Example:
        >>> folder = Folder("s3://crawl/shards")
        >>> [file.name for file in folder.list(".tar")]
        ['00000.tar', '00001.tar']
        >>> folder.write_text("done.txt", "yes")
    """

    url: str

    def __post_init__(self) -> None:
        """Check the URL.

        Raises:
            InputError: It holds a password, which would end up in logs and in the manifest.
        """
        if has_secret(self.url):
            raise InputError(
                f"{redacted(self.url)}: a password or key in a URL would end up in logs and in the manifest; give the "
                "URL without it, and the key in the store's environment variables, such as AWS_SECRET_ACCESS_KEY"
            )

    @functools.cached_property
    def _resolved(self) -> tuple[Any, str]:
        try:
            fs, path = fsspec.core.url_to_fs(self.url, **client_options(self.protocol))
        except ImportError as error:
            raise InputError(f"{self.url}: {missing_package(self.protocol, error)}") from error
        except ValueError as error:
            raise InputError(f"{self.url}: {error}; give a folder or an fsspec URL such as s3://bucket/path") from error
        return fs, path.rstrip("/") or "/"

    @functools.cached_property
    def protocol(self) -> str:
        """Return the URL's scheme; "file" for a plain path."""
        return fsspec.core.split_protocol(self.url)[0] or "file"

    @property
    def fs(self) -> Any:
        """Return the fsspec file system."""
        return self._resolved[0]

    @functools.cached_property
    def is_local(self) -> bool:
        """Return whether its files can be opened by path on this machine."""
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    @property
    def reads_ranges(self) -> bool:
        """Return whether parts of a file can be requested at once. An HTTP server may send the whole file for each."""
        return bool(self.fs.async_impl) and self.protocol not in READ_ONLY

    def path(self, name: str) -> str:
        """Return the file system's own path of a file. A local one can be opened."""
        return f"{self._resolved[1]}/{name}"

    def place(self, name: str) -> str:
        """Return the path or URL of a file as a user writes it, with the folder's scheme."""
        return f"{self.url.rstrip('/')}/{name}"

    def exists(self) -> bool:
        """Return whether the folder exists."""
        return bool(self._ask(self.fs.isdir, self._resolved[1]))

    def is_file(self) -> bool:
        """Return whether what should be a folder is a file."""
        return bool(self._ask(self.fs.isfile, self._resolved[1]))

    def has(self, name: str) -> bool:
        """Return whether a file exists."""
        return bool(self._ask(self.fs.exists, self.path(name)))

    def check_writable(self) -> None:
        """Prove that a store can be written to: write a small file and remove it.

        Raises:
            InputError: It cannot; the message says what to do.
        """
        if self.is_local:
            return
        if self.protocol in READ_ONLY:
            raise InputError(
                f"{self.url}: cannot be written to; give an --output on a disk or in a store such as s3://"
            )
        try:
            probe = f".shard-embed-{uuid.uuid4().hex}"
            self.write_text(probe, "can this be written?\n")
            self.remove(probe)
        except OSError as error:
            self.refuse(error)

    def refuse(self, error: OSError) -> NoReturn:
        """Turn an error of this folder into one line that says what to do.

        Raises:
            InputError: Always.
        """
        raise InputError(f"{self.url}: {one_line(error)}; {way_out(self.protocol, error)}") from error

    def list(self, *suffixes: str) -> list[FileInfo]:
        """List the files below the folder, without those that are hidden or in hidden folders.

        Args:
            suffixes: Ends of the names to list, such as ".tar".

        Returns:
            The files, sorted by name. A folder that does not exist has none.

        Raises:
            InputError: A name would lead out of the folder, which is possible in a store.
        """
        infos = self._listed_locally(suffixes) if self.is_local else self._listed_by_client(suffixes)
        return sorted(infos, key=lambda info: info.name)

    def _listed_locally(self, suffixes: tuple[str, ...]) -> Sequence[FileInfo]:
        root = self._resolved[1]
        names = list(names_below(root, suffixes))
        found = in_bulk(lambda name: size_and_time(os.path.join(root, name)), names)
        return [
            FileInfo(name, it[0], f"{it[0]}-{it[1]}") for name, it in zip(names, found, strict=True) if it is not None
        ]

    def _listed_by_client(self, suffixes: tuple[str, ...]) -> Sequence[FileInfo]:
        root = self._resolved[1]
        try:
            found = self._ask(self.fs.find, root, detail=True, **self._raising_errors())
        except FileNotFoundError:
            return []
        named = ((path.removeprefix(root).lstrip("/"), info) for path, info in found.items())
        infos = {name: info for name, info in named if name.endswith(suffixes)}
        for name in infos:
            if ".." in name and ".." in name.split("/"):
                raise InputError(f"{self.url}: the name {name!r} leads out of the folder; rename or remove it")
        infos = {name: info for name, info in infos.items() if not name.startswith(".") and "/." not in name}
        if any(info.get("size") is None for info in infos.values()):  # an HTTP index page has names only
            infos = dict(zip(infos, in_bulk(lambda name: self._ask(self.fs.info, self.path(name)), infos), strict=True))
        return [FileInfo(name, int(info.get("size") or 0), _fingerprint(info)) for name, info in infos.items()]

    def _raising_errors(self) -> dict[str, Any]:
        """Return arguments with which `find` fails at a subfolder that it cannot list, instead of skipping it."""

        def fail(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        return {"on_error": fail} if self.protocol in WALKED else {}

    def info(self, name: str) -> FileInfo:
        """Return a file's size and fingerprint as they are now.

        Raises:
            FileNotFoundError: There is no such file.
        """
        info = self._ask(self.fs.info, self.path(name))
        return FileInfo(name, int(info.get("size") or 0), _fingerprint(info))

    def fingerprint(self, name: str) -> str | None:
        """Return the fingerprint of one file as it is now; None if there is no such file."""
        try:
            return self.info(name).fingerprint
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """Open a file to read bytes at any offset; a file in a store is read completely, in one request."""
        if self.is_local:
            return self.fs.open(self.path(name), "rb")
        return io.BytesIO(self._read(name))

    def read_text(self, name: str) -> str | None:
        """Return a small file's text; None if there is no such file."""
        try:
            return self._read(name).decode("utf-8", "surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """Return the bytes of a file from `start` to before `stop`, or fewer if it ends earlier."""
        return bytes(self._ask(self.fs.cat_file, self.path(name), start=start, end=stop))

    def read_tail(self, name: str, size: int) -> bytes:
        """Return the last `size` bytes of a file, or all of a shorter one, in one request."""
        try:
            return bytes(self._ask(self.fs.cat_file, self.path(name), start=-size))
        except OSError as error:
            if beyond_the_end(error):
                return b""
            raise

    def read_tails(self, files: Sequence[FileInfo], size: int) -> Iterator[tuple[FileInfo, bytes]]:
        """Yield the last `size` bytes of many files, or all of shorter ones; make many requests at a time.

        Args:
            files: The files, from `list`. Those that are gone by now are left out.
            size: Bytes to read of each.
        """
        starts = [max(0, file.size - size) for file in files]
        ends = [file.size for file in files]
        return self._parts(files, starts, ends)

    def read_heads(self, files: Sequence[FileInfo], size: int) -> Iterator[tuple[FileInfo, bytes]]:
        """Yield the first `size` bytes of many files, or all of shorter ones; see `read_tails`."""
        return self._parts(files, [0] * len(files), [min(size, file.size) for file in files])

    def _parts(
        self, files: Sequence[FileInfo], starts: Sequence[int], ends: Sequence[int]
    ) -> Iterator[tuple[FileInfo, bytes]]:
        """Yield a part of each file that is there; a chunk of them at a time is in memory."""
        read = self._local_parts if self.is_local else self._remote_parts
        for at in range(0, len(files), CHUNK):
            some = slice(at, at + CHUNK)
            for file, part in zip(files[some], read(files[some], starts[some], ends[some]), strict=True):
                if part is not None:
                    yield file, part

    def _local_parts(
        self, files: Sequence[FileInfo], starts: Sequence[int], ends: Sequence[int]
    ) -> Sequence[bytes | None]:
        root = self._resolved[1]
        parts = list(zip(files, starts, ends, strict=True))
        return in_bulk(lambda it: read_part(f"{root}/{it[0].name}", it[1], it[2] - it[1]), parts)

    def _remote_parts(
        self, files: Sequence[FileInfo], starts: Sequence[int], ends: Sequence[int]
    ) -> Sequence[bytes | None]:
        answers: Sequence[Any] = [None] * len(files)
        if self.fs.async_impl:
            paths = [self.path(file.name) for file in files]
            answers = self.fs.cat_ranges(paths, list(starts), list(ends), on_error="return")

        def again(i: int) -> bytes | None:
            """Return a part of a file; request it alone if it failed among the others or was not requested yet."""
            if isinstance(answers[i], bytes):
                return bytes(answers[i])
            try:
                return self.read_range(files[i].name, starts[i], ends[i]) if ends[i] else b""
            except (FileNotFoundError, IsADirectoryError):
                return None

        return in_bulk(again, range(len(files)))

    def _read(self, name: str) -> bytes:
        try:
            return bytes(
                self._ask(self.fs.cat_file, self.path(name), start=0)
            )  # without a start, s3fs first asks for the size
        except OSError as error:
            if beyond_the_end(error):
                return b""
            raise

    def read_head(self, name: str, size: int = 512) -> str:
        """Return the first bytes of a text file; "" if there is no such file."""
        try:
            return self.read_range(name, 0, size).decode("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def write(self, name: str, save: Callable[[str], None]) -> None:
        """Write a file completely or not at all.

        Args:
            name: The file's name.
            save: Writes the content to the local path that it gets. The file then takes its name in one step.

        Example:
            >>> folder.write("vectors.parquet", lambda path: pq.write_table(table, path))
        """
        with self.replacing(name) as path:
            save(path)

    @contextlib.contextmanager
    def replacing(self, name: str) -> Iterator[str]:
        """Yield a local path to write to. The file takes its name when the block ends, and never if the block fails."""
        if self.is_local:
            with self._replacing_locally(Path(self.path(name))) as path:
                yield path
            return
        with scratch() as folder:
            local = os.path.join(folder, "upload")
            yield local
            self._upload(local, self.path(name))

    @contextlib.contextmanager
    def _replacing_locally(self, path: Path) -> Iterator[str]:
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with being_written(temporary):
                yield str(temporary)
                publish(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _upload(self, local: str, path: str) -> None:
        if self.protocol in OBJECT_STORES:
            self._ask(self.fs.put_file, local, path)
            return
        parent, _, name = path.rpartition("/")
        temporary = f"{parent}/.{name}.{uuid.uuid4().hex}.tmp"
        self._ask(self.fs.makedirs, parent, exist_ok=True)
        try:
            self._ask(self.fs.put_file, local, temporary)
            self._ask(self.fs.mv, temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                self.fs.rm_file(temporary)
            raise

    def sweep(self, *, below: bool = True) -> None:
        """Remove the unfinished files of killed writers from a disk; a file that is still being written stays.

        Args:
            below: Whether to sweep the folders below this one too.
        """
        if not self.is_local:
            return
        folder = Path(self.path(""))
        for path in folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name) and not is_being_written(path):
                path.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file completely or not at all."""

        def save(path: str) -> None:
            Path(path).write_text(text, "utf-8", "surrogateescape")

        self.write(name, save)

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(self.fs.rm_file, self.path(name))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """Give a local path with the file's content: the file itself, or a copy that is removed after the block."""
        if self.is_local:
            yield self.path(name)
            return
        with scratch() as folder:
            local = os.path.join(folder, os.path.basename(name))
            self.download(name, local)
            yield local

    def download(self, name: str, local: str) -> None:
        """Copy a file to a local path."""
        self._ask(self.fs.get_file, self.path(name), local)

    def _ask(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Call a function of the store's client; call it again if that can help.

        Raises:
            OSError: It failed. The error of the store's client is its cause.
        """
        for attempt in range(TRIES):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                drop_locals(error)  # fsspec's own frames refer to it
                if attempt == TRIES - 1 or not self._may_pass(error):
                    raise as_os_error(error)  # noqa: B904  # its cause is set there
            time.sleep(0.2 * 3**attempt * random.uniform(0.5, 1.5))  # 0.2, 0.6, 1.8 s, more or less by half
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _may_pass(self, error: Exception) -> bool:
        """Return whether another attempt may succeed after an error of a store."""
        os_error = as_os_error(error)
        if self.is_local or not isinstance(os_error, OSError) or isinstance(os_error, PERMANENT):
            return False
        return not beyond_the_end(os_error)


def parted(place: str) -> tuple[Folder, str]:
    """Split a file's path or URL into its folder and its name."""
    parent, slash, name = place.rpartition("/")
    return Folder(parent or slash or "."), name


@contextlib.contextmanager
def writing(place: str, way: str) -> Iterator[None]:
    """Turn an OSError within the block into one line.

    Args:
        place: Path or URL of what is written.
        way: What the user can do if it cannot be written.

    Raises:
        InputError: It cannot be written.

    Example:
        >>> with writing("out/page.html", "give another --sheet FILE"):
        ...     folder.write_text("page.html", page)
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror or one_line(error)}); {way}") from error


VERSION_FIELDS = (
    *("ETag", "etag", "md5Hash", "content_md5", "Content-MD5", "Digest", "blob_id"),
    *("mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created"),
)
"""Fields of fsspec's file infos that change with a file's content: hashes before times."""


def _fingerprint(info: dict[str, Any]) -> str:
    """Return a file's size and its etag or modification time, whichever the store has."""
    for field in VERSION_FIELDS:
        if value := info.get(field):
            if isinstance(value, datetime.datetime):  # some stores give a date in listings and a number elsewhere
                value = value.timestamp()
            return f"{info.get('size')}-{str(value).strip(chr(34))}"
    return f"{info.get('size')}"


def in_bulk(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Apply a function that waits for files to many items, with several threads.

    Returns:
        The results, in the order of the items.
    """
    items = list(items)
    size = min(AT_ONCE, max(1, len(items) // (8 * BULK_THREADS)))
    parts = [items[start : start + size] for start in range(0, len(items), size)]
    with ThreadPoolExecutor(BULK_THREADS) as pool:
        return [result for part in pool.map(lambda part: [function(item) for item in part], parts) for result in part]
