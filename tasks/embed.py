"""The second stage: a group of shards in, one embeddings file a shard out. The file is the record that it is done."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import threading
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace

import pyarrow as pa
import pyarrow.parquet as pq
from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from embedders.base import ImageEmbedder
from embedders.engine import EmbeddedShard
from embedders.errors import MalformedShard
from embedders.quarantine import QuarantinedSample
from embedders.tar import map_tar
from embedders.webdataset import OpenShard
from tasks.counted import counted
from tasks.dataset.vectors import vector_array, write_vectors
from tasks.index import describe_local
from tasks.keys import embedding_key
from tasks.records import EmbeddingRecord, account_agrees, intact, read_embedding_record, seconds_in_work, with_record
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.shards import Shard, check_unchanged
from tasks.storage.download_ahead import SPACE, Stage, StagedTar
from tasks.vector_checks import measure_vectors
from tasks.worker.hang_detection import Held, Limit, Step, end_this_worker, watch
from tasks.worker.shared_engine import shared_engine
from tasks.worker.side_process import aside


@dataclass(frozen=True)
class EmbedOptions:
    """What an embedding task needs beside shards and embedder.

    `fingerprint` is the digest of the embedder's fingerprint as the planner took it: a worker cannot take it again,
    since the source of a class that came by value is not there. `device` is "cuda", "cpu" or "auto". `images` is about
    how many each worker will see in the whole run, 0 where that is not known. `staging_space` bytes on the worker's
    disk hold tars of a store. `verify` has what is done already read and checked against its checksums.
    `shard_timeout` is in seconds without progress, None for what follows from a shard's size. `strict_ids` fails a
    shard whose metadata repeats an id.
    """

    id_col: str
    fingerprint: str
    device: str = "auto"
    raise_on_bad_image: bool = False
    images: int = 0
    staging_space: int = SPACE
    verify: bool = False
    shard_timeout: float | None = None
    strict_ids: bool = True


def resolve_device(device: str) -> str:
    """ "auto" as what this process has."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def embed_group(shards: Sequence[Shard], embedder: ImageEmbedder, options: EmbedOptions) -> list[EmbeddingRecord]:
    """Embed every shard of a group that is not done yet and write its files.

    :raises ShardsFailed: some shards failed; all others are written.
    """
    return _run_group(shards, embedder, options).records


def _run_group(shards: Sequence[Shard], embedder: ImageEmbedder, options: EmbedOptions) -> _GroupRun:
    """Run a group in a thread, and watch it from this one.

    :raises ShardsFailed: some shards failed, or hang.
    """
    run = _GroupRun(embedder, options)
    thread = threading.Thread(target=run.go, args=(shards,), name="group", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1)
        waited = watch.overdue()
        if waited is not None and thread.is_alive():
            end_this_worker()
            raise ShardsFailed(run.hung(shards, waited))
    if run.failures:
        raise ShardsFailed(list(run.failures.values()))
    return run


