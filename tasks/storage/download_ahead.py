"""Download the tars of a store ahead of their use, in the order of their shards. Local tars stay where they are."""

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

from tasks.shards import Shard, check_as_listed, replaced
from tasks.storage.signed_download import Replaced, signed_file, write_at
from tasks.storage.temporary_space import scratch

SPACE = 8 << 30
"""Bytes that downloaded tars may take on a worker's disk by default."""

DOWNLOADS = 4
"""Tars downloaded at once."""

STREAMS = 32
"""Requests at once. A store serves each at some 50 to 100 MB/s, and a node of fast GPUs needs gigabytes per second."""

POLL_SECONDS = 1.0
"""Seconds between two looks at the progress of a download."""

PART = 8 << 20
"""Bytes per request. Up to `STREAMS` of them are in memory at once."""


class _Room:
    """Count the bytes that tars take on disk, over all tasks of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.taken = 0

    def take(self, size: int, space: float) -> bool:
        """Reserve `size` bytes unless that would make more than `space`; return whether it did."""
        with self._lock:
            fits = self.taken + size <= space
            self.taken += size if fits else 0
            return fits

    def give_back(self, size: int) -> None:
        """Release reserved bytes."""
        with self._lock:
            self.taken -= size


_room = _Room()


@dataclass(frozen=True)
class StagedTar:
    """A tar that is, or soon will be, on the local disk. Whoever takes it from the stage must release it."""

    shard: Shard
    place: str
    coming: Future[str]
    stage: Stage

    def path(self, got_on: Callable[[], None] = lambda: None) -> str:
        """Wait until the tar is complete and verified, and return its path.

        Args:
            got_on: Called from time to time while bytes arrive.

        Raises:
            OSError: The download failed, or the disk is full.
            ShardReplaced: It is no longer the tar that the run was planned for.
        """
        arrived = 0
        while wait([self.coming], POLL_SECONDS).not_done:
            before, arrived = arrived, _bytes_on_disk(self.place)
            if arrived > before:
                got_on()
        return self.coming.result()

    def release(self) -> None:
        """Remove a downloaded tar, to make room for the next one."""
        self.stage.release(self)


class Stage:
    """Iterate over the tars of a sequence of shards; download ahead within a limit of disk space.

    All tars of the process that are not yet released take at most `space` bytes, with one exception: a tar that is
    asked for is downloaded in any case, because the caller may need it to finish the ones before.

    Example:
        >>> with Stage(shards) as stage:
        ...     for tar in stage:
        ...         read(tar.path())
        ...         tar.release()
    """

    def __init__(self, shards: Iterable[Shard], space: int = SPACE) -> None:
        """Take the shards in their order, and the bytes that tars may take on disk."""
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
        """Stop all downloads and remove the downloaded tars."""
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
        """Remove a downloaded tar, and start the downloads that wait for its room."""
        if tar.shard.source.is_local:
            return
        with contextlib.suppress(OSError):  # a failed download has removed its file
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
        """Start as many downloads as there is room for."""
        while not self._stopped.is_set() and len(self._staged) < 2 * DOWNLOADS:
            shard = self._peek()
            if shard is None or not self._start(shard, self._space):
                return

    def _start(self, shard: Shard, space: float) -> bool:
        """Start the download of the next shard if there is room for it; return whether it did."""
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
            if not self._fetch(shard, path):
                check_as_listed(shard)
            _check_size(shard, path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                os.unlink(path)
            if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                full = f"{os.path.dirname(folder)} is full; set TMPDIR to a larger disk or give less --staging-space"
                raise OSError(errno.ENOSPC, f"{shard.tar}: {full}") from error
            raise
        return path

    def _fetch(self, shard: Shard, path: str) -> bool:
        """Download a tar to a path, with many requests at once if the store's client can.

        Returns:
            Whether the store has proven with each request that it is the tar that was listed.

        Raises:
            ShardReplaced: It is not.
        """
        source = shard.source
        if not source.reads_ranges:
            source.download(shard.tar, path)
            return False
        signed = signed_file(source, shard.tar, shard.tar_etag)
        with open(path, "wb") as file:
            file.truncate(shard.tar_bytes)

            def part(start: int) -> bool:
                nonlocal signed
                stop, way = min(start + PART, shard.tar_bytes), signed
                if self._stopped.is_set():
                    return False
                if way is not None and way.copy(start, stop, file.fileno()):
                    return way.etag is not None
                signed = None  # the rest of this tar comes by the client too
                write_at(file.fileno(), _read_whole(shard, start, stop), start)
                return False

            parts = [self._streams.submit(part, start) for start in range(0, shard.tar_bytes, PART)]
            try:
                proven = [done.result() for done in parts]
                return all(proven)
            except Replaced:
                raise replaced(shard) from None
            finally:
                for waiting in parts:  # close the file only after the last write
                    if not waiting.cancel():
                        waiting.exception()


def _read_whole(shard: Shard, start: int, stop: int) -> bytes:
    """Return a part of a tar by the store's client.

    Raises:
        OSError: Bytes are missing.
    """
    data = shard.source.read_range(shard.tar, start, stop)
    if len(data) != stop - start:
        raise OSError(f"{shard.tar}: only {len(data):,} of {stop - start:,} bytes arrived at offset {start:,}")
    return data


def _bytes_on_disk(path: str) -> int:
    """Return how many bytes of a file are on the disk, whatever its size says."""
    try:
        return os.stat(path).st_blocks * 512
    except OSError:
        return 0


def _check_size(shard: Shard, path: str) -> None:
    """Prove that all bytes of a downloaded tar are there.

    Raises:
        OSError: Bytes are missing.
    """
    size = os.path.getsize(path)
    if size != shard.tar_bytes:
        raise OSError(f"{shard.dataset}/{shard.tar}: only {size:,} of {shard.tar_bytes:,} bytes arrived")
