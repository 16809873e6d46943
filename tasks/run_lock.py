"""One run at a time over one output: a lease in the output that says who writes there, and is renewed while they do.

A lease is taken over where nobody can hold it any more: its process is gone from this machine, or, where that cannot be
seen, it was not renewed for some time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from embedders.errors import InputError
from tasks.storage.folder import Folder

LOCK = "run.lock"
RENEWED_EVERY = 15.0
"""Seconds between two renewals of a lease."""

EXPIRED_AFTER = 120.0
"""Seconds without a renewal after which the run of another machine counts as dead."""

SETTLED_AFTER = 0.5
"""Seconds after which a lease that was taken over is read once more: of two that take it, the last one has it."""


@dataclass(frozen=True)
class Lease:
    """Who writes into an output. Times are seconds since 1970; `born` is when the process started, `machine` its kernel
    and process namespace, where process ids mean the same."""

    token: str
    host: str
    machine: str
    pid: int
    born: float
    run: str
    started: float
    renewed: float

    @classmethod
    def of_this_process(cls, run: str) -> Lease:
        """A new lease."""
        now, pid = time.time(), os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _born(pid) or 0.0, run, now, now)

    @property
    def held(self) -> bool:
        """Whether somebody may still write under it."""
        if self.machine == _machine():
            born = _born(self.pid)  # moves a little when the clock is set
            return born is not None and abs(born - self.born) < 60
        return time.time() - self.renewed < EXPIRED_AFTER

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        return f"{self.run!r}, process {self.pid} on {self.host}, since {since}"


@contextlib.contextmanager
def only_run(
    output: str, run: str, lost: Callable[[str], None], instead: str = "give another --output"
) -> Iterator[None]:
    """Be the only run over an output within the block; of the lock, and of a folder made for it, nothing is left.

    :param run: what this run is called.
    :param lost: is told, in another thread, if another run has taken the lease nevertheless.
    :param instead: what a person can do who cannot have this folder.
    :raises InputError: another run holds the output, or it cannot be written to.
    """
    folder = Folder(output)
    lease = Lease.of_this_process(run)
    made = _take(folder, lease, instead)
    ended = threading.Event()
    renewal = threading.Thread(target=_renew, args=(folder, lease, ended, lost), name="lease", daemon=True)
    renewal.start()
    try:
        yield
    finally:
        ended.set()
        renewal.join()
        _give_back(folder, lease, made)


def _take(folder: Folder, lease: Lease, instead: str) -> list[Path]:
    """Write the lease where none is held; the folders made for it, the innermost first."""
    made = _missing_folders(folder)
    try:
        if _create(folder, lease):
            return made
        holder = _read(folder)
        if holder is not None and holder.held:
            raise InputError(
                f"{folder.url}: another run writes here: {holder}; wait for its end or {instead} "
                f"(if that process is gone for good, remove {folder.url.rstrip('/')}/{LOCK})"
            )
        folder.write_text(LOCK, _text(lease))
        time.sleep(SETTLED_AFTER)
        now = _read(folder)
    except OSError as error:
        raise InputError(f"{folder.url}: cannot be written to: {error.strerror or error}; {instead}") from error
    if now is None or now.token != lease.token:
        raise InputError(f"{folder.url}: another run took over at the same moment: {now}; wait for its end")
    return made


def _missing_folders(folder: Folder) -> list[Path]:
    if not folder.is_local:
        return []
    path = Path(folder.path("")).absolute()
    return [parent for parent in (path, *path.parents) if not parent.exists()]


def _create(folder: Folder, lease: Lease) -> bool:
    """Write the lease if there is none: in one step on a disk and in stores that can, such as S3."""
    path, text = folder.path(LOCK), _text(lease)
    try:
        if folder.is_local:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _create_whole(path, text)
        else:
            folder.fs.pipe_file(path, text.encode(), mode="create")
    except FileExistsError:
        return False
    except NotImplementedError:  # a store without conditional writes
        if folder.has(LOCK):
            return False
        folder.write_text(LOCK, text)
    except OSError:
        if not folder.has(LOCK):  # else the store's way to say that it exists
            raise
        return False
    return True


def _create_whole(path: str, text: str) -> None:
    """A file that is never there without its text, and only if it is not there yet."""
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"  # swept by the next run if this one is killed here
    try:
        Path(temporary).write_text(text, "utf-8")
        os.link(temporary, path)
    except FileNotFoundError as error:  # swept by the run that holds the output
        raise FileExistsError(path) from error
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "x", encoding="utf-8") as file:  # a file system without hard links
            file.write(text)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)


def _read(folder: Folder) -> Lease | None:
    """The lease that is there; None if none is or it is none of ours."""
    try:
        return Lease(**json.loads(folder.read_text(LOCK) or ""))
    except (ValueError, TypeError):
        return None


def _renew(folder: Folder, lease: Lease, ended: threading.Event, lost: Callable[[str], None]) -> None:
    while not ended.wait(RENEWED_EVERY):
        try:
            now = _read(folder)
            if now is not None and now.token != lease.token:
                lost(f"{folder.url}: another run took over: {now}")
                return
            folder.write_text(LOCK, _text(replace(lease, renewed=time.time())))
        except OSError:  # a store that is away for a moment, a disk that is full: the next time
            continue


def _give_back(folder: Folder, lease: Lease, made: list[Path]) -> None:
    """Take the lease away, and the folders made for it if nothing else came into them."""
    with contextlib.suppress(OSError):
        now = _read(folder)
        if now is not None and now.token == lease.token:
            folder.remove(LOCK)
        for path in made:
            path.rmdir()


def _text(lease: Lease) -> str:
    return json.dumps(asdict(lease), indent=2) + "\n"


def _machine() -> str:
    """What tells whether two processes see each other's ids: the kernel's boot and the process namespace."""
    known: list[Any] = [socket.gethostname()]
    with contextlib.suppress(OSError):
        known = [Path("/proc/sys/kernel/random/boot_id").read_text().strip(), os.readlink("/proc/self/ns/pid")]
    return " ".join(known)


def _born(pid: int) -> float | None:
    """When a process started; None if there is none. An id that was given anew is another process."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
