"""Sessions at work: batches in, rows of layers out, in the order in which they are computed.

An engine lives as long as its worker, because loading a model and building a decoder take seconds. It knows nothing of
where shards come from or where rows go. It keeps no row: what it holds does not grow with a shard.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from embedders.errors import is_out_of_memory
from embedders.ids import printable
from embedders.quarantine import QuarantinedSample, Reason, Rejected
from embedders.session import Session
from embedders.shard_batch import Row, ShardBatch
from embedders.shared_loading import batches_for
from embedders.webdataset import OpenShard

if TYPE_CHECKING:
    import torch

IN_FLIGHT = 3
"""Batches given to the GPU whose values have not been looked at yet: while it computes one, the next one waits."""


class _Copying(NamedTuple):
    """Values on their way from the GPU: `host` (pinned) holds them once `event` has happened."""

    host: torch.Tensor
    event: torch.cuda.Event


@dataclass(frozen=True)
class Rows:
    """Values of some of a shard's samples, as one session computed them.

    Attributes:
        shard: The shard.
        session: The number of the session, in the order in which the engine was given them.
        samples: (n,) int64, ascending: which samples, by their place in the tar.
        columns: Arrays (n, ...) by column; float32, or integers or booleans as the model gave them.
    """

    shard: OpenShard
    session: int
    samples: np.ndarray
    columns: Mapping[str, np.ndarray]

    @property
    def nbytes(self) -> int:
        """Return the size of the values in bytes."""
        return sum(values.nbytes for values in self.columns.values())


@dataclass(frozen=True)
class EndOfShard:
    """All samples of a shard are accounted for: for each session, they had rows or are listed here.

    Attributes:
        shard: The shard.
        quarantined: For each session, the samples without a value, in the order of the tar.
        seconds: Since the loader took the shard.
        waited: Seconds that the engine waited for the loader ("decode") and for the model ("model") since the shard
            that ended before.
    """

    shard: OpenShard
    quarantined: tuple[Sequence[QuarantinedSample], ...]
    seconds: float
    waited: dict[str, float] = field(default_factory=dict)


@dataclass
class _Account:
    """Which samples of a shard have a value from one session, and why others have none."""

    done: np.ndarray
    count: int = 0
    rejected: dict[int, Rejected] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return self.count + len(self.rejected) >= len(self.done)

    def reject(self, sample: int, rejected: Rejected) -> None:
        """Note why a sample has no value; the first reason counts, and a value counts more."""
        if not self.done[sample]:
            self.rejected.setdefault(sample, rejected)

    def fresh(self, samples: np.ndarray) -> np.ndarray:
        """Note that samples (n,) have a value; return the places in `samples` of those that had none, by sample."""
        ordered, first = np.unique(samples, return_index=True)
        first = first[~self.done[ordered]]
        self.done[samples[first]] = True
        self.count += len(first)
        for sample in self.rejected.keys() & set(samples[first].tolist()) if self.rejected else ():
            del self.rejected[sample]
        return first


@dataclass
class _Pending:
    """A shard in flight, with an account for each session."""

    shard: OpenShard
    started: float
    accounts: tuple[_Account, ...]

    @property
    def complete(self) -> bool:
        return all(account.complete for account in self.accounts)

    def end(self, waited: dict[str, float]) -> EndOfShard:
        """Return what is said of the shard once it is complete."""
        quarantined = tuple(tuple(self._quarantined(account)) for account in self.accounts)
        return EndOfShard(self.shard, quarantined, time.monotonic() - self.started, waited)

    def _quarantined(self, account: _Account) -> Iterator[QuarantinedSample]:
        for i, why in sorted(account.rejected.items()):
            member = printable(self.shard.member_of(i))
            yield QuarantinedSample(self.shard.id_of(i), member, str(why.reason), printable(why.detail))


class _Waited:
    """A stop watch with a sum for each stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._sums: dict[str, float] = {}

    def count(self, stage: str) -> None:
        """Add the time since the last call to this stage."""
        now = time.perf_counter()
        self._sums[stage] = self._sums.get(stage, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """Leave the time since the last call out."""
        self._last = time.perf_counter()

    def take(self) -> dict[str, float]:
        """Return the sums, and begin anew."""
        sums, self._sums = self._sums, {}
        return sums


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Have this process's malloc use freed memory again, instead of giving it back to the system.

    A model asks for the same tensors batch after batch. By default large ones are mapped and unmapped each time, and
    Dask's workers are set to give back all else too: the system then clears pages for half of the time (EfficientNet-
    Lite0 on two cores: 37 images/s, and 105 this way). The process stays as large as it was at its largest.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


