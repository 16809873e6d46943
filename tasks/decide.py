"""One decision per run: the decoder and the batch size, measured on one worker before the first shard is written."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE

from embedders.decision import Decision
from embedders.errors import one_line
from embedders.fingerprint import digest
from embedders.recipe import Recipe
from embedders.tar import map_tar
from embedders.webdataset import OpenShard, describe
from tasks.embed import EmbedOptions, resolve_device, run_watched, unmap
from tasks.index import index_tar
from tasks.plan import Plan
from tasks.shards import Shard, check_unchanged
from tasks.storage.conditional import agree
from tasks.storage.download_ahead import Stage
from tasks.worker.hang_detection import Held, Limit, Step, watch
from tasks.worker.shared_engine import SharedEngine, decide_engine, shared_engine

TRIES = 3
"""Shards that are tried for the measurement, where the first ones are damaged or empty."""


class Undecided(Exception):
    """No shard could be measured."""


def kept_decision(plan: Plan, recipes: Sequence[Recipe]) -> Decision | None:
    """Return what the shards that are done were made with, so that the others are made alike.

    Args:
        plan: What is done.
        recipes: What is to be computed in one pass.

    Returns:
        The most common decision of their layers; None if none of them depended on one.
    """
    layers = {recipe.layer for recipe in recipes}
    records = [record for layer in plan.layers if layer.name in layers for record in layer.records.values()]
    decisions = Counter(Decision(it.decoder, it.batch_size) for it in records if it.batch_size)
    return decisions.most_common(1)[0][0] if decisions else None


def agreed(decision: Decision, plan: Plan, recipes: Sequence[Recipe]) -> Decision:
    """Return what the first of several parts of a run has decided, which may be this one.

    Args:
        decision: What this one has measured.
        plan: What this part does.
        recipes: What is computed in one pass.
    """
    names = digest(sorted(recipe.digest for recipe in recipes))
    file = f"layers/{recipes[0].layer}/.decision-{names}.json"
    said = json.loads(agree(plan.shards[0].target, file, json.dumps(asdict(decision))))
    return Decision(**said)


def decide_here(shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions) -> Decision | None:
    """Measure on this worker what all workers of a run then do alike.

    The engine that is opened for it is the one that the embedding tasks of this worker use. Nothing is written. Of a
    store, one tar is downloaded.

    Args:
        shards: The shards to embed. The first one that can be opened is measured.
        recipes: What is computed in one pass.
        options: As for the embedding tasks.

    Returns:
        The decision; None if nothing has to be measured, as on a CPU.

    Raises:
        Undecided: The first shards cannot be opened, or one of them hangs.
        Exception: The model cannot be opened.
    """
    limit = Limit(resolve_device(options.device), options.shard_timeout)
    found: list[Decision | None] = []
    errors: list[BaseException] = []

    def measure() -> None:
        try:
            with shared_engine(recipes, limit.device, options.images) as engine:
                found.append(_decide_by_first(engine, shards[:TRIES], recipes, options, limit))
        except BaseException as error:  # nobody else would hear of it: this is a thread's last frame
            errors.append(error)

    waited = run_watched(measure)
    if waited is not None:
        raise Undecided(f"the first shard hangs: no progress for {waited:.0f} s")
    if errors:
        raise errors[0]
    return found[0]


def _decide_by_first(
    engine: SharedEngine, shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions, limit: Limit
) -> Decision | None:
    """Decide by the first of some shards that can be opened."""
    why = "there is no shard"
    for shard in shards:
        try:
            with _opened(shard, recipes[0], options, limit) as opened:
                if opened.count == len(opened.unusable):
                    why = f"{shard.name}: it has no images"
                    continue
                return decide_engine(engine, recipes, limit.device, opened)
        except Exception as error:
            if engine.failure is not None:
                raise
            why = f"{shard.name}: {one_line(error, named=True)}"  # its embedding reports it
    raise Undecided(why)


@contextlib.contextmanager
def _opened(shard: Shard, recipe: Recipe, options: EmbedOptions, limit: Limit) -> Iterator[OpenShard]:
    """Map a shard, with the headers of its images, as an embedding task does; watch it for hangs."""
    held: Held = watch.take(limit.bytes(shard.tar_bytes))
    component = recipe.embedder.image_component
    try:
        with Stage([shard], options.staging_space) as stage:
            path = next(stage).path(lambda: watch.got_on(held))
            data = map_tar(path)
            samples = describe(data, index_tar(shard, path, keep=False), options.id_col, component, headers=True)
            opened = OpenShard(path, data, samples, options.id_col, component, shard.key_dot)
            check_unchanged(shard)
            opened.read_ahead()
            watch.move(held, Step.EMBED, limit.samples(opened.count))
            try:
                yield opened
            finally:
                unmap(opened)
    finally:
        watch.leave(held)


def warm_up(recipes: Sequence[Recipe], options: EmbedOptions) -> None:
    """Open this worker's engine while another worker decides; it takes the decision when its first task brings it.

    Args:
        recipes: What is computed in one pass.
        options: As for the embedding tasks.
    """
    with shared_engine(recipes, resolve_device(options.device), options.images):
        pass


@task(
    name="decide",
    task_run_name="decide decoder and batch size",
    cache_policy=NO_CACHE,  # the records of the layers keep it
    persist_result=False,
)
def decide(shards: Sequence[Shard], recipes: Sequence[Recipe], options: EmbedOptions) -> Decision | None:
    """Decide on decoder and batch size; see `decide_here`.

    A decision that cannot be made stops no run: None then has each worker decide for itself, and the log says so. What
    is wrong with a shard or a model is reported where shards are embedded.
    """
    logger = get_run_logger()
    try:
        decision = decide_here(shards, recipes, options)
    except Exception as error:
        logger.warning(
            "undecided, so each worker decides for itself: %s", one_line(error, named=not isinstance(error, Undecided))
        )
        return None
    if decision is not None:
        logger.info("%s decoding, batches of %d images", decision.decoder, decision.batch_size)
    return decision
