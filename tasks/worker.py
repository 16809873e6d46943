"""What a worker keeps from task to task: one engine, through which the shards of all its tasks run as one stream.

A worker has several task threads. While the GPU computes one task's last shard, the next task has got past Prefect,
has opened its first shards and put them in line: the GPU does not see where one task ends.
"""

from __future__ import annotations

import contextlib
import gc
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from embedders.base import ImageEmbedder
from embedders.engine import EmbeddedShard, Engine
from embedders.fingerprint import of_value_or_type
from embedders.webdataset import OpenShard
from tasks.shards import digest

PATIENCE = 1.0
"""Seconds that batches in flight wait for the next shard while one is being opened; then they are finished."""

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that computes in Python makes way for the one that feeds the GPU; 0.005 is Python's."""

GARBAGE = (50_000, 20, 100)
"""In place of Python's (700, 10, 10): new objects before the youngest are looked through, and how often before older
ones are."""

TICK = 0.005


@dataclass(frozen=True)
class _Fed:
    """A task has put all its shards in line: so many."""

    shards: int


@dataclass(eq=False)
class _Task:
    """A caller of `SharedEngine.embed`: what comes of its shards, and whether it has left."""

    results: queue.Queue[EmbeddedShard | BaseException | _Fed] = field(default_factory=lambda: queue.Queue(2))
    left: bool = False

    def deliver(self, result: EmbeddedShard | BaseException | _Fed) -> None:
        """Hand something over; wait while the caller is busy with what came before, as with a slow disk."""
        while not self.left:
            with contextlib.suppress(queue.Full):
                self.results.put(result, timeout=0.1)
                return


class SharedEngine:
    """An engine in a thread of its own. Any number of threads may call `embed` at the same time."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """Wait for `make`, which runs in the engine's thread, and raise what it raises."""
        self.failure: BaseException | None = None
        self._line: queue.Queue[tuple[OpenShard, _Task] | None] = queue.Queue(1)
        self._opening = 0  # tasks that still have shards to put in line
        self._lock = threading.Lock()
        made: queue.Queue[Engine | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(make, made), name="engine", daemon=True)
        self._thread.start()
        engine = made.get()
        if isinstance(engine, BaseException):
            raise engine
        self.embedder: ImageEmbedder = engine.embedder

    def embed(self, shards: Iterable[OpenShard]) -> Iterator[EmbeddedShard]:
        """Embed a stream of shards, which another thread takes one ahead. Each is yielded once it is done, in no
        promised order.

        :raises Exception: what `shards` or the engine raised. The engine is of no use after its own; see `failure`.
        """
        task = _Task()
        feeder = threading.Thread(target=self._feed, args=(shards, task), name="open", daemon=True)
        feeder.start()
        done, fed = 0, None
        try:
            while done != fed:
                result = task.results.get()
                if isinstance(result, BaseException):
                    raise result
                if isinstance(result, _Fed):
                    fed = result.shards
                else:
                    done += 1
                    yield result
        finally:
            task.left = True
            feeder.join()

    def close(self) -> None:
        """End the thread and free the engine. Nobody may use it any more."""
        if self._thread.is_alive():
            self._line.put(None)
        self._thread.join()
        gc.unfreeze()  # a compiled model refers to itself; its memory is wanted for the next one
        gc.collect()

    def _feed(self, shards: Iterable[OpenShard], task: _Task) -> None:
        """Put a task's shards in line."""
        with self._lock:
            self._opening += 1
        count = 0
        try:
            for shard in shards:
                if not self._enter(shard, task):
                    return
                count += 1
        except BaseException as error:
            task.deliver(error)
        finally:
            with self._lock:
                self._opening -= 1
        task.deliver(_Fed(count))

    def _enter(self, shard: OpenShard, task: _Task) -> bool:
        """Wait for a place in the line; False if the task has left or the engine has failed meanwhile."""
        entered = False
        while not (entered or task.left or self.failure):
            with contextlib.suppress(queue.Full):
                self._line.put((shard, task), timeout=0.1)
                entered = True
        if self.failure:  # nobody may have looked at the line since
            task.deliver(self.failure)
            return False
        return entered

    def _run(self, make: Callable[[], Engine], made: queue.Queue[Engine | BaseException]) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        try:
            engine = make()
        except BaseException as error:
            made.put(error)
            return
        collect_garbage_seldom()
        made.put(engine)
        while (first := self._line.get()) is not None:
            owners: dict[int, _Task] = {}
            try:
                for embedded in engine.embed(self._stream(first, owners)):
                    owners.pop(id(embedded.shard)).deliver(embedded)
            except BaseException as error:
                self.failure = error
                for task in {*owners.values(), *self._waiting()}:
                    task.deliver(error)
                return

    def _stream(self, first: tuple[OpenShard, _Task], owners: dict[int, _Task]) -> Iterator[OpenShard]:
        """The shards in line, until there is none and none to be expected soon."""
        coming: tuple[OpenShard, _Task] | None = first
        while coming is not None:
            shard, task = coming
            owners[id(shard)] = task
            yield shard
            coming = self._next()

    def _next(self) -> tuple[OpenShard, _Task] | None:
        until = time.monotonic() + PATIENCE
        while True:
            opening = self._opening  # read before the line: a shard may be put there in between
            with contextlib.suppress(queue.Empty):
                return self._line.get(timeout=TICK if opening else 0)
            if not opening or time.monotonic() > until:
                return None

    def _waiting(self) -> Iterator[_Task]:
        """Take out of line whoever is there."""
        with contextlib.suppress(queue.Empty):
            while (item := self._line.get_nowait()) is not None:
                yield item[1]


def collect_garbage_seldom() -> None:
    """Leave what is there now out of garbage collections, and have few of them.

    Looking through the half million objects that torch, timm and Prefect are made of stops every thread for a quarter
    of a second, in which a GPU would have embedded 6,000 images; a new shard's samples give occasion to do so.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)


@dataclass
class _Kept:
    """The engine of this process, what it is for, and how many tasks use it now."""

    name: str = ""
    engine: SharedEngine | None = None
    users: int = 0


_kept = _Kept()
_changed = threading.Condition()


@contextlib.contextmanager
def shared_engine(embedder: ImageEmbedder, fingerprint: str, device: str, images: int = 0) -> Iterator[SharedEngine]:
    """This process's engine for an embedder: made once, kept until another one is asked for and nobody uses it.

    :param fingerprint: the digest of the embedder's fingerprint.
    :param images: how many this worker will probably see in all; 0 if that is not known.
    """
    # Every task brings a copy of its own: copies that would load the same model must have one name.
    public = {k: of_value_or_type(v) for k, v in vars(embedder).items() if not k.startswith("_") and k != "weights"}
    name = digest([fingerprint, public, device])
    with _changed:
        # A worker's memory has room for one model.
        _changed.wait_for(lambda: not _kept.users or (_kept.name == name and _usable(_kept.engine)))
        if _kept.name != name or not _usable(_kept.engine):
            if _kept.engine is not None:
                _kept.engine.close()
            _kept.engine, _kept.name = None, name

            def make() -> Engine:
                embedder.expect(images)
                return Engine(embedder, device)

            _kept.engine = SharedEngine(make)
        engine = _kept.engine
        assert engine is not None
        _kept.users += 1
    try:
        yield engine
    finally:
        with _changed:
            _kept.users -= 1
            _changed.notify_all()


def _usable(engine: SharedEngine | None) -> bool:
    return engine is not None and engine.failure is None