_Flight = tuple[Sequence[ShardBatch], Sequence[Any], int]
"""Batches, the values on their way from their models, and the newest shard that the loader had taken."""


class Engine:
    """Sessions on one device that share the reading of shards, and their decoding where that is exact."""

    def __init__(self, sessions: Sequence[Session]) -> None:
        """Take sessions that `embedders.shared_loading.can_share` lets work together."""
        keep_freed_memory()
        self.sessions = tuple(sessions)
        self._kinds: dict[tuple[int, str], tuple[np.dtype[Any], tuple[int, ...]]] = {}

    def embed(
        self, shards: Iterable[OpenShard], progressed: Callable[[], None] = lambda: None
    ) -> Iterator[Rows | EndOfShard]:
        """Embed a stream of shards, in no promised order.

        A shard's end comes once all its samples are accounted for. The newest shard waits: a custom embedder may yet
        give a vector for a sample that has no image.

        Args:
            shards: The shards, opened.
            progressed: Called whenever a batch was loaded or embedded.
        """
        opened: dict[int, _Pending] = {}
        in_flight: deque[_Flight] = deque()
        waited = _Waited()
        for batches in batches_for(self.sessions, self._watched(shards, opened)):
            waited.count("decode")
            progressed()
            # No comprehension: its frame, which an error keeps, would hold on to the model.
            values = list(map(_forward, self.sessions, batches))
            in_flight.append((batches, values, max(opened)))
            if len(in_flight) >= IN_FLIGHT:
                earlier = in_flight.popleft()
                yield from self._settle(earlier, opened, waited)
                progressed()
                yield from _completed(opened, earlier[2], waited)
            waited.count("model")
        for flight in in_flight:
            yield from self._settle(flight, opened, waited)
            progressed()
        yield from _completed(opened, max(opened, default=0) + 1, waited)
        for pending in opened.values():
            kinds = " and ".join(type(session.embedder).__name__ for session in self.sessions)
            raise RuntimeError(f"{kinds}.batches left out samples of {pending.shard.path}")

    def _watched(self, shards: Iterable[OpenShard], opened: dict[int, _Pending]) -> Iterator[OpenShard]:
        """Note each shard as the loader takes it, with what can be said of it before any image is read."""
        for number, shard in enumerate(shards):
            accounts = tuple(_Account(np.zeros(shard.count, bool)) for _ in self.sessions)
            for account in accounts:
                account.rejected.update({i: Rejected(Row(number, i), *why) for i, why in shard.unusable.items()})
            opened[number] = _Pending(shard, time.monotonic(), accounts)
            yield shard

    def _settle(self, flight: _Flight, opened: dict[int, _Pending], waited: _Waited) -> Iterator[Rows]:
        """Wait for a batch's values and yield them by shard; note what was rejected."""
        batches, values, _ = flight
        for number, (session, batch, found) in enumerate(zip(self.sessions, batches, values, strict=True)):
            for rejected in batch.rejected:
                row = rejected.tag
                assert isinstance(row, Row)
                opened[row.shard].accounts[number].reject(row.sample, rejected)
            if found is not None:
                columns = {name: self._arrived(number, session, name, array, batch) for name, array in found.items()}
                waited.count("model")
                yield from self._divide(number, session, batch, columns, opened)
                waited.skip()

    def _arrived(self, number: int, session: Session, name: str, values: Any, batch: ShardBatch) -> np.ndarray:
        """Wait for one column of a batch; see that its rows are as many as the images, and of the kind seen before."""
        if isinstance(values, _Copying):
            values.event.synchronize()
            values = values.host
        array, vectors = np.asarray(values), name == session.embedder.image_embedding_column
        if vectors or array.dtype.kind not in "iubf" or array.dtype == np.float16:
            array = np.asarray(array, np.float32)
        if not array.ndim or len(array) != len(batch.rows) or (vectors and array.ndim != 2):
            raise ValueError(
                f"the model gave {name!r} as an array of shape {array.shape} for a batch of {len(batch.rows)}; "
                "load_embedding_model must return a callable that gives (n, dimensions), or a mapping of (n, ...)"
            )
        kind = array.dtype, array.shape[1:]
        before = self._kinds.setdefault((number, name), kind)
        if before != kind:
            (was, shape), (now, other) = before, kind
            if shape != other:
                raise ValueError(f"the model gave values of shape {other} for {name!r} after {shape}")
            raise ValueError(f"the model gave {now} for {name!r} after {was}")
        return array

    def _divide(
        self,
        number: int,
        session: Session,
        batch: ShardBatch,
        columns: Mapping[str, np.ndarray],
        opened: dict[int, _Pending],
    ) -> Iterator[Rows]:
        """Yield a batch's rows by shard, without those that hold NaN or infinity: these are rejected."""
        shard_of, sample_of = np.array(batch.rows, dtype=np.int64).T
        finite = _finite(columns)
        for i in np.flatnonzero(~finite).tolist():
            row = batch.rows[i]
            why = session.embedder.not_finite(session.device)
            opened[row.shard].accounts[number].reject(row.sample, Rejected(row, Reason.NOT_EMBEDDED, why))
        for shard in np.unique(shard_of).tolist():
            mine = np.flatnonzero((shard_of == shard) & finite)
            pending = opened[shard]
            mine = mine[pending.accounts[number].fresh(sample_of[mine])]
            if len(mine):
                chosen = {name: _rows(values, mine) for name, values in columns.items()}
                yield Rows(pending.shard, number, sample_of[mine], chosen)