class _GroupRun:
    """One pass over a group: shards go through the worker's engine, and are written by another thread."""

    def __init__(self, embedder: ImageEmbedder, options: EmbedOptions) -> None:
        self.embedder = embedder
        self.options = options
        self.limit = Limit(resolve_device(options.device), options.shard_timeout)
        self.found = 0  # shards that were done before
        self.records: list[EmbeddingRecord] = []
        self.fresh: list[EmbeddingRecord] = []
        self.done: set[str] = set()
        self.decoding: ImageEmbedder = embedder
        self.failures: dict[str, ShardFailure] = {}
        self._open: dict[str, tuple[Shard, contextlib.ExitStack]] = {}
        self._held: dict[str, Held] = {}
        self._read: dict[str, float] = {}
        self._wrote = 0.0

    def go(self, shards: Sequence[Shard]) -> None:
        """Run; whatever goes wrong fails these shards and no others."""
        try:
            stage = Stage(self._missing(shards), self.options.staging_space)
            with stage, ThreadPoolExecutor(1, "write") as writer:
                self._embed(stage, writer)
        except BaseException as error:  # nobody else would hear of it: this is a thread's last frame
            self._fail_the_rest(shards, error)

    def _embed(self, stage: Stage, writer: ThreadPoolExecutor) -> None:
        options, device = self.options, self.limit.device
        writes: deque[Future[None]] = deque()
        with (
            shared_engine(self.embedder, options.fingerprint, device, options.images) as engine,
            contextlib.closing(self._opened(stage)) as opened,
        ):
            self.decoding = engine.embedder
            for embedded in engine.embed(opened):
                writes.append(writer.submit(self._write, embedded))
                if len(writes) > 2:  # do not run ahead of the disk
                    writes.popleft().result()

    def _missing(self, shards: Sequence[Shard]) -> Iterator[Shard]:
        for shard in shards:
            done = self._done_before(shard)
            if done is None:
                yield shard
            else:
                self.found += 1
                self._note(shard, done)

    def _opened(self, stage: Stage) -> Generator[OpenShard]:
        for tar in stage:
            shard, stack = tar.shard, contextlib.ExitStack()
            stack.callback(tar.release)
            try:
                opened = self._open_tar(tar, stack)
            except Exception as error:
                self.failures[shard.name] = ShardFailure.of(shard.name, error)
                stack.close()
                continue
            self._open[opened.path] = shard, stack
            yield opened

    def _open_tar(self, tar: StagedTar, stack: contextlib.ExitStack) -> OpenShard:
        """Map a tar, which `stack` undoes, with its samples."""
        shard, began = tar.shard, time.monotonic()
        held = self._held[shard.name] = watch.take(self.limit.bytes(shard.tar_bytes))
        stack.callback(watch.leave, held)
        path = tar.path(lambda: watch.got_on(held))
        opened = self._describe(shard, path)
        stack.callback(_unmap, opened)
        check_unchanged(shard)
        opened.read_ahead()
        self._read[shard.name] = time.monotonic() - began
        watch.move(held, Step.EMBED, self.limit.samples(len(opened.ids)))
        return opened

    def _describe(self, shard: Shard, path: str) -> OpenShard:
        """The shard, mapped; a GPU's thread must not wait for the Python that reads headers and ids."""
        component, id_col = self.embedder.image_component, self.options.id_col
        args = shard, path, id_col, self.embedder.use_index_files, component, self.options.strict_ids
        samples = aside(describe_local, *args) if self.limit.device == "cuda" else describe_local(*args)
        return OpenShard(path, map_tar(path), samples, id_col, component, shard.key_dot)

    def _done_before(self, shard: Shard) -> EmbeddingRecord | None:
        """The record of a shard that an earlier try of this task got done, by the planner's own measure."""
        record = read_embedding_record(shard.target, shard.embeddings_file)
        if record is None or record.key != embedding_key(shard, self.options.fingerprint, self.options.id_col):
            return None
        if not self.embedder.accepts(record.decoder) or not account_agrees(shard, record):
            return None
        return record if not self.options.verify or intact(shard.target, shard.embeddings_file) else None

    def _write(self, embedded: EmbeddedShard) -> None:
        shard, stack = self._open.pop(embedded.shard.path)
        watch.move(self._held[shard.name], Step.WRITE, self.limit.bytes(embedded.vectors.nbytes))
        try:
            with stack:
                if self.options.raise_on_bad_image and embedded.quarantined:
                    first = embedded.quarantined[0]
                    raise MalformedShard(
                        f"{shard.tar}: {first.member}: {first.reason} ({first.detail}), and --on-error is raise"
                    )
                check_unchanged(shard)  # what was mapped or downloaded may not be what the name stands for by now
                stages = {"read": self._read.pop(shard.name), **embedded.waited, "write": self._wrote}
                began = time.monotonic()
                computed = computed_in(self.decoding, self.limit.device)
                record = write_embeddings(shard, embedded, self.decoding, self.options.fingerprint, stages, computed)
                self._wrote = time.monotonic() - began  # the next shard's record tells it: a file cannot tell its own
                self.fresh.append(record)
                self._note(shard, record)
        except BaseException as error:
            self.failures[shard.name] = ShardFailure.of(shard.name, error)

    def _note(self, shard: Shard, record: EmbeddingRecord) -> None:
        self.records.append(record)
        self.done.add(shard.name)

    def _fail_the_rest(self, shards: Sequence[Shard], error: BaseException) -> None:
        for shard in shards:
            if shard.name not in self.failures and shard.name not in self.done:
                self.failures[shard.name] = replace(ShardFailure.of(shard.name, error), alone=True)
        for _, stack in self._open.values():
            with contextlib.suppress(Exception):  # the first error is the one to tell
                stack.close()

    def hung(self, shards: Sequence[Shard], waited: float) -> list[ShardFailure]:
        """The failures of a group that does not get on, with what can be tried apart from the others."""
        found, now = dict(self.failures), time.monotonic()
        for shard in shards:
            if shard.name in self.done or shard.name in found:
                continue
            held = self._held.get(shard.name)
            why = (
                f"hangs: nothing got on for {waited:.0f} s; --shard-timeout sets another limit"
                if held is not None and held.waited(now) is not None
                else "waited behind a shard that hangs"
            )
            found[shard.name] = ShardFailure(shard.name, why, transient=False, alone=True)
        return list(found.values())


