"""Refuse a second run over one output: leases in the output say which runs write there, and are renewed meanwhile.

A whole run is alone. Parts of one division (`--part 3/16`) run side by side, each with a lease of its own, and write
the output's account in turn. A run takes over a lease that nobody can hold any more: if its process is gone from this
machine or, for a process of another machine, if it was not renewed for some time.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

from embedders.errors import InputError
from tasks.run_part import RunPart
from tasks.storage import conditional
from tasks.storage.conditional import ChangedMeanwhile
from tasks.storage.folder import Folder

T = TypeVar("T")
LOCKS = "run.locks"
"""The folder with the leases: one for all, so that a network file system that keeps listings reads it again after our
own lease was written."""

LOCK = f"{LOCKS}/whole.lock"
"""The lease of a whole run; those of parts are called 3-of-16.lock."""

TURN = f"{LOCKS}/finish.lease"
"""The lease of the part that writes the output's account."""

RENEWED_EVERY = 15.0
"""Seconds between two renewals of a lease."""

EXPIRED_AFTER = 120.0
"""Seconds without a renewal after which the run of another machine counts as dead."""

SETTLED_AFTER = 0.5
"""Seconds after which a run reads a lease that it took over again: if two runs took it, the last one has it."""

TURN_ASKED_EVERY = 1.0
"""Seconds, more or less by half, until the second attempt to have one's turn; up to ten times more until later ones."""


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
    part: str = ""
    """Which part of the run it is, such as 3/16; empty for a whole run."""

    @classmethod
    def of_this_process(cls, run: str, part: RunPart | None = None) -> Lease:
        """Return a new lease for a run of this process, or for a part of it."""
        now, pid = time.time(), os.getpid()
        told = "" if part is None else str(part)
        return cls(uuid.uuid4().hex, socket.gethostname(), _machine(), pid, _born(pid) or 0.0, run, now, now, told)

    @property
    def held(self) -> bool:
        """Return whether its run may still be writing."""
        if self.machine == _machine():
            born = _born(self.pid)  # moves a little when the clock is set
            return born is not None and abs(born - self.born) < 60
        return time.time() - self.renewed < EXPIRED_AFTER

    def __str__(self) -> str:
        since = datetime.fromtimestamp(self.started, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        part = f" (part {self.part})" if self.part else ""
        return f"{self.run!r}{part}, process {self.pid} on {self.host}, since {since}"


@contextlib.contextmanager
def only_run(
    output: str,
    run: str,
    lost: Callable[[str], None],
    instead: str = "give another --output",
    part: RunPart | None = None,
    settings: str = "",
) -> Iterator[Callable[[], bool]]:
    """Be the only run over an output within the block, beside other parts of the same division if it is a part.

    Afterwards the lock is gone, and so is a folder made for it.

    Args:
        output: Folder or fsspec URL of the output.
        run: The run's name, which another run's error will show.
        lost: Called with a line, in another thread, if another run has taken the lease all the same.
        instead: What the user can do if this folder is not available.
        part: Which part of a run this is; None for a whole one.
        settings: A short text that parts must have in common to run side by side; letters and digits.

    Yields:
        A function that tells whether no other part runs at the moment.

    Raises:
        InputError: Another run holds the output, or it cannot be written to.

    Example:
        >>> with only_run("out", "embed laion", lost=print):
        ...     write_to("out")
    """
    folder, lease = Folder(output), Lease.of_this_process(run, part)
    file = LOCK if part is None else f"{LOCKS}/{part.number}-of-{part.count}{settings and '-'}{settings}.lock"
    made = _missing_folders(folder)
    try:
        try:
            holder = _take(folder, file, lease) or _in_the_way(folder, file, lease)
        except OSError as error:
            raise InputError(f"{folder.url}: cannot be written to: {error.strerror or error}; {instead}") from error
        if holder is not None:
            raise _refusal(folder, file, *holder, instead)
        with _renewed(folder, file, lease, lost):
            yield lambda: part is None or not any(_held(folder, _others(folder, file)))
    finally:
        _give_back(folder, file, lease, made)


def in_turn(
    output: str, run: str, write: Callable[[], T], read: Callable[[], T] | None, waiting: Callable[[str], None]
) -> T:
    """Write the account of an output while no other part of a run does so, unless another part did it for this one.

    So the account that is written last is not older than any other, and hundreds of parts that end at the same time do
    not wait for each other: each leaves a ticket before it waits, and who writes takes away the tickets that were there
    before it began to read. If this process stood still for so long that another one took its turn, it takes another.

    Args:
        output: Folder or fsspec URL of the output. The files of this part must be complete.
        run: The run's name.
        write: Reads what the output holds, writes the account of it and returns it.
        read: Does the same without writing. Called if another part has written an account that knows this one's files;
            None if this part has to say something itself.
        waiting: Called with a line if another part takes its time.
    """
    folder, ticket = Folder(output), f"{LOCKS}/{uuid.uuid4().hex}.ticket"
    try:
        while True:
            if read is not None:
                conditional.create(folder, ticket, f"{run}\n")
            lease = _wait_for_turn(folder, run, None if read is None else ticket, waiting)
            if lease is None:
                break
            result, ours = _one_turn(folder, lease, write)
            if ours:
                return result
    except OSError:  # so the account cannot be written either, and `write` says so
        return write()
    finally:
        with contextlib.suppress(OSError):
            folder.remove(ticket)
        _remove_folder(folder)
    assert read is not None  # there was a ticket
    return read()


def _wait_for_turn(folder: Folder, run: str, ticket: str | None, waiting: Callable[[str], None]) -> Lease | None:
    """Return the lease of this part's turn; None if another part has taken its ticket away."""
    pause, told = TURN_ASKED_EVERY, False
    while ticket is None or folder.has(ticket):
        lease = Lease.of_this_process(run)
        holder = _take(folder, TURN, lease)
        if holder is None:
            return lease
        if not told and pause > 3 * TURN_ASKED_EVERY:
            waiting(f"waiting until another part has written the account: {holder[1]}")
            told = True
        time.sleep(pause * random.uniform(0.5, 1.5))
        pause = min(pause * 1.3, 10 * TURN_ASKED_EVERY)
    return None


def _one_turn(folder: Folder, lease: Lease, write: Callable[[], T]) -> tuple[T, bool]:
    """Write the account; return it, and whether the turn was ours all the time."""
    lost = threading.Event()
    try:
        with _renewed(folder, TURN, lease, lambda why: lost.set()):
            tickets = [f"{LOCKS}/{file.name}" for file in Folder(folder.place(LOCKS)).list(".ticket")]
            result = write()
            ours = _holds(folder, TURN, lease) and not lost.is_set()
        for ticket in tickets if ours else ():
            with contextlib.suppress(OSError):  # its part writes an account of its own then
                folder.remove(ticket)
        return result, ours
    finally:
        _give_back(folder, TURN, lease, [])


Holder = tuple[str, Lease]
"""The name of a lease's file, and the lease."""


def _take(folder: Folder, file: str, lease: Lease) -> Holder | None:
    """Write a lease unless another run holds it.

    Returns:
        None, or the other run's lease.

    Raises:
        OSError: It cannot be written.
    """
    for _ in range(100):
        if conditional.create(folder, file, _text(lease)):
            return None
        version, text = conditional.version_of(folder, file), folder.read_text(file)
        if text is None:  # given back by now
            continue
        holder = _parse(text)
        if holder is not None and holder.token == lease.token:  # ours: the answer was lost, and the client asked again
            return None
        if holder is not None and holder.held:
            return file, holder
        with contextlib.suppress(ChangedMeanwhile):
            conditional.replace(folder, file, _text(lease), version)
        time.sleep(SETTLED_AFTER)
        if _holds(folder, file, lease):
            return None
    raise OSError(errno.EBUSY, f"{file} changes all the time")


def _in_the_way(folder: Folder, file: str, lease: Lease) -> Holder | None:
    """Return a lease of another kind that excludes this one: a whole run's, or that of a part of another division.

    Each run writes its lease before it looks at the others', so of two that begin at once at least one sees the other.
    If both do, the one with the smaller token looks again, so that not both are refused. Leases of runs that are gone
    are removed.
    """
    others = [name for name in _others(folder, file) if file == LOCK or _division(name) != _division(file)]
    for name, other in _held(folder, others, remove=True):
        if lease.token < other.token:
            time.sleep(SETTLED_AFTER)
        if lease.token > other.token or _holds(folder, name, other):
            return name, other
    return None


def _others(folder: Folder, file: str) -> list[str]:
    """Return the names of all leases of runs but one."""
    names = [f"{LOCKS}/{found.name}" for found in Folder(folder.place(LOCKS)).list(".lock")]
    return [name for name in names if name != file]


def _division(file: str) -> str:
    """Return what the leases of parts have in common that may run side by side: "16-1f3b.lock"; "" for a whole run."""
    return file.partition("-of-")[2]


def _held(folder: Folder, names: list[str], *, remove: bool = False) -> Iterator[Holder]:
    """Yield those of some leases that are held.

    Args:
        folder: The output.
        names: Of the leases' files.
        remove: Whether to remove the others. Only for leases whose runs would see ours: one may be taken over just now.
    """
    for name in names:
        text = folder.read_text(name)
        lease = _parse(text or "")
        if lease is not None and lease.held:
            yield name, lease
        elif text is not None and remove:
            folder.remove(name)


def _refusal(folder: Folder, file: str, name: str, holder: Lease, instead: str) -> InputError:
    what = "another run writes here"
    if file != LOCK and name == file:
        what = "this part runs already"
    elif file != LOCK and name != LOCK:
        what = "parts of another division, or with other settings, write here"
    return InputError(
        f"{folder.url}: {what}: {holder}; wait until it ends or {instead} "
        f"(if that process is gone for good, remove {folder.place(name)})"
    )


def _missing_folders(folder: Folder) -> list[Path]:
    if not folder.is_local:
        return []
    path = Path(folder.path("")).absolute()
    return [parent for parent in (path, *path.parents) if not parent.exists()]


def _holds(folder: Folder, file: str, lease: Lease) -> bool:
    """Return whether a file still has this lease."""
    found = _parse(folder.read_text(file) or "")
    return found is not None and found.token == lease.token


@contextlib.contextmanager
def _renewed(folder: Folder, file: str, lease: Lease, lost: Callable[[str], None]) -> Iterator[None]:
    """Renew a lease within the block; tell if it is lost."""
    ended = threading.Event()
    thread = threading.Thread(target=_renew, args=(folder, file, lease, ended, lost), name="lease", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _renew(folder: Folder, file: str, lease: Lease, ended: threading.Event, lost: Callable[[str], None]) -> None:
    version: str | None = None
    while not ended.wait(RENEWED_EVERY):
        try:
            there = conditional.version_of(folder, file)
            if there is None or there != version:
                found = _parse(folder.read_text(file) or "")
                if found is not None and found.token != lease.token:
                    lost(f"{folder.url}: another run took over: {found}")
                    return
            if time.time() - lease.renewed > EXPIRED_AFTER and (other := _began_meanwhile(folder, file, lease)):
                lost(f"{folder.url}: this process stood still, and another run began: {other}")
                return
            renewed = replace(lease, renewed=time.time())
            version, lease = conditional.replace(folder, file, _text(renewed), there), renewed
        except (OSError, ChangedMeanwhile):  # a store that does not answer, a full disk: try again next time
            continue


def _began_meanwhile(folder: Folder, file: str, lease: Lease) -> str:
    """Return which run may have begun while this one did not renew its lease; empty if none has."""
    if file == TURN:
        return "perhaps one that has ended"
    holder = _in_the_way(folder, file, lease)
    return "" if holder is None else str(holder[1])


def _give_back(folder: Folder, file: str, lease: Lease, made: list[Path]) -> None:
    """Remove a lease, and the folders made for it if they are empty."""
    with contextlib.suppress(OSError):
        if _holds(folder, file, lease):
            folder.remove(file)
    _remove_folder(folder)
    with contextlib.suppress(OSError):
        for path in made:
            path.rmdir()


def _remove_folder(folder: Folder) -> None:
    """Remove the folder of the parts' leases if it is empty; in stores there are no empty folders."""
    if folder.is_local:
        with contextlib.suppress(OSError):
            Path(folder.path(LOCKS)).rmdir()


def _text(lease: Lease) -> str:
    return json.dumps(asdict(lease), indent=2) + "\n"


def _parse(text: str) -> Lease | None:
    """Return the lease that a file holds; None if it holds none."""
    try:
        return Lease(**json.loads(text))
    except (ValueError, TypeError):
        return None


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
