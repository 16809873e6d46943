"""Tars on the local disk, in the order of their shards: those of a store are downloaded ahead of who needs them."""

from __future__ import annotations

import contextlib
import errno
import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tasks.shards import Shard, check_unchanged
from tasks.storage.temporary_space import scratch

SPACE = 8 << 30
"""Bytes on a worker's disk that tars of a store take by default."""

DOWNLOADS = 4
"""Tars downloaded at once."""

STREAMS = 16
"""Requests at once: a store gives each some 50 to 100 MB/s, a GPU wants over 1 GB/s."""

POLL_SECONDS = 1.0
"""How often it is looked whether a download gets on."""

PART = 8 << 20
"""Bytes of a request. `STREAMS` of them are in memory at once."""


class _Room:
    """Bytes that the tars of this process take; a worker runs several tasks at a time."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    def take(self, size: int, space: float) -> bool:
        """Take room, unless more than `space` would be taken then."""
        with self._lock:
            fits = self.taken + size <= space
            self.taken += size if fits else 0
            return fits

    def give_back(self, size: int) -> None:
        with self._lock:
            self.taken -= size


_room = _Room()


@dataclass(frozen=True)
class StagedTar:
    """A tar on its way to the local disk. Whoever took it from the stage releases it."""

    shard: Shard
    place: str
    coming: Future[str]
    stage: Stage

    def path(self, got_on: Callable[[], None] = lambda: None) -> str:
        """Its path, once it is there, whole and verified.

        :param got_on: called now and then while bytes of it arrive.
        :raises OSError: the store did not give it, or the disk is full.
        :raises ShardReplaced: it is no longer the tar that the run was planned for.
        """
        arrived = 0
        while wait([self.coming], POLL_SECONDS).not_done:
            before, arrived = arrived, _bytes_on_disk(self.place)
            if arrived > before:
                got_on()
        return self.coming.result()

    def release(self) -> None:
        """Remove a downloaded tar, which makes room for the next."""
        self.stage.release(self)


class Stage:
    """The tars of a sequence of shards, as an iterator that downloads ahead within a bound.

    What is downloaded ahead and what is not yet released, by all stages of the process, takes at most `space` bytes,
    with one exception: a tar that is asked for is fetched in any case, since who asks may need it to be done with the
    ones before.
    """

    def __init__(self, shards: Iterable[Shard], space: int = SPACE) -> None:
        self._shards = iter(shards)
        self._space = space
        self._next: Shard | None = None
        self._staged: deque[StagedTar] = deque()
        self._taken = 0
        self._lock = threading.RLock()
        self._stopped = threading.Event()
        self._ends = contextlib.ExitStack()
        self._folder: str | None = None
        self._count = 0

    def __enter__(self) -> Self:
        self._downloads = self._ends.enter_context(ThreadPoolExecutor(DOWNLOADS, "download"))
        self._streams = self._ends.enter_context(ThreadPoolExecutor(STREAMS, "stream"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop what is on its way and remove what is there."""
        self._stopped.set()
        for executor in (self._downloads, self._streams):
            executor.shutdown(cancel_futures=True)
        self._ends.close()
        with self._lock:
            _room.give_back(self._taken)
            self._taken = 0

    def __iter__(self) -> Iterator[StagedTar]:
        return self

    def __next__(self) -> StagedTar:
        with self._lock:
            self._fill()
            if not self._staged:
                shard = self._peek()
                if shard is None:
                    raise StopIteration
                self._start(shard, math.inf)
            tar = self._staged.popleft()
            self._fill()
            return tar

    def release(self, tar: StagedTar) -> None:
        """Remove a tar that was downloaded, and go on with what waits for its room."""
        if tar.shard.source.is_local:
            return
        with contextlib.suppress(OSError):  # one that failed removed itself
            os.unlink(tar.place)
        with self._lock:
            if self._stopped.is_set():
                return
            _room.give_back(tar.shard.tar_bytes)
            self._taken -= tar.shard.tar_bytes
            self._fill()

    def _peek(self) -> Shard | None:
        if self._next is None:
            self._next = next(self._shards, None)
        return self._next

    def _fill(self) -> None:
        """Start the downloads there is room for."""
        while not self._stopped.is_set() and len(self._staged) < 2 * DOWNLOADS:
            shard = self._peek()
            if shard is None or not self._start(shard, self._space):
                return

    def _start(self, shard: Shard, space: float) -> bool:
        """Start the download of the next shard, if there is room for it."""
        coming: Future[str]
        if shard.source.is_local:
            place, coming = shard.source.path(shard.tar), Future()
            coming.set_result(place)
        elif not _room.take(shard.tar_bytes, space):
            return False
        else:
            self._taken += shard.tar_bytes
            self._folder = self._folder or self._ends.enter_context(scratch())
            self._count += 1
            place = os.path.join(self._folder, str(self._count), os.path.basename(shard.tar))
            coming = self._downloads.submit(self._download, shard, place)
        self._next = None
        self._staged.append(StagedTar(shard, place, coming, self))
        return True

    def _download(self, shard: Shard, path: str) -> str:
        folder = os.path.dirname(path)
        try:
            os.mkdir(folder)
            self._fetch(shard, path)
            _verify(shard, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                place = f"{os.path.dirname(folder)} is full; set TMPDIR to a larger disk or give less --staging-space"
                raise OSError(errno.ENOSPC, f"{shard.tar}: {place}") from error
            raise
        return path

    def _fetch(self, shard: Shard, path: str) -> None:
        """Write a tar's bytes to a path, by many requests at once where the store's client allows it."""
        source = shard.source
        if not source.reads_ranges:
            source.download(shard.tar, path)
            return
        with open(path, "wb") as file:
            file.truncate(shard.tar_bytes)

            def part(start: int) -> None:
                if not self._stopped.is_set():
                    stop = min(start + PART, shard.tar_bytes)
                    data = source.read_range(shard.tar, start, stop)
                    if len(data) != stop - start:
                        raise OSError(f"{shard.tar}: {len(data):,} bytes came of {stop - start:,} at {start:,}")
                    _write_at(file.fileno(), data, start)

            parts = [self._streams.submit(part, start) for start in range(0, shard.tar_bytes, PART)]
            try:
                for done in parts:
                    done.result()
            finally:
                for waiting in parts:  # the file is closed only when nobody writes to it
                    if not waiting.cancel():
                        waiting.exception()


def _bytes_on_disk(path: str) -> int:
    """Return the bytes of a file that were written so far, whatever size it was given before."""
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _write_at(handle: int, data: bytes, at: int) -> None:
    """Write all of it: a system call may write less."""
    view = memoryview(data)
    while view:
        written = os.pwrite(handle, view, at)
        view, at = view[written:], at + written


def _verify(shard: Shard, path: str) -> None:
    """Prove that a downloaded tar is whole, and still what the store holds and the run was planned for."""
    check_unchanged(shard)
    size = os.path.getsize(path)
    if size != shard.tar_bytes:
        raise OSError(f"{shard.dataset}/{shard.tar}: {size:,} bytes came of {shard.tar_bytes:,}")
