"""The second stage: a group of shards in, one file per shard and layer out. The file is the record that it is done."""

from __future__ import annotations

import contextlib
import os
import platform
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from prefect import State, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from embedders.decision import Decision
from embedders.engine import EndOfShard, Rows
from embedders.errors import MalformedShard
from embedders.recipe import Recipe
from embedders.session import Session
from embedders.tar import map_tar
from embedders.webdataset import OpenShard
from tasks.index import describe_local
from tasks.keys import layer_key
from tasks.layers import LayerWriter, versions
from tasks.records import Column, LayerRecord, account_agrees, intact, read_layer_record, seconds_in_work
from tasks.retries import RETRIES, ShardFailure, ShardsFailed
from tasks.run_names import run_name, span_of
from tasks.shards import Shard, check_unchanged
from tasks.storage.download_ahead import SPACE, Stage, StagedTar
from tasks.wording import counted
from tasks.worker.dask_worker import dask_worker
from tasks.worker.hang_detection import Held, Limit, Step, end_this_worker, watch
from tasks.worker.shared_engine import embedders_of, shared_engine
from tasks.worker.side_process import aside
from tasks.worker_count import TASKS_PER_GPU_WORKER

Records = Mapping[str, Mapping[str, LayerRecord]]
"""The records of some shards' layers, by shard and layer."""


@dataclass(frozen=True)
class EmbedOptions:
    """What an embedding task needs beside shards and recipes.

    `device` is "cuda", "cpu" or "auto". `images` is about
    how many each worker will see in the whole run, 0 where that is not known. `staging_space` bytes on the worker's
    disk hold tars of a store. `verify` has what is done already read and checked against its checksums.
    `shard_timeout` is in seconds without progress, None for what follows from a shard's size. `strict_ids` fails a
    shard whose metadata repeats an id.
    """

    id_col: str
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


_places = threading.BoundedSemaphore(TASKS_PER_GPU_WORKER)
"""For the groups that a process embeds at once. The threads of a Dask worker are as few anyway; Prefect's default task
runner begins with all tasks at once, and each would hold open shards, or download some."""


def _room() -> contextlib.AbstractContextManager[Any]:
    """Wait, outside a Dask worker, until few enough groups are being embedded in this process."""
    return _places if dask_worker() is None else contextlib.nullcontext()


def embed_group(
    shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions, decision: Decision | None = None
) -> Records:
    """Embed every shard of a group that is not done yet and write its files.

    Args:
        shards: The group.
        recipes: What is computed; recipes of several embedders must be able to share one decoding.
        options: How.
        decision: The decoder and the batch size that the run has decided on; None if nothing has to be measured.

    Returns:
        The records of each shard's layers, by shard and layer.

    Raises:
        ShardsFailed: Some shards failed; all others are written.
    """
    return _run_group(shards, recipes, options, decision).records


def _run_group(
    shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions, decision: Decision | None
) -> _GroupRun:
    """Run a group in a thread, and watch it from this one.

    Raises:
        ShardsFailed: Some shards failed, or hang.
    """
    run = _GroupRun(recipes, options, decision)
    waited = run_watched(lambda: run.go(shards))
    if waited is not None:
        raise ShardsFailed(run.hung(shards, waited))
    if run.failures:
        raise ShardsFailed(list(run.failures.values()))
    return run


