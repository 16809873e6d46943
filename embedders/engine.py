"""An embedder made ready on a device: batches in, vectors out, scattered back to their shards.

Lives as long as its worker, because loading a model and building a decoder take seconds. It knows nothing of where
shards come from or where vectors go.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from embedders.base import ImageEmbedder, Row, ShardBatch
from embedders.errors import is_out_of_memory
from embedders.ids import printable
from embedders.quarantine import QuarantinedSample, Reason, Rejected
from embedders.webdataset import OpenShard

if TYPE_CHECKING:
    import torch

IN_FLIGHT = 3
"""Batches given to the GPU whose vectors have not been looked at yet: while it computes one, the next one waits."""


class _Copying(NamedTuple):
    """Vectors on their way from the GPU: `host` (pinned) holds them once `event` is through."""

    host: torch.Tensor
    event: torch.cuda.Event


@dataclass(frozen=True)
class EmbeddedShard:
    """All that came of a shard, in the order of its samples: len(ids) + len(quarantined) == samples.

    `vectors` is (len(ids), dimensions) float32, C-contiguous.
    """

    shard: OpenShard
    ids: list[str]
    vectors: np.ndarray
    quarantined: list[QuarantinedSample]
    seconds: float
    waited: dict[str, float] = field(default_factory=dict)
    """Seconds that the engine waited for the loader ("decode") and for the model ("model") since the shard before."""

    @property
    def samples(self) -> int:
        return len(self.shard.ids)


@dataclass
class _Pending:
    """A shard in flight: `vectors[i]` holds once `done[i]`, and each sample ends in `done` or in `rejected`."""

    shard: OpenShard
    started: float
    vectors: np.ndarray | None = None
    done: np.ndarray = field(default_factory=lambda: np.zeros(0, bool))
    rejected: dict[int, Rejected] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        return int(self.done.sum()) + len(self.rejected) >= len(self.done)


class _Waited:
    """A stop watch with a sum for each stage."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._sums: dict[str, float] = {}

    def count(self, stage: str) -> None:
        """The time since the last call was this stage's."""
        now = time.perf_counter()
        self._sums[stage] = self._sums.get(stage, 0.0) + now - self._last
        self._last = now

    def skip(self) -> None:
        """The time since the last call was nobody's."""
        self._last = time.perf_counter()

    def take(self) -> dict[str, float]:
        """The sums; they begin anew."""
        sums, self._sums = self._sums, {}
        return sums


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt(3)."""


def keep_freed_memory() -> None:
    """Have this process's malloc use freed memory again, instead of giving it back to the system.

    A model asks for the same tensors batch after batch. By default large ones are mapped and unmapped each time, and
    Dask's workers are told to give back all else too: the system then clears pages for half of the time (EfficientNet-
    Lite0 on two cores: 37 images/s, and 105 this way). The process stays as large as it was at its largest.
    """
    with contextlib.suppress(AttributeError, OSError):  # another C library than glibc
        libc = ctypes.CDLL(None)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
        libc.mallopt(M_MMAP_MAX, 0)


class Engine:
    """An embedder with its model loaded on a device."""

    def __init__(self, embedder: ImageEmbedder, device: str, images: int = 0) -> None:
        keep_freed_memory()
        self.session = embedder.open(device, images)
        self.embedder = self.session.embedder
        self.device = device
        self.model = self.session.model

    def embed(self, shards: Iterable[OpenShard], got_on: Callable[[], None] = lambda: None) -> Iterator[EmbeddedShard]:
        """Embed a stream of shards. Each is yielded once all its samples are accounted for, in no promised order.

        The newest shard waits: a custom embedder may yet give a vector for a sample that has no image.

        Args:
            shards: The shards, opened.
            got_on: Called whenever a batch was loaded or embedded.
        """
        opened: dict[int, _Pending] = {}
        in_flight: deque[tuple[ShardBatch, Any, int]] = deque()
        waited = _Waited()
        for batch in self.session.batches(_watched(shards, opened)):
            waited.count("decode")
            got_on()
            in_flight.append((batch, self._forward(batch), max(opened)))
            if len(in_flight) >= IN_FLIGHT:
                earlier, vectors, newest = in_flight.popleft()
                self._settle(earlier, vectors, opened)
                got_on()
                waited.count("model")
                yield from _completed(opened, newest, waited)
            waited.count("model")
        for batch, vectors, _ in in_flight:
            self._settle(batch, vectors, opened)
            got_on()
        waited.count("model")
        yield from _completed(opened, max(opened, default=0) + 1, waited)
        for pending in opened.values():
            raise RuntimeError(f"{type(self.embedder).__name__}.batches left out samples of {pending.shard.path}")

    def _forward(self, batch: ShardBatch) -> Any:
        """The batch's vectors, on their way to the host; None for a batch without rows."""
        if not batch.rows:
            return None
        import torch

        with torch.inference_mode():
            vectors = self._split_when_out_of_memory(batch.images)
            if not isinstance(vectors, torch.Tensor):
                return vectors
            vectors = vectors.detach().float()
            if vectors.device.type != "cuda":
                return vectors
            host = torch.empty(vectors.shape, dtype=torch.float32, pin_memory=True)
            host.copy_(vectors, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            return _Copying(host, event)

    def _split_when_out_of_memory(self, images: Any) -> Any:
        """Run the model, on halves of the batch if it does not fit: memory is no reason to lose a shard."""
        import torch

        try:
            return self.model(images)
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
        parts = [self._split_when_out_of_memory(part) for part in (images[:half], images[half:])]
        return torch.cat(parts)

    def _settle(self, batch: ShardBatch, vectors: Any, opened: dict[int, _Pending]) -> None:
        """Put a batch's vectors and rejections where they belong."""
        for rejected in batch.rejected:
            row = rejected.tag
            assert isinstance(row, Row)
            opened[row.shard].rejected.setdefault(row.sample, rejected)
        if vectors is None:
            return
        if isinstance(vectors, _Copying):
            vectors.event.synchronize()
            vectors = vectors.host
        matrix = np.asarray(vectors, dtype=np.float32)
        if matrix.ndim != 2 or len(matrix) != len(batch.rows):
            raise ValueError(
                f"the model gave an array of shape {matrix.shape} for a batch of {len(batch.rows)}; "
                "load_embedding_model must return a callable that gives (n, dimensions)"
            )
        shard_of, sample_of = np.array(batch.rows, dtype=np.int64).T
        finite = np.isfinite(matrix).all(axis=1)
        for i in np.flatnonzero(~finite).tolist():
            row = batch.rows[i]
            rejected = Rejected(row, Reason.NOT_EMBEDDED, self.embedder.not_finite(self.device))
            if not opened[row.shard].done[row.sample]:
                opened[row.shard].rejected.setdefault(row.sample, rejected)
        for number in np.unique(shard_of):
            mine = (shard_of == number) & finite
            _scatter(opened[int(number)], sample_of[mine], matrix[mine])


def _watched(shards: Iterable[OpenShard], opened: dict[int, _Pending]) -> Iterator[OpenShard]:
    """Note each shard as the loader takes it, with what can be said of it before any image is read."""
    for number, shard in enumerate(shards):
        pending = _Pending(shard, time.monotonic(), done=np.zeros(len(shard.ids), bool))
        pending.rejected.update({i: Rejected(Row(number, i), *why) for i, why in shard.unusable.items()})
        opened[number] = pending
        yield shard


def _scatter(pending: _Pending, samples: np.ndarray, matrix: np.ndarray) -> None:
    """Note the vectors of some samples; the first one of each counts."""
    if pending.vectors is None:
        pending.vectors = np.empty((len(pending.done), matrix.shape[1]), np.float32)
    if matrix.shape[1] != pending.vectors.shape[1]:
        raise ValueError(f"the model gave {matrix.shape[1]} dimensions after {pending.vectors.shape[1]}")
    samples, first = np.unique(samples, return_index=True)
    matrix, fresh = matrix[first], ~pending.done[samples]
    for sample in samples[fresh]:
        pending.rejected.pop(int(sample), None)
    pending.vectors[samples[fresh]] = matrix[fresh]
    pending.done[samples[fresh]] = True


def _completed(opened: dict[int, _Pending], newest: int, waited: _Waited) -> Iterator[EmbeddedShard]:
    """Take out the shards before the newest one whose samples are all accounted for."""
    for number in [n for n, pending in opened.items() if n < newest and pending.complete]:
        yield _finish(opened.pop(number), waited.take())
        waited.skip()


def _finish(pending: _Pending, waited: dict[str, float]) -> EmbeddedShard:
    shard = pending.shard
    vectors = np.zeros((0, 0), np.float32) if pending.vectors is None else pending.vectors
    if pending.vectors is not None and not pending.done.all():
        vectors = vectors[pending.done]
    ids = [sample_id for sample_id, done in zip(shard.ids, pending.done, strict=True) if done]
    quarantined = [
        QuarantinedSample(shard.ids[i], printable(shard.member_of(i)), str(r.reason), printable(r.detail))
        for i, r in sorted(pending.rejected.items())
    ]
    return EmbeddedShard(shard, ids, vectors, quarantined, time.monotonic() - pending.started, waited)
