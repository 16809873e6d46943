"""All file access: folders named by a path or an fsspec URL, read in bulk and written whole or not at all."""

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
from tasks.storage.remote import (
    PERMANENT,
    as_os_error,
    beyond_the_end,
    has_secret,
    missing_package,
    redacted,
    way_out,
)
from tasks.storage.temporary_space import scratch

T = TypeVar("T")
R = TypeVar("R")
BULK_THREADS = 16
TRIES = 4
"""How often a store is asked before a request that may pass is given up; most clients try again by themselves too."""

OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "az", "adl", "hf", "memory", "oci", "oss"})
"""Where an upload is visible only once it is whole. Elsewhere it gets its name when it is."""

READ_ONLY = frozenset({"http", "https"})
WALKED = frozenset({"file", "local", "memory", "http", "https"})
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
    """A folder on a disk or in a store. Names are relative to it and separated by slashes.

    A store that does not answer is asked again; what then still fails is an OSError, whatever its client raises.
    """

    url: str

    def __post_init__(self) -> None:
        """:raises InputError: the URL holds a password, which would end in logs and in the manifest."""
        if has_secret(self.url):
            raise InputError(
                f"{redacted(self.url)}: a password or key in a URL would end in logs and in the manifest; give the "
                "URL without, and the key in the store's environment variables, such as AWS_SECRET_ACCESS_KEY"
            )

    @functools.cached_property
    def _resolved(self) -> tuple[Any, str]:
        try:
            # Other processes write here, so a listing that was true a moment ago must not answer for the store.
            cached = {} if self.protocol in {"file", "local"} else {"use_listings_cache": False}
            fs, path = fsspec.core.url_to_fs(self.url, **cached)
        except ImportError as error:
            raise InputError(f"{self.url}: {missing_package(self.protocol, error)}") from error
        except ValueError as error:
            raise InputError(f"{self.url}: {error}; give a folder or an fsspec URL such as s3://bucket/path") from error
        return fs, path.rstrip("/") or "/"

    @property
    def protocol(self) -> str:
        """The URL's scheme; "file" for a plain path."""
        return fsspec.core.split_protocol(self.url)[0] or "file"

    @property
    def fs(self) -> Any:
        """The fsspec file system."""
        return self._resolved[0]

    @property
    def is_local(self) -> bool:
        """Whether its files can be opened by path on this machine."""
        return "file" in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    @property
    def reads_ranges(self) -> bool:
        """Whether parts of a file can be asked for at once; an HTTP server may answer each with the whole file."""
        return bool(self.fs.async_impl) and self.protocol not in READ_ONLY

    def path(self, name: str) -> str:
        """The file system's own path of a file; a local one can be opened."""
        return f"{self._resolved[1]}/{name}"

    def place(self, name: str) -> str:
        """A file as a person names it, with the folder's scheme."""
        return f"{self.url.rstrip('/')}/{name}"

    def exists(self) -> bool:
        """Whether the folder is there."""
        return bool(self._ask(self.fs.isdir, self._resolved[1]))

    def is_file(self) -> bool:
        """Whether what should be a folder is a file."""
        return bool(self._ask(self.fs.isfile, self._resolved[1]))

    def has(self, name: str) -> bool:
        """Whether a file is there."""
        return bool(self._ask(self.fs.exists, self.path(name)))

    def check_writable(self) -> None:
        """Prove that a store can be written to, by a small file that is taken away again.

        :raises InputError: it cannot, with what to do.
        """
        if self.is_local:
            return
        if self.protocol in READ_ONLY:
            raise InputError(
                f"{self.url}: cannot be written to; give an --output on a disk or in a store such as s3://"
            )
        try:
            self.write_text(probe := f".shard-embed-{uuid.uuid4().hex}", "can this be written?\n")
            self.remove(probe)
        except OSError as error:
            self.refuse(error)

    def refuse(self, error: OSError) -> NoReturn:
        """Turn an error of this folder into one line.

        :raises InputError: always.
        """
        raise InputError(f"{self.url}: {one_line(error)}; {way_out(self.protocol, error)}") from error

    def list(self, *suffixes: str) -> list[FileInfo]:
        """Every file below the folder that ends in a suffix, sorted by name; hidden files and folders left out.

        :raises InputError: a name that would lead out of the folder, which a store can hold.
        """
        root = self._resolved[1]
        try:
            found = self._ask(self.fs.find, root, detail=True, **self._telling_errors())
        except FileNotFoundError:
            return []
        infos = {path.removeprefix(root).lstrip("/"): info for path, info in found.items()}
        infos = {name: info for name, info in infos.items() if name.endswith(suffixes)}
        for name in infos:
            if ".." in name.split("/"):
                raise InputError(f"{self.url}: the name {name!r} leads out of the folder; rename it or take it away")
        names = sorted(name for name in infos if not any(part.startswith(".") for part in name.split("/")))
        for name in names:
            if infos[name].get("islink"):  # fsspec's listing tells the link's own time, a question the file's
                with contextlib.suppress(FileNotFoundError):
                    infos[name] = self._ask(self.fs.info, self.path(name))
        if any(infos[name].get("size") is None for name in names):  # an HTTP index page tells names only
            infos = dict(zip(names, in_bulk(lambda name: self._ask(self.fs.info, self.path(name)), names), strict=True))
        return [FileInfo(name, int(infos[name].get("size") or 0), _fingerprint(infos[name])) for name in names]

    def _telling_errors(self) -> dict[str, Any]:
        """What keeps `find` from passing over a subfolder that could not be listed, as it does where it walks."""

        def told(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):
                raise error

        return {"on_error": told} if self.protocol in WALKED else {}

    def info(self, name: str) -> FileInfo:
        """A file's size and fingerprint as they are now.

        :raises FileNotFoundError: it is not there.
        """
        info = self._ask(self.fs.info, self.path(name))
        return FileInfo(name, int(info.get("size") or 0), _fingerprint(info))

    def fingerprint(self, name: str) -> str | None:
        """What `list` says of a file's content, asked again for this file alone; None if it is not there."""
        try:
            return self.info(name).fingerprint
        except FileNotFoundError:
            return None

    def open(self, name: str) -> Any:
        """Open a file for reading bytes at any place; one in a store is read whole, in one request."""
        if self.is_local:
            return self.fs.open(self.path(name), "rb")
        return io.BytesIO(self._read(name))

    def read_text(self, name: str) -> str | None:
        """A small file's text, or None if it is not there."""
        try:
            return self._read(name).decode("utf-8", "surrogateescape")
        except (FileNotFoundError, NotADirectoryError):
            return None

    def read_range(self, name: str, start: int, stop: int) -> bytes:
        """The bytes of a file from `start` to before `stop`, or fewer where the store ended early."""
        return bytes(self._ask(self.fs.cat_file, self.path(name), start=start, end=stop))

    def read_tail(self, name: str, size: int) -> bytes:
        """The last `size` bytes of a file, or all of a shorter one, in one request."""
        try:
            return bytes(self._ask(self.fs.cat_file, self.path(name), start=-size))
        except OSError as error:
            if beyond_the_end(error):
                return b""
            raise

    def read_tails(self, files: Sequence[FileInfo], size: int) -> Iterator[tuple[FileInfo, bytes]]:
        """The last `size` bytes of many files, or all of shorter ones: one request each, many at a time.

        Files that went away since they were listed are left out.
        """
        for chunk in (files[i : i + 1024] for i in range(0, len(files), 1024)):  # bounds what is in memory at once
            yield from ((file, tail) for file, tail in zip(chunk, self._tails(chunk, size), strict=True) if tail)

    def _tails(self, files: Sequence[FileInfo], size: int) -> Sequence[bytes | None]:
        paths, ends = [self.path(file.name) for file in files], [file.size for file in files]
        starts = [max(0, end - size) for end in ends]
        answers: Sequence[Any] = [None] * len(files)
        if self.fs.async_impl:
            answers = self.fs.cat_ranges(paths, starts, ends, on_error="return")

        def again(i: int) -> bytes | None:
            """The tail of a file that failed among the others, or of any where there is no asking many at once."""
            if isinstance(answers[i], bytes):
                return bytes(answers[i])
            try:
                return self.read_range(files[i].name, starts[i], ends[i]) if ends[i] else None
            except (FileNotFoundError, IsADirectoryError):
                return None

        return in_bulk(again, range(len(files)))

    def _read(self, name: str) -> bytes:
        try:
            return bytes(self._ask(self.fs.cat_file, self.path(name), start=0))  # without a start, s3fs asks the size
        except OSError as error:
            if beyond_the_end(error):
                return b""
            raise

    def read_head(self, name: str, size: int = 512) -> str:
        """The first bytes of a text; nothing if it is not there."""
        try:
            return self.read_range(name, 0, size).decode("utf-8", "replace")
        except (FileNotFoundError, NotADirectoryError):
            return ""

    def write(self, name: str, save: Callable[[str], None]) -> None:
        """Write a file whole or not at all.

        :param save: gets a local path and writes there; the file then takes its name in one step.
        """
        if self.is_local:
            self._write_local(Path(self.path(name)), save)
            return
        with scratch() as folder:
            local = os.path.join(folder, "upload")
            save(local)
            self._upload(local, self.path(name))

    def _write_local(self, path: Path, save: Callable[[str], None]) -> None:
        make_folder(path.parent)
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            with being_written(temporary):
                save(str(temporary))
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
        """Remove what killed writers have left on a disk; a file that somebody is writing stays.

        Args:
            below: Whether the folders below this one are swept too.
        """
        if not self.is_local:
            return
        folder = Path(self.path(""))
        for path in folder.rglob(".*.tmp") if below else folder.glob(".*.tmp"):
            if TEMPORARY.fullmatch(path.name) and not is_being_written(path):
                path.unlink(missing_ok=True)

    def write_text(self, name: str, text: str) -> None:
        """Write a small file whole or not at all."""

        def save(path: str) -> None:
            Path(path).write_text(text, "utf-8", "surrogateescape")

        self.write(name, save)

    def remove(self, name: str) -> None:
        """Take a file away if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._ask(self.fs.rm_file, self.path(name))

    @contextlib.contextmanager
    def local_copy(self, name: str) -> Iterator[str]:
        """A path on the local disk with the file's content: itself, or a copy that goes when the block ends."""
        if self.is_local:
            yield self.path(name)
            return
        with scratch() as folder:
            local = os.path.join(folder, os.path.basename(name))
            self.download(name, local)
            yield local

    def download(self, name: str, local: str) -> None:
        """Copy a file to a local path, by one request or as the store's client sees fit."""
        self._ask(self.fs.get_file, self.path(name), local)

    def _ask(self, function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
        """Ask the store, again where that can help.

        :raises OSError: it did not do it; never an error of the store's client.
        """
        for attempt in range(TRIES):
            try:
                return function(*args, **kwargs)
            except Exception as error:
                drop_locals(error)  # fsspec's own frames refer to it
                if attempt == TRIES - 1 or not self._may_pass(error):
                    raise as_os_error(error)  # noqa: B904  # its cause is set there
            time.sleep(0.2 * 3**attempt * random.uniform(0.5, 1.5))  # 0.2, 0.6, 1.8 s, give or take half
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _may_pass(self, error: Exception) -> bool:
        """Whether a store's error may be gone at the next attempt."""
        told = as_os_error(error)
        if self.is_local or not isinstance(told, OSError) or isinstance(told, PERMANENT):
            return False
        return not beyond_the_end(told)


def parted(place: str) -> tuple[Folder, str]:
    """A file's path or URL as its folder and its name."""
    parent, slash, name = place.rpartition("/")
    return Folder(parent or slash or "."), name


@contextlib.contextmanager
def writing(place: str, way: str) -> Iterator[None]:
    """Turn an error of writing something into one line.

    Args:
        place: What is written, as a person names it.
        way: What a person can do if it cannot be.

    Raises:
        InputError: it cannot.
    """
    try:
        yield
    except OSError as error:
        raise InputError(f"{place}: cannot be written ({error.strerror or one_line(error)}); {way}") from error


def _fingerprint(info: dict[str, Any]) -> str:
    """Size and etag, or size and modification time: whichever the store keeps."""
    for field in (
        "ETag",
        "etag",
        "md5Hash",
        "content_md5",
        "Content-MD5",
        "Digest",
        "blob_id",
        "mtime",
        "LastModified",
        "last_modified",
        "Last-Modified",
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
