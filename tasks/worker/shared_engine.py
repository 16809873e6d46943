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
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import astuple, dataclass, field
from typing import Any, Generic, TypeVar

from embedders.base import ImageEmbedder
from embedders.decision import Decision
from embedders.engine import EndOfShard, Engine, Rows
from embedders.errors import drop_locals
from embedders.fingerprint import digest, of_value_or_type
from embedders.recipe import Recipe
from embedders.session import Session
from embedders.shared_loading import decide_together, open_together, take_decision, use_cores
from embedders.webdataset import OpenShard
from tasks.worker.cores import share_of_cores
from tasks.worker.hang_detection import watch

T = TypeVar("T")

PATIENCE = 1.0
"""Seconds that batches in flight wait for the next shard while one is being opened; then they are finished."""

SWITCH_INTERVAL = 0.0005
"""Seconds after which a thread that computes in Python makes way for the one that feeds the GPU; 0.005 is Python's."""

GARBAGE = (50_000, 20, 100)
"""In place of Python's (700, 10, 10): new objects before the youngest are looked through, and how often before older
ones are."""

TICK = 0.005

CORES_KNOWN_FOR = 60.0
"""Seconds after which an engine asks again how many cores are its own."""

TURN = 30.0
"""Seconds for which tasks go on to get the engine that is there while one waits for another: loading takes seconds."""


@dataclass(frozen=True)
class _Fed:
    """A task has put all its shards in line: so many."""

    shards: int


RESULT_BYTES = 256 << 20
"""Bytes of rows that wait for a task to write them, before the engine waits: a disk may be slow for a while."""


class _Task:
    """A caller of `SharedEngine.embed`: what comes of its shards, and whether it has left."""

    def __init__(self) -> None:
        self.left = False
        self._results: deque[Result | BaseException | _Fed] = deque()
        self._bytes = 0
        self._changed = threading.Condition()

    def deliver(self, result: Result | BaseException | _Fed) -> None:
        """Hand something over; wait while the caller has too much of what came before, as with a slow disk."""
        with self._changed:
            while self._bytes >= RESULT_BYTES and not self.left:
                self._changed.wait(0.1)
            if self.left:  # nobody takes it
                return
            self._results.append(result)
            self._bytes += _bytes_of(result)
            self._changed.notify_all()

    def next(self) -> Result | BaseException | _Fed:
        """Wait for what comes next."""
        with self._changed:
            while not self._results:
                self._changed.wait()
            result = self._results.popleft()
            self._bytes -= _bytes_of(result)
            self._changed.notify_all()
        return result

    def leave(self) -> None:
        """Want nothing more."""
        with self._changed:
            self.left = True
            self._results.clear()
            self._bytes = 0
            self._changed.notify_all()


Result = Rows | EndOfShard


class _Call(Generic[T]):
    """A function that waits for the engine's thread to call it."""

    def __init__(self, function: Callable[[Engine], T]) -> None:
        self.result: Future[T] = Future()
        self._function = function

    def answer(self, engine: Engine) -> None:
        """Call it; what it raises is its caller's."""
        try:
            self.result.set_result(self._function(engine))
        except BaseException as error:
            self.result.set_exception(error)


def _bytes_of(result: Result | BaseException | _Fed) -> int:
    return result.nbytes if isinstance(result, Rows) else 0