def _unmap(opened: OpenShard) -> None:
    """Close a mapped tar now, whoever still refers to it; one that a loader still reads goes when it has."""
    with contextlib.suppress(BufferError):
        opened.data.close()


def write_embeddings(
    shard: Shard,
    embedded: EmbeddedShard,
    embedder: ImageEmbedder,
    fingerprint: str,
    stages: Mapping[str, float] | None = None,
    computed: str = "",
) -> EmbeddingRecord:
    """Write a shard's quarantine and then, as the record that it is done, its embeddings.

    :param stages: the seconds that stages took, for the record.
    :param computed: the precision and the device of the model, for the record.
    :raises MalformedShard: the account does not balance; nothing is written then.
    """
    record = EmbeddingRecord(
        key=embedding_key(shard, fingerprint, embedded.shard.id_col),
        embedder=fingerprint,
        samples=embedded.samples,
        embedded=len(embedded.ids),
        quarantined=dict(Counter(sample.reason for sample in embedded.quarantined)),
        dimensions=embedded.vectors.shape[1],
        decoder=embedder.decoder,
        versions=versions(),
        vectors=measure_vectors(embedded.vectors),
        work={"began": round(time.time() - embedded.seconds, 2), "ended": round(time.time(), 2)}
        | {stage: round(seconds, 3) for stage, seconds in (stages or {}).items()},
        worker=f"{platform.node()}:{os.getpid()}",
        ignored=embedded.shard.samples.ignored.total,
        ignored_examples=list(embedded.shard.samples.ignored.examples),
        doubt=embedded.shard.samples.doubt,
        computed=computed,
    )
    if not record.balanced:
        samples = counted(record.samples, "sample")
        raise MalformedShard(f"{shard.tar}: {samples}, but {record.embedded} + {record.quarantined}")
    if embedded.quarantined:
        table = quarantine_table(embedded.quarantined)
        shard.target.write(shard.quarantine_file, lambda path: write_quarantine(table, path))
    else:
        shard.target.remove(shard.quarantine_file)
    column = embedder.image_embedding_column
    table = pa.table({"id": pa.array(embedded.ids, pa.string()), column: vector_array(embedded.vectors)})
    table = table.cast(with_record(table.schema, record))
    shard.target.write(shard.embeddings_file, lambda path: write_vectors(table, path, column))
    return record


def computed_in(embedder: ImageEmbedder, device: str) -> str:
    """Return what a record says of a model's precision and device: "float16 on a GPU", "float32 on a CPU", "a CPU"."""
    on = "a GPU" if device.startswith("cuda") else "a CPU"
    precision = embedder.precision_on(device)
    return f"{precision} on {on}" if precision else on


def quarantine_table(samples: Sequence[QuarantinedSample]) -> pa.Table:
    """id, member, reason, detail: what could not be embedded."""
    names = QuarantinedSample._fields
    return pa.table({name: pa.array([getattr(s, name) for s in samples], pa.string()) for name in names})


def write_quarantine(table: pa.Table, path: str) -> None:
    """Write a quarantine with checksums."""
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


@functools.cache
def versions() -> dict[str, str]:
    """The versions of what makes the vectors; not to be changed."""
    names = ("torch", "timm", "nvidia-dali-cuda120", "pillow", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


@task(
    name="shard-embedding",
    task_run_name="embed {span}",
    cache_policy=NO_CACHE,  # the embeddings file is the cache: a record that can be gone is none
    **RETRIES,
)
def embed_shards(
    shards: Sequence[Shard], embedder: ImageEmbedder, options: EmbedOptions, span: str
) -> list[EmbeddingRecord] | State[list[EmbeddingRecord]]:
    """Embed a group of shards; see `embed_group`. Its state is `Cached` if all were found done by their key."""
    run = _run_group(shards, embedder, options)
    if run.found == len(shards):
        return Completed(name="Cached", data=run.records)
    seconds, images = seconds_in_work(run.fresh), sum(record.samples for record in run.fresh)
    bad, rate = sum(sum(record.quarantined.values()) for record in run.fresh), images / seconds
    get_run_logger().info(
        "%s: %s in %.1f s, %.1f images/s, %d quarantined", span, counted(images, "image"), seconds, rate, bad
    )
    return run.records