def run_watched(function: Callable[[], None]) -> float | None:
    """Call a function in a thread of its own, and watch this process's shards from this one.

    Args:
        function: It raises nothing.

    Returns:
        None once it is done; if a shard hangs, the seconds without progress. This worker then ends shortly.
    """
    thread = threading.Thread(target=function, name="group", daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(1)
        waited = watch.overdue()
        if waited is not None and thread.is_alive():
            end_this_worker()
            return waited
    return None


class _GroupRun:
    """One pass over a group: shards go through the worker's engine, and this thread writes what comes of them."""

    def __init__(self, recipes: Sequence[Recipe], options: EmbedOptions, decision: Decision | None) -> None:
        self.recipes = recipes
        self.options = options
        self.decision = decision
        self.limit = Limit(resolve_device(options.device), options.shard_timeout)
        self.found = 0  # shards that were done before
        self.records: dict[str, dict[str, LayerRecord]] = {}
        self.fresh: list[LayerRecord] = []
        self.done: set[str] = set()
        self.failures: dict[str, ShardFailure] = {}
        self._sources = [*embedders_of(recipes)]
        self._sessions: Sequence[Session] = ()
        self._lacking: dict[str, list[Recipe]] = {}
        self._open: dict[str, _Writing] = {}
        self._held: dict[str, Held] = {}
        self._wrote = 0.0

    def go(self, shards: Sequence[Shard]) -> None:
        """Run; whatever goes wrong fails these shards and no others."""
        try:
            with Stage(self._missing(shards), self.options.staging_space) as stage:
                self._embed(stage)
        except BaseException as error:  # nobody else would hear of it: this is a thread's last frame
            self._sessions = ()  # the error keeps this frame, and so this object
            self._fail_the_rest(shards, error)

    def _embed(self, stage: Stage) -> None:
        with (
            shared_engine(self.recipes, self.limit.device, self.options.images, self.decision) as engine,
            contextlib.closing(self._opened(stage)) as opened,
        ):
            self._sessions = engine.sessions
            for result in engine.embed(opened):
                if isinstance(result, Rows):
                    self._add(result)
                else:
                    self._finish(result)

    def _missing(self, shards: Sequence[Shard]) -> Iterator[Shard]:
        for shard in shards:
            done = {recipe.layer: self._done_before(shard, recipe) for recipe in self.recipes}
            self._lacking[shard.name] = [recipe for recipe in self.recipes if done[recipe.layer] is None]
            if self._lacking[shard.name]:
                yield shard
            else:
                self.found += 1
                self._note(shard, {layer: record for layer, record in done.items() if record is not None})

    def _opened(self, stage: Stage) -> Generator[OpenShard]:
        for tar in stage:
            shard, stack = tar.shard, contextlib.ExitStack()
            stack.callback(tar.release)
            try:
                opened, seconds = self._open_tar(tar, stack)
                writers = {
                    recipe.layer: stack.enter_context(LayerWriter(shard, recipe.layer))
                    for recipe in self._lacking[shard.name]
                }
            except Exception as error:
                self.failures[shard.name] = ShardFailure.of(shard.name, error)
                stack.close()
                continue
            self._open[opened.path] = _Writing(shard, writers, stack, seconds)
            yield opened

    def _open_tar(self, tar: StagedTar, stack: contextlib.ExitStack) -> tuple[OpenShard, float]:
        """Map a tar, which `stack` undoes, with its samples; and the seconds that it took."""
        shard, began = tar.shard, time.monotonic()
        held = self._held[shard.name] = watch.take(self.limit.bytes(shard.tar_bytes))
        stack.callback(watch.leave, held)
        path = tar.path(lambda: watch.got_on(held))
        opened = self._describe(shard, path)
        stack.callback(unmap, opened)
        check_unchanged(shard)
        opened.read_ahead()
        watch.move(held, Step.EMBED, self.limit.samples(opened.count))
        return opened, time.monotonic() - began

    def _describe(self, shard: Shard, path: str) -> OpenShard:
        """Map the shard; a GPU's thread must not wait for the Python that reads headers and ids."""
        embedder, id_col = self.recipes[0].embedder, self.options.id_col
        component = embedder.image_component
        args = shard, path, id_col, embedder.use_index_files, component, self.options.strict_ids
        samples = aside(describe_local, *args) if self.limit.device == "cuda" else describe_local(*args)
        return OpenShard(path, map_tar(path), samples, id_col, component, shard.key_dot)

    def _done_before(self, shard: Shard, recipe: Recipe) -> LayerRecord | None:
        """Return the record of a layer that an earlier try of this task finished, by the planner's own measure."""
        name = shard.layer_file(recipe.layer)
        record = read_layer_record(shard.target, name)
        if record is None or record.key != layer_key(shard, recipe.layer, recipe.digest, self.options.id_col):
            return None
        if not recipe.accepts(record.decoder) or not account_agrees(shard, record):
            return None
        return record if not self.options.verify or intact(shard.target, name) else None

    def _add(self, rows: Rows) -> None:
        """Add rows to the files of their shard's layers; what goes wrong here fails this shard alone."""
        writing = self._open.get(rows.shard.path)
        if writing is None or writing.shard.name in self.failures:
            return
        try:
            ids = rows.shard.ids_at(rows.samples)
            for recipe in self._recipes_of(rows.session):
                writer = writing.writers.get(recipe.layer)
                if writer is not None:
                    writer.add(rows.samples, ids, {name: rows.columns[name] for name in recipe.columns})
        except BaseException as error:
            self.failures[writing.shard.name] = ShardFailure.of(writing.shard.name, error)

    def _finish(self, end: EndOfShard) -> None:
        """Write the records of a shard's layers, which makes them done."""
        writing = self._open.pop(end.shard.path)
        shard, began = writing.shard, time.monotonic()
        with writing.stack:
            if shard.name in self.failures:
                return
            watch.move(self._held[shard.name], Step.WRITE, self.limit.bytes(shard.tar_bytes))
            try:
                self._refuse_quarantined(shard, end)
                check_unchanged(shard)  # what was mapped or downloaded may not be what the name stands for by now
                records = [
                    self._finish_layer(recipe, number, writing, end)
                    for number in range(len(self._sources))
                    for recipe in self._recipes_of(number)
                    if recipe.layer in writing.writers
                ]
                self._wrote = time.monotonic() - began  # for the next shard's record: a file cannot hold its own
                self.fresh.append(records[0])
                self._note(shard, {record.layer: record for record in records})
            except BaseException as error:
                self.failures[shard.name] = ShardFailure.of(shard.name, error)

    def _finish_layer(self, recipe: Recipe, number: int, writing: _Writing, end: EndOfShard) -> LayerRecord:
        session, writer = self._sessions[number], writing.writers[recipe.layer]
        stages = {"read": writing.seconds, **end.waited, "write": self._wrote}
        key = layer_key(writing.shard, recipe.layer, recipe.digest, self.options.id_col)
        return finish_layer(writer, recipe, key, end, number, session, stages)

    def _recipes_of(self, session: int) -> Iterator[Recipe]:
        """Yield the recipes that a session computes."""
        return (recipe for recipe in self.recipes if recipe.source == self._sources[session])

    def _refuse_quarantined(self, shard: Shard, end: EndOfShard) -> None:
        quarantined = [sample for samples in end.quarantined for sample in samples]
        if self.options.raise_on_bad_image and quarantined:
            first = quarantined[0]
            raise MalformedShard(
                f"{shard.tar}: {first.member}: {first.reason} ({first.detail}), and --on-error is raise"
            )

    def _note(self, shard: Shard, records: dict[str, LayerRecord]) -> None:
        self.records[shard.name] = records
        self.done.add(shard.name)

    def _fail_the_rest(self, shards: Sequence[Shard], error: BaseException) -> None:
        for shard in shards:
            if shard.name not in self.failures and shard.name not in self.done:
                self.failures[shard.name] = replace(ShardFailure.of(shard.name, error), alone=True)
        for writing in self._open.values():
            with contextlib.suppress(Exception):  # the first error is the one to tell
                writing.stack.close()

    def hung(self, shards: Sequence[Shard], waited: float) -> list[ShardFailure]:
        """Return the failures of a group that makes no progress, with what can be tried apart from the others."""
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


@dataclass(frozen=True)
class _Writing:
    """A shard in the engine: its layers' files, what else must be undone in the end, the seconds it took to open."""

    shard: Shard
    writers: dict[str, LayerWriter]
    stack: contextlib.ExitStack
    seconds: float


def unmap(opened: OpenShard) -> None:
    """Close a mapped tar now, whoever still refers to it; one that a loader still reads goes when it has."""
    with contextlib.suppress(BufferError):
        opened.data.close()


def finish_layer(
    writer: LayerWriter,
    recipe: Recipe,
    key: str,
    end: EndOfShard,
    number: int,
    session: Session,
    stages: Mapping[str, float] | None = None,
) -> LayerRecord:
    """Finish a layer's file with its record, and its quarantine.

    Args:
        writer: It has got all rows.
        recipe: The layer's.
        key: The layer's; see `tasks.keys.layer_key`.
        end: The end of the shard.
        number: The session's, among those of the engine.
        session: What computed the rows.
        stages: The seconds that stages took, for the record.

    Raises:
        Unbalanced: Samples are neither embedded nor quarantined, or both; nothing is written then.
    """
    writer.flush()
    quarantined, samples, now = end.quarantined[number], end.shard.samples, time.time()
    record = LayerRecord(
        key=key,
        layer=recipe.layer,
        recipe=recipe.digest,
        samples=end.shard.count,
        embedded=writer.rows,
        quarantined=dict(Counter(sample.reason for sample in quarantined)),
        rows=writer.rows,
        columns=writer.columns or {recipe.layer: Column("float32", (0,))},
        made_of=dict(recipe.fingerprint),
        in_order=writer.in_order,
        decoder=session.decoder,
        versions=versions(),
        statistics=writer.statistics,
        work={"began": round(now - end.seconds, 2), "ended": round(now, 2)}
        | {stage: round(seconds, 3) for stage, seconds in (stages or {}).items()},
        worker=f"{platform.node()}:{os.getpid()}",
        ignored=samples.ignored.total,
        ignored_examples=list(samples.ignored.examples),
        doubt=samples.doubt,
        computed=session.computed,
        batch_size=session.batch_size if session.decision else 0,
    )
    writer.finish(record, quarantined)
    return record


@task(
    name="shard-embedding",
    task_run_name=run_name("embed"),
    cache_policy=NO_CACHE,  # the layer file is the cache: a record that can be gone is none
    persist_result=False,
    **RETRIES,
)
def embed_shards(
    shards: Sequence[Shard],
    recipes: Sequence[Recipe],
    options: EmbedOptions,
    span: str = "",
    decision: Decision | None = None,
) -> Records | State[Records]:
    """Embed a group of shards, each of which is done when its files are written.

    Args:
        shards: The group. Shards that are done, by their key, are left as they are.
        recipes: Of the layers to compute, in one pass over the images; see `tasks.plan.passes`.
        options: What else a task needs.
        span: The group's name in Prefect's UI and in the log; by default those of its first and last shard.
        decision: What was decided for the whole run; see `tasks.decide`.

    Returns:
        The records of each shard's layers, by shard and layer. The state is `Cached` if all shards were done.

    Raises:
        ShardsFailed: Some shards failed, after retries where these may help; all others are written.

    Example:
        >>> future = embed_shards.submit(shards, recipes_of(TimmImageEmbedder("resnet50")), EmbedOptions("key"))
    """
    with _room():
        run = _run_group(shards, recipes, options, decision)
    if run.found == len(shards):
        return Completed(name="Cached", data=run.records)
    seconds, images = seconds_in_work(run.fresh), sum(record.samples for record in run.fresh)
    bad, rate = sum(sum(record.quarantined.values()) for record in run.fresh), images / seconds
    get_run_logger().info(
        "%s: %s in %.1f s, %.1f images/s, %d quarantined",
        span or span_of(shards),
        counted(images, "image"),
        seconds,
        rate,
        bad,
    )
    return run.records