class SharedEngine:
    """An engine in a thread of its own. Any number of threads may call `embed` at the same time."""

    def __init__(self, make: Callable[[], Engine]) -> None:
        """Wait for `make`, which runs in the engine's thread, and raise what it raises."""
        self.failure: BaseException | None = None
        self._line: queue.Queue[tuple[OpenShard, _Task] | _Call[Any] | None] = queue.Queue(1)
        self._call: _Call[Any] | None = None  # it came while a stream ran, which ends for it
        self._opening = 0  # tasks that still have shards to put in line
        self._lock = threading.Lock()
        made: queue.Queue[Engine | BaseException] = queue.Queue()
        self._thread = threading.Thread(target=self._run, args=(make, made), name="engine", daemon=True)
        self._thread.start()
        engine = made.get()
        if isinstance(engine, BaseException):
            raise engine
        self.sessions: tuple[Session, ...] = engine.sessions
        self._cores_known = time.monotonic()

    def embed(self, shards: Iterable[OpenShard]) -> Iterator[Result]:
        """Embed a stream of shards, which another thread takes one ahead.

        Yields:
            Rows as they are computed, and the end of each shard, in no promised order of shards.

        Raises:
            Exception: What `shards` or the engine raised. The engine is of no use after its own; see `failure`.
        """
        task = _Task()
        feeder = threading.Thread(target=self._feed, args=(shards, task), name="open", daemon=True)
        feeder.start()
        done, fed = 0, None
        try:
            while done != fed:
                result = task.next()
                if isinstance(result, BaseException):
                    raise result
                if isinstance(result, _Fed):
                    fed = result.shards
                    continue
                done += isinstance(result, EndOfShard)
                yield result
        finally:
            task.leave()
            feeder.join()

    def decide(self, shard: OpenShard) -> Decision | None:
        """Decide on decoder and batch size by the images of a shard; see `embedders.session.Session.decide`."""
        return self._call_inside(lambda engine: decide_together(engine.sessions, shard))

    def take(self, decision: Decision) -> bool:
        """Take what the run has decided, if that is possible without loading the models again."""
        return self._call_inside(lambda engine: take_decision(engine.sessions, decision))

    def share_cores(self) -> None:
        """Use as many cores as are this worker's share by now: other workers may have come or gone."""
        with self._lock:
            if time.monotonic() - self._cores_known < CORES_KNOWN_FOR:
                return
            self._cores_known = time.monotonic()
        before = self.sessions[0].cores
        if (cores := share_of_cores(before)) != before:
            self._call_inside(lambda engine: _use_cores(engine.sessions, cores))

    def close(self) -> None:
        """End the thread and free the engine. Nobody may use it any more."""
        if self.failure is None and self._thread.is_alive():  # one that failed ends by itself, whatever is in line
            self._line.put(None)
        self._thread.join()
        self.sessions = ()  # an error that it failed with may keep this object for a while
        gc.unfreeze()  # a compiled model refers to itself; its memory is wanted for the next one
        gc.collect()

    def _call_inside(self, function: Callable[[Engine], T]) -> T:
        """Return `function(engine)`, called in the engine's thread between two streams of shards."""
        call = _Call(function)
        entered = False
        while not wait([call.result], 0.0 if not entered else 0.1).done:
            if self.failure is not None:
                raise self.failure
            if not entered:
                with contextlib.suppress(queue.Full):
                    self._line.put(call, timeout=0.1)
                    entered = True
        return call.result.result()

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
        while self._serve(engine):
            pass
        del engine  # an error it failed with keeps this frame

    def _serve(self, engine: Engine) -> bool:
        """Embed what comes until there is none for a while; False once nothing will come, or the engine has failed.

        A function of its own, so that an idle engine holds no shard.
        """
        first = self._line.get()
        if first is None:
            return False
        if isinstance(first, _Call):
            first.answer(engine)
            return True
        owners: dict[int, _Task] = {}
        try:
            for result in engine.embed(self._stream(first, owners), watch.batch):
                owners[id(result.shard)].deliver(result)
                if isinstance(result, EndOfShard):
                    del owners[id(result.shard)]
        except BaseException as error:
            drop_locals(error)
            self.failure = error
            for task in {*owners.values(), *self._waiting()}:
                task.deliver(error)
            return False
        if self._call is not None:
            self._call.answer(engine)
            self._call = None
        return True

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
                coming = self._line.get(timeout=TICK if opening else 0)
                if isinstance(coming, _Call):
                    self._call = coming
                    return None
                return coming
            if not opening or time.monotonic() > until:
                return None

    def _waiting(self) -> Iterator[_Task]:
        """Take out of line whoever is there."""
        with contextlib.suppress(queue.Empty):
            while (item := self._line.get_nowait()) is not None:
                if not isinstance(item, _Call):  # whose caller looks at `failure`
                    yield item[1]