def _forward(session: Session, batch: ShardBatch) -> dict[str, Any] | None:
    """Start a batch's way through a model; its values by column, or None for a batch without rows."""
    if not batch.rows:
        return None
    import torch

    with torch.inference_mode():
        values = _split_when_out_of_memory(session.model, batch.images)
        if not isinstance(values, Mapping):
            values = {session.embedder.image_embedding_column: values}
        _check_names(session, values)
        return {str(name): _on_its_way(array) for name, array in values.items()}


def _check_names(session: Session, values: Mapping[Any, Any]) -> None:
    """Refuse a mapping that lacks an array, or has one whose name could not be checked before the run.

    Raises:
        ValueError: Says which.
    """
    embedder = session.embedder
    expected = {*embedder.layers, *embedder.extra_columns}
    if lacking := expected - values.keys():
        found = ", ".join(map(str, values)) or "nothing"
        raise ValueError(f"the model gave a mapping without {min(lacking)!r}; it has {found}")
    if unknown := values.keys() - expected:
        raise ValueError(f"the model gave {min(map(str, unknown))!r} too; name it in the embedder's extra_columns")


def _split_when_out_of_memory(model: Callable[[Any], Any], images: Any) -> Any:
    """Run a model, on halves of the batch if it does not fit: memory is no reason to lose a shard."""
    import torch

    try:
        return model(images)
    except Exception as error:
        if not is_out_of_memory(error) or not isinstance(images, torch.Tensor):
            raise
        if len(images) < 2 and type(error) is not RuntimeError:
            raise
        if len(images) < 2:  # torch's error on a CPU, whose text is the allocator's
            raise MemoryError("the model needs more memory for a single image than there is") from error
    if images.is_cuda:
        torch.cuda.empty_cache()
    half = len(images) // 2
    parts = [_split_when_out_of_memory(model, part) for part in (images[:half], images[half:])]
    if isinstance(parts[0], Mapping):
        return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return torch.cat(parts)


def _on_its_way(values: Any) -> Any:
    """Start the copy of a tensor from the GPU to pinned memory; whatever else a model gives stays as it is."""
    import torch

    if not isinstance(values, torch.Tensor):
        return values
    values = values.detach()
    if values.dtype in (torch.float16, torch.bfloat16):
        values = values.float()
    if values.device.type != "cuda":
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    host.copy_(values, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Copying(host, event)


def _finite(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return which rows hold no NaN and no infinity, bool (n,)."""
    found = [
        np.isfinite(values).reshape(len(values), -1).all(axis=1)
        for values in columns.values()
        if values.dtype.kind == "f"
    ]
    return np.logical_and.reduce(found) if found else np.ones(len(next(iter(columns.values()))), bool)


def _rows(values: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return some rows of an array: the array itself if they are all of them in order."""
    if len(places) == len(values) and (np.diff(places) == 1).all():
        return values
    return values[places]


def _completed(opened: dict[int, _Pending], newest: int, waited: _Waited) -> Iterator[EndOfShard]:
    """Take out the shards before the newest one whose samples are all accounted for."""
    for number in [n for n, pending in opened.items() if n < newest and pending.complete]:
        yield opened.pop(number).end(waited.take())
        waited.skip()
