"""Refuse a second run over one output: a lease in the output says which run writes there, and is renewed meanwhile.

A run takes over a lease that nobody can hold any more: if its process is gone from this machine or, for a process of
another machine, if it was not renewed for some time.
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

from embedders.errors import InputError
from tasks.storage.folder import Folder

LOCK = "run.lock"
RENEWED_EVERY = 15.0
"""Seconds between two renewals of a lease."""

EXPIRED_AFTER = 120.0
"""Seconds without a renewal after which the run of another machine counts as dead."""

SETTLED_AFTER = 0.5
"""Seconds after which a run reads a lease that it took over again: if two runs took it, the last one has it."""


@dataclass(frozen=True)
class Lease:
    """Which run writes to an output. Times are in seconds since 1970."""

    token: str
    host: str
    machine: str
    """The kernel and the process namespace, within which process ids are comparable."""
    pid: int
    born: float
    """When the process started."""
    run: str
    started: float
    renewed: float

    @classmethod
    def of_this_process(cls, run: str) -> Lease:
        """Return a new lease for a run of this process."""
        now, pid = time.time(), os.getpid()
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _born(pid) or 0.0, run, now, now)

    @property
    def held(self) -> bool:
        """Return whether its run may still be writing."""
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
    """Be the only run over an output within the block. Afterwards the lock is gone, and so is a folder made for it.

    Args:
        output: Folder or fsspec URL of the output.
        run: The run's name, which another run's error will show.
        lost: Called with a line, in another thread, if another run has taken the lease all the same.
        instead: What the user can do if this folder is not available.

    Raises:
        InputError: Another run holds the output, or it cannot be written to.

    Example:
        >>> with only_run("out", "embed laion", lost=print):
        ...     write_to("out")
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
    """Write the lease unless another run holds one.

    Returns:
        The folders made for it, the innermost first.

    Raises:
        InputError: Another run holds the output, or it cannot be written to.
    """
    made = _missing_folders(folder)
    try:
        if _create(folder, lease):
            return made
        holder = _read(folder)
        if holder is not None and holder.held:
            raise InputError(
                f"{folder.url}: another run writes here: {holder}; wait until it ends or {instead} "
                f"(if that process is gone for good, remove {folder.url.rstrip('/')}/{LOCK})"
            )
        folder.write_text(LOCK, _text(lease))
        time.sleep(SETTLED_AFTER)
        now = _read(folder)
    except OSError as error:
        raise InputError(f"{folder.url}: cannot be written to: {error.strerror or error}; {instead}") from error
    if now is None or now.token != lease.token:
        raise InputError(f"{folder.url}: another run took over at the same moment: {now}; wait until it ends")
    return made


def _missing_folders(folder: Folder) -> list[Path]:
    if not folder.is_local:
        return []
    path = Path(folder.path("")).absolute()
    return [parent for parent in (path, *path.parents) if not parent.exists()]


def _create(folder: Folder, lease: Lease) -> bool:
    """Write the lease if there is none, in one step on a disk and in stores that can do so, such as S3.

    Returns:
        Whether it was written.
    """
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
        if not folder.has(LOCK):  # otherwise this is how the store says that it exists
            raise
        return False
    return True


def _create_whole(path: str, text: str) -> None:
    """Create a file together with its content in one step.

    Raises:
        FileExistsError: There is one already.
    """
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
    """Return the lease in the folder; None if there is none, or a file that is no lease."""
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
        except OSError:  # a store that does not answer, or a full disk: try again at the next renewal
            continue


def _give_back(folder: Folder, lease: Lease, made: list[Path]) -> None:
    """Remove the lease, and the folders made for it if they are empty."""
    with contextlib.suppress(OSError):
        now = _read(folder)
        if now is not None and now.token == lease.token:
            folder.remove(LOCK)
        for path in made:
            path.rmdir()


def _text(lease: Lease) -> str:
    return json.dumps(asdict(lease), indent=2) + "\n"


def _machine() -> str:
    """Return a text that is the same for processes that see each other's ids: the boot id and the process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname()


def _born(pid: int) -> float | None:
    """Return when a process started; None if there is none. A reused process id has another start."""
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None