def collect_garbage_seldom() -> None:
    """Leave what is there now out of garbage collections, and have few of them.

    Looking through the half million objects that torch, timm and Prefect are made of stops every thread for a quarter
    of a second, in which a GPU would have embedded 6,000 images; a new shard's samples give occasion to do so.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GARBAGE)


@dataclass(eq=False)
class _Request:
    """A task that waits for an engine."""

    name: str
    since: float = field(default_factory=time.monotonic)


@dataclass
class _Kept:
    """The engine of this process, what it is for, how many tasks use it now, and which wait, the oldest first."""

    name: str = ""
    engine: SharedEngine | None = None
    users: int = 0
    waiting: list[_Request] = field(default_factory=list)

    @property
    def usable(self) -> bool:
        return self.engine is not None and self.engine.failure is None

    def serves(self, request: _Request) -> bool:
        """Whether it is a request's turn.

        One for the engine that is there goes first, until one for another engine has waited for `TURN` seconds. A
        worker's memory has room for one model, so that one has to wait until nobody uses this one.
        """
        others = [other for other in self.waiting if other.name != self.name or not self.usable]
        if request not in others:
            return not others or time.monotonic() - others[0].since < TURN
        return not self.users and request is others[0]

    def close(self) -> None:
        """Free the engine."""
        if self.engine is not None:
            self.engine.close()
        self.engine, self.name = None, ""


_kept = _Kept()
_changed = threading.Condition()


@contextlib.contextmanager
def shared_engine(
    recipes: Sequence[Recipe], device: str, images: int = 0, decision: Decision | None = None
) -> Iterator[SharedEngine]:
    """Yield this process's engine for some recipes.

    It is made once, and kept until another one is asked for and nobody uses it. Tasks of runs with other recipes take
    turns.

    Args:
        recipes: What is computed; recipes of one embedder share its session.
        device: "cuda" or "cpu".
        images: How many this worker will probably see in all; 0 if that is not known.
        decision: What the run has decided; None if nothing has to be measured, or it is not decided yet.
    """
    name = _engine_name(recipes, device, decision)
    request = _Request(name)
    with _changed:
        _kept.waiting.append(request)
        try:
            _changed.wait_for(lambda: _kept.serves(request))
            if _kept.name != name and _takes(recipes, device, decision):
                _kept.name = name
            if _kept.name != name or not _kept.usable:
                _kept.close()
                _kept.engine = SharedEngine(lambda: _open_engine(recipes, device, images, decision))
                _kept.name = name
        finally:
            _kept.waiting.remove(request)
            _changed.notify_all()
        engine = _kept.engine
        assert engine is not None
        _kept.users += 1
    try:
        engine.share_cores()
        yield engine
    finally:
        with _changed:
            _kept.users -= 1
            if not _kept.users and not _kept.usable:
                _kept.close()  # what it failed with holds the model and shards
            _changed.notify_all()


def _takes(recipes: Sequence[Recipe], device: str, decision: Decision | None) -> bool:
    """Return whether the engine that is there was opened before the run's decision was known, and has taken it now."""
    engine = _kept.engine
    if decision is None or engine is None or not _kept.usable or _kept.name != _engine_name(recipes, device, None):
        return False
    return engine.take(decision)


def decide_engine(engine: SharedEngine, recipes: Sequence[Recipe], device: str, shard: OpenShard) -> Decision | None:
    """Decide on decoder and batch size by the images of a shard, and keep the engine for tasks with that decision.

    Args:
        engine: What `shared_engine` gave for these recipes and this device, without a decision.
        recipes: What is computed.
        device: "cuda" or "cpu".
        shard: A shard, opened. Nothing is written of it.

    Returns:
        The decision; None if nothing has to be measured.
    """
    decision = engine.decide(shard)
    with _changed:
        if _kept.engine is engine:
            _kept.name = _engine_name(recipes, device, decision)
        _changed.notify_all()
    return decision


def _engine_name(recipes: Sequence[Recipe], device: str, decision: Decision | None) -> str:
    """Return what is the same for tasks that can share an engine."""
    embedders = [[source, _settings(embedder)] for source, embedder in embedders_of(recipes).items()]
    return digest([device, embedders, decision and [*astuple(decision)]])


def _open_engine(recipes: Sequence[Recipe], device: str, images: int, decision: Decision | None) -> Engine:
    """Load the models, in the engine's thread."""
    import torch

    cores = share_of_cores()
    torch.set_num_threads(cores)  # for this thread, where Dask's nanny would have one
    return Engine(open_together([*embedders_of(recipes).values()], device, images, cores, decision))


def _use_cores(sessions: Sequence[Session], cores: int) -> None:
    """Give sessions another number of cores, in the engine's thread."""
    import torch

    torch.set_num_threads(cores)
    use_cores(sessions, cores)


def embedders_of(recipes: Sequence[Recipe]) -> dict[str, ImageEmbedder]:
    """Return the embedders that compute some recipes, by their source, in the order of the recipes."""
    return {recipe.source: recipe.embedder for recipe in recipes}


def _settings(embedder: ImageEmbedder) -> dict[str, Any]:
    """Return the public attributes: every task brings a copy of its own, and those alike must share one model."""
    return {k: of_value_or_type(v) for k, v in vars(embedder).items() if not k.startswith("_") and k != "weights"}
