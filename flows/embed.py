"""The flow: plan, index, embed, merge, report. And `python -m flows.embed`, its command line."""

# Annotations are no text here: Prefect loads the flow of a deployment from this file's path, where text names nothing.

import contextlib
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.futures import as_completed
from prefect.runtime import flow_run
from prefect.states import Completed

from embedders.base import ImageEmbedder
from flows.artifacts import ProgressArtifact, show_account
from flows.config import EmbedConfig, ImageOptions, ModelOptions, OnError, RunOptions, TableOptions
from flows.interrupt import Terminated, noticing_prefects_signal
from flows.lost_lock import stoppable
from flows.output_queue import turn
from flows.prepare import HandedOver, RunProgress, Work, count_shards, handed_over, prepare, received, surely_unfinished
from flows.progress import Progress, ProgressGroup, Silent, progress_here, quiet
from flows.report import REPORT, write_report
from flows.run_labels import last_name, run_tags, tagged
from flows.server import LocalServer, check_server, has_server, parents_server, prefect_server, shared, started_early
from flows.stopped_run import note_what_is_kept
from tasks.dataset.card import finish_dataset
from tasks.dataset.even_files import missing_parts, part_groups, write_parts
from tasks.dataset.schema import common_schema
from tasks.embed import EmbedOptions, embed_shards
from tasks.existing_cluster import task_runner
from tasks.hardware import choose_device
from tasks.index import index_shards
from tasks.manifest import MANIFEST, Manifest, Timing, account, write_manifest
from tasks.merge import SHARDS_PER_MERGE, merge_shards
from tasks.own_cluster import OwnCluster, own_cluster
from tasks.plan import Plan, embedding_jobs, group_shards, make_plan, passes
from tasks.records import intact, seconds_in_work
from tasks.retries import ShardFailure, ShardsFailed
from tasks.run_lock import only_run
from tasks.shards import Shard, sweep
from tasks.storage.folder import Folder
from tasks.wording import counted
from tasks.worker_count import choose_workers

ALONE_IN_VAIN = 8
"""Shards that fail one after the other, each in a task of its own, before the rest is not tried so any more."""


class RunFailed(Exception):
    """Some shards failed after their retries, or too many samples are quarantined; `manifest` says which.

    All others are done.
    """

    def __init__(self, manifest: Manifest) -> None:
        named = [f"{shard}: {why}" for shard, why in manifest.failures.items()]
        told = "; ".join([*named[:3], "…"] if len(named) > 3 else named)
        failed = f"{manifest.shards_failed:,} of {counted(manifest.shards, 'shard')} failed ({told})"
        failed += f"; this does only what failed: {manifest.finish_with}"
        why = [failed] * bool(manifest.shards_failed) + [manifest.over_limit] * bool(manifest.over_limit)
        super().__init__("; ".join(why))
        self.manifest = manifest


def embed_dataset(
    dataset: str,
    output: str,
    embedder: ImageEmbedder | Sequence[ImageEmbedder] | None = None,
    *,
    progress: Progress | None = None,
    verbose: bool = False,
    **parameters: Any,
) -> Manifest:
    """Embed every image of a dataset, doing only what is missing.

    Args:
        dataset: Folder or fsspec URL with the shards.
        output: Folder or fsspec URL for what is made.
        embedder: By default a TimmImageEmbedder with the parameters given. Several make a layer each, in one pass if
            they can share the decoding.
        progress: Shows what happens; by default a live view on a terminal or in a notebook, nothing elsewhere.
        verbose: Let Prefect and Dask log too.
        parameters: The other fields of `flows.config.EmbedConfig`.

    Returns:
        The account. `shards_failed` is 0 unless some shards failed after their retries, and `over_limit` is empty
        unless more samples are quarantined than `max_quarantined` allows.

    Raises:
        InputError: The call or its input is wrong; nothing is written then.

    Example:
        >>> embed_dataset("shards", "out", model_name="resnet50", device="cpu").embedded  # doctest: +SKIP
        40000
    """
    config = EmbedConfig(dataset=str(dataset), output=str(output), **parameters)
    embedders = () if embedder is None else (embedder,) if isinstance(embedder, ImageEmbedder) else tuple(embedder)
    with contextlib.nullcontext() if verbose else quiet():
        return run(config, embedders, progress or progress_here())


def run(config: EmbedConfig, embedders: Sequence[ImageEmbedder], progress: Progress) -> Manifest:
    """Plan, and start Prefect's flow if there is anything to do or a server that should know of the run.

    Raises:
        KeyboardInterrupt, Terminated: The run was stopped; a note of the exception says how far it came.
    """

    def lost(why: str) -> None:
        progress.note(why)
        os.kill(os.getpid(), signal.SIGINT)

    with (
        _alone(config, embedders, lost),
        started_early(surely_unfinished(config, _known_columns(config, embedders))) as server,
        _cluster_early(config, server) as cluster,
    ):
        return _run(config, embedders, progress, server, cluster)


def _known_columns(config: EmbedConfig, embedders: Sequence[ImageEmbedder]) -> Sequence[str]:
    """Return the names of the layers that are asked for, as far as they are known before anything is imported."""
    if embedders:
        return [layer for embedder in embedders for layer in embedder.layers]
    return () if config.embedder is not None else config.columns


@contextlib.contextmanager
def _cluster_early(config: EmbedConfig, server: LocalServer | None) -> Iterator[OwnCluster | None]:
    """The workers of a run that has surely something to do, starting while it is planned.

    On GPUs only: on the CPU they would take from the planning what they gain.
    """
    if server is None or config.scheduler is not None or choose_device(config.device) != "cuda":
        yield None
        return
    workers = choose_workers("cuda", config.workers, count_shards(config))
    with shared(server), own_cluster("cuda", workers) as cluster:
        yield cluster


@contextlib.contextmanager
def _alone(config: EmbedConfig, embedders: Sequence[ImageEmbedder], lost: Callable[[str], None]) -> Iterator[None]:
    """Be the only run over what is written to, and leave no half-written file there, of this run or an earlier one.

    In place that is the dataset too: of two runs that add a column to one file, one would be lost.
    """
    name, taken = lock_name(config, embedders), threading.Event()

    def taken_over(why: str) -> None:
        taken.set()
        lost(why)

    with contextlib.ExitStack() as stack:
        stack.enter_context(only_run(config.output, name, taken_over))
        if _dataset_is_another_folder(config):
            stack.enter_context(only_run(config.dataset, name, taken_over, instead="leave out --in-place"))
        _sweep(config)
        try:
            yield
        finally:
            if not taken.is_set():  # what is half-written there now may be the other run's
                _sweep(config)


def _dataset_is_another_folder(config: EmbedConfig) -> bool:
    """Whether a run writes beside the tars, and not into its output there."""
    dataset, output = Folder(config.dataset), Folder(config.output)
    with contextlib.suppress(OSError):  # planning says what is wrong
        return config.in_place and dataset.path("") != output.path("") and dataset.exists()
    return False


def _sweep(config: EmbedConfig) -> None:
    sweep(config.output)
    if config.in_place:
        Folder(config.dataset).sweep()


def _run(
    config: EmbedConfig,
    embedders: Sequence[ImageEmbedder],
    progress: Progress,
    server: LocalServer | None,
    early: OwnCluster | None,
) -> Manifest:
    if has_server():
        check_server()
    work = prepare(config, embedders)
    for notice in work.notices:
        progress.note(notice)
    if not work.anything and not has_server():
        spent = Timing(time.monotonic() - work.started)
        finish_dataset(work.plan)
        limit, checkpoint = config.quarantine_limit, checkpoint_of(work.embedders[0])
        manifest = account(work.plan, len(work.plan.shards), (), spent, 0, max_quarantined=limit, checkpoint=checkpoint)
        write_manifest(manifest)
        progress.found(work.plan)
        _show_in_a_page(manifest, progress)
        return manifest
    run_progress = RunProgress(len(work.plan.embedded))
    try:
        with prefect_server(server, wait=False) as local, _cluster(work, config, early) as cluster:
            if local is not None:
                local.wait()
            with handed_over(HandedOver(work, progress, run_progress, cluster)):
                # The caller gets the manifest itself, so none is kept for it.
                named = embed.with_options(flow_run_name=run_name(config, work), persist_result=False)
                return named(config.dataset, config.output, **config.groups())
    except RunFailed as failed:
        return failed.manifest
    except (KeyboardInterrupt, Terminated) as stop:
        done = f"{run_progress.embedded:,} of {counted(len(work.plan.shards), 'shard')} embedded, and kept"
        stop.add_note(f"stopped: {done}; this goes on: {finish_with(config, work)}")
        raise
    except Exception as error:
        if run_progress.manifest is None:
            raise
        progress.note(f"the run is through, but Prefect could not be told ({type(error).__name__}: {error})")
        return run_progress.manifest


@contextlib.contextmanager
def _cluster(work: Work, config: EmbedConfig, early: OwnCluster | None = None) -> Iterator[OwnCluster | None]:
    """The workers of a run, on their way; none if there is nothing to do, or a cluster that is there is to be used."""
    if config.scheduler is not None or not work.anything:
        yield None
        return
    if early is not None:
        yield early
        return
    with own_cluster(work.device, work.workers(config)) as cluster:
        yield cluster


def lock_name(config: EmbedConfig, embedders: Sequence[ImageEmbedder] = ()) -> str:
    """What another run over the same output is told that this one is."""
    names = [type(embedder).__name__ for embedder in embedders]
    return _run_name(config.dataset, names or asked_models(config))


def asked_models(config: ModelOptions) -> Sequence[str]:
    """The models that parameters name, or their custom embedder."""
    return (config.embedder,) if config.embedder else config.model_name


def made_models(work: Work) -> Sequence[str]:
    """The models, or classes of custom embedders, that a planned run embeds with."""
    made = (str(layer.made_of.get("model") or layer.made_of.get("embedder")) for layer in work.plan.asked)
    return tuple(dict.fromkeys(made))


def _run_name(dataset: str, models: Sequence[str]) -> str:
    return f"embed {last_name(dataset)} with {' and '.join(models)}"


def finish_with(config: EmbedConfig, work: Work) -> str:
    """The call that does what a run has left undone."""
    if work.given:
        return f"embed_dataset({config.dataset!r}, {config.output!r}, …), as before"
    return config.command()


def run_name(config: EmbedConfig, work: Work) -> str:
    """ "embed demo-data with tf_efficientnet_lite0" """
    name = _run_name(config.dataset, made_models(work))
    return name.replace("{", "{{").replace("}", "}}")  # Prefect takes it for a format string


def deployed_run_name() -> str:
    """The same for a run that a deployment starts, from its parameters."""
    given = flow_run.parameters
    options = given.get("model") or {}
    model = ModelOptions.model_validate(options) if isinstance(options, dict) else options
    return _run_name(str(given.get("dataset")), asked_models(model))


@flow(
    name="embed",
    flow_run_name=deployed_run_name,
    persist_result=True,  # who starts a deployment gets the manifest: `run_deployment(...).state.result()`
    result_serializer="json",  # by default it would be a pickle, and so would the error of a failed run
    on_cancellation=[note_what_is_kept],
    on_crashed=[note_what_is_kept],
)
def embed(
    dataset: str,
    output: str,
    model: ModelOptions = ModelOptions(),  # noqa: B008  # frozen
    images: ImageOptions = ImageOptions(),  # noqa: B008
    table: TableOptions = TableOptions(),  # noqa: B008
    work: RunOptions = RunOptions(),  # noqa: B008
) -> Manifest:
    """Give every image of a WebDataset an embedding, as a new column of its metadata, doing only what is missing.

    Call it as a flow, as a subflow of another flow, or through a deployment. Runs over one output take turns.

    Args:
        dataset: Folder or fsspec URL with the .tar shards and their metadata .parquet, as the worker sees it.
        output: Folder or fsspec URL that gets layers, metadata, quarantine and manifest.
        model: Which model, and how it computes.
        images: How images are found and decoded.
        table: The dataset that is made.
        work: Where it runs, and what is done again.

    Returns:
        The account of the run. A deployment's run keeps it as its result.

    Raises:
        RunFailed: Some shards failed after their retries, or too many samples are quarantined; a second run does only
            the shards that failed.
        LockLost: Another run has taken over the output.
    """
    # Prefect's form takes descriptions from a docstring of this form only.
    config = EmbedConfig.of(dataset, output, model, images, table, work)
    received_work = received()
    if received_work is not None:
        with tagged(run_tags(dataset, made_models(received_work.work))):
            return _embed(config, *received_work)
    written = [output, dataset] if _dataset_is_another_folder(config) else [output]
    with (
        parents_server(),
        tagged(run_tags(dataset, asked_models(config))),
        stoppable() as stop,
        turn(*written),
        _alone(config, (), stop),
    ):
        found = prepare(config)
        with _cluster(found, config) as cluster:
            return _embed(config, found, Silent(), RunProgress(len(found.plan.embedded)), cluster)


def _embed(
    config: EmbedConfig, work: Work, progress: Progress, run_progress: RunProgress, cluster: OwnCluster | None
) -> Manifest:
    progress = ProgressGroup(progress, ProgressArtifact(config.dataset, config.output))
    progress.found(work.plan, work.images)
    if work.plan.embedded:
        done_before.with_options(task_run_name=f"{counted(len(work.plan.embedded), 'shard')} done before")(
            len(work.plan.embedded)
        )
    workers = work.workers(config)
    failures: dict[str, ShardFailure] = {}
    plan, first, anything = work.plan, 0.0, work.anything
    if anything:
        with (
            task_runner(str(config.scheduler)) if cluster is None else cluster.task_runner() as runner,
            progress,
            noticing_prefects_signal(),
        ):
            first = _embed_all(runner, work, config, workers, progress, run_progress, failures)
            plan = _plan_again(work, config)
            _merge_all(runner, plan, work, config, failures)
            if damaged := _damaged(plan, failures):
                _embed_damaged(runner, damaged, work, config, failures)
                _merge_all(runner, _plan_again(work, config), work, config, failures)
            _write_parts(runner, _plan_again(work, config), work, failures)
        plan = _plan_again(work, config)
    left = {shard.name for shard in [*plan.to_embed, *plan.to_merge]} | {part.label for part in missing_parts(plan)}
    failures = {name: failure for name, failure in failures.items() if name in left}
    for shard in [*plan.to_embed, *plan.to_merge]:
        failures.setdefault(shard.name, ShardFailure(shard.name, "its task ended and left no whole output", True))
    fresh = [record for name, record in plan.embedded.items() if name not in work.plan.embedded]
    cached = len(work.plan.embedded)
    samples = sum(record.samples for record in fresh)
    spent = Timing(time.monotonic() - work.started, first, seconds_in_work(fresh))
    again, limit, checkpoint = finish_with(config, work), config.quarantine_limit, checkpoint_of(work.embedders[0])
    manifest = account(plan, cached, list(failures.values()), spent, samples, again, limit, checkpoint)
    try:
        finish_dataset(plan)
        write_manifest(manifest)
    except OSError as error:
        note = {MANIFEST: f"could not be written: {error}"}
        manifest = manifest.model_copy(update={"failures": manifest.failures | note, "finish_with": again})
    run_progress.manifest = manifest
    _show_in_a_page(manifest, progress, anew=anything)
    if anything:
        show_account(manifest, plan)
    if manifest.shards_failed or manifest.over_limit:
        raise RunFailed(manifest)
    return manifest


def checkpoint_of(embedder: ImageEmbedder) -> str | None:
    """The weights file that an embedder was given; None for one that has none."""
    checkpoint = getattr(embedder, "checkpoint", None)
    return None if checkpoint is None else str(checkpoint)


def _show_in_a_page(manifest: Manifest, progress: Progress, anew: bool = False) -> None:
    """Write report.html; that it cannot be made costs no run its status.

    Args:
        anew: Also where there is one.
    """
    try:
        if anew or not Folder(manifest.output).has(REPORT):
            write_report(manifest.output, note=progress.note)
    except Exception as error:
        progress.note(f"warning: no {REPORT}: {type(error).__name__}: {error}")


@task(name="done-before", cache_policy=NO_CACHE, persist_result=False)
def done_before(shards: int) -> State[int]:
    """Show the shards that were found done by their key, as one task run."""
    return Completed(name="Cached", message=f"{counted(shards, 'shard')} done before", data=shards)


def _plan_again(work: Work, config: EmbedConfig) -> Plan:
    """What the output holds now: the files are the record, whatever the tasks said."""
    return make_plan(work.plan.shards, work.plan.recipes, work.plan.options, overwrite=True)


def _embed_all(
    runner: Any,
    work: Work,
    config: EmbedConfig,
    workers: int,
    progress: Progress,
    run_progress: RunProgress,
    failures: dict[str, ShardFailure],
) -> float:
    """Index and embed every missing shard, a group as soon as it is indexed; the seconds until the first was done."""
    options = embed_options(config, work, work.images // workers)
    futures = {}
    for recipes, shards in embedding_jobs(work.plan):
        for group in group_shards(shards, workers):
            indexed = []
            parameters: dict[str, Any]
            if recipes[0].embedder.use_index_files and group[0].source.is_local:
                beside = work.device == "cuda"
                parameters = {"shards": group, "id_col": config.id_col, "span": span(group), "beside": beside}
                indexed = [runner.submit(index_shards, parameters=parameters)]
            parameters = {"shards": group, "recipes": recipes, "options": options, "span": span(group)}
            futures[runner.submit(embed_shards, parameters=parameters, wait_for=indexed)] = group
    first, passes_left = 0.0, Counter(shard.name for group in futures.values() for shard in group)
    for done, records in _drain(futures, failures):
        first = first or time.monotonic() - work.started
        progress.embedded(records)
        passes_left.subtract(shard.name for shard in done)
        run_progress.embedded += sum(not passes_left[shard.name] for shard in done)
    if any(failure.alone for failure in failures.values()):
        plan = _plan_again(work, config)
        alone = [shard for shard in plan.to_embed if shard.name in failures and failures[shard.name].alone]
        _embed_alone(runner, alone, plan, options, failures)
    return first


def embed_options(config: EmbedConfig, work: Work, images: int = 0) -> EmbedOptions:
    """What embedding tasks need beside shards and recipes."""
    return EmbedOptions(
        config.id_col,
        work.device,
        raise_on_bad_image=config.on_error is OnError.RAISE,
        images=images,
        staging_space=config.staging_space,
        verify=config.verify,
        shard_timeout=config.shard_timeout,
        strict_ids=config.strict_ids,
    )


def _embed_alone(
    runner: Any, shards: Sequence[Shard], plan: Plan, options: EmbedOptions, failures: dict[str, ShardFailure]
) -> None:
    """Try shards once more whose failure may be another one's: each by itself, so that it is nobody else's this time.

    One after the other: what is assigned to a worker that dies counts as having had a part in it.
    """
    in_vain = 0
    for shard in shards:
        if in_vain == ALONE_IN_VAIN:
            return
        del failures[shard.name]
        for recipes in passes(plan.missing(shard)):
            parameters = {"shards": (shard,), "recipes": recipes, "options": options, "span": span([shard])}
            for _ in _drain({runner.submit(embed_shards, parameters=parameters): (shard,)}, failures):
                pass
        in_vain = in_vain + 1 if shard.name in failures else 0


def _damaged(plan: Plan, failures: Mapping[str, ShardFailure]) -> list[Shard]:
    """The shards that could not be merged because a layer's file, whole by its footer, has a damaged page."""
    failed = [shard for shard in plan.to_merge if shard.name in failures]
    names = [layer.name for layer in plan.asked]
    return [shard for shard in failed if not all(intact(shard.target, shard.layer_file(name)) for name in names)]


def _embed_damaged(
    runner: Any, shards: Sequence[Shard], work: Work, config: EmbedConfig, failures: dict[str, ShardFailure]
) -> None:
    """Embed shards again that look done."""
    options = replace(embed_options(config, work), verify=True)
    futures = {}
    for shard in shards:
        del failures[shard.name]
        for recipes in passes(work.plan.recipes):
            parameters = {"shards": (shard,), "recipes": recipes, "options": options, "span": span([shard])}
            futures[runner.submit(embed_shards, parameters=parameters)] = (shard,)
    for _ in _drain(futures, failures):
        pass


def _merge_all(runner: Any, plan: Plan, work: Work, config: EmbedConfig, failures: dict[str, ShardFailure]) -> None:
    """Join every embedded shard whose merged file is missing or old."""
    options = plan.options
    futures = {}
    for start in range(0, len(plan.to_merge), SHARDS_PER_MERGE):
        group = plan.to_merge[start : start + SHARDS_PER_MERGE]
        records = {shard.name: plan.records(shard) for shard in group}
        parameters = {"shards": group, "records": records, "options": options, "span": span(group)}
        futures[runner.submit(merge_shards, parameters=parameters)] = group
    for _ in _drain(futures, failures):
        pass


def _write_parts(runner: Any, plan: Plan, work: Work, failures: dict[str, ShardFailure]) -> None:
    """Make files of an even size of the merged ones, where that was asked for."""
    missing = missing_parts(plan)
    schema = common_schema(plan) if missing else None
    futures: dict[Any, Sequence[Shard]] = {}
    for group in part_groups(missing):
        parameters = {"parts": group, "output": plan.shards[0].output, "options": plan.options, "schema": schema}
        futures[runner.submit(write_parts, parameters=parameters | {"span": group[0].name})] = ()
    for _ in _drain(futures, failures):
        pass


def _drain(
    futures: Mapping[Any, Sequence[Shard]], failures: dict[str, ShardFailure]
) -> Iterator[tuple[Sequence[Shard], Any]]:
    """Yield the shards and the result of each future as it finishes.

    A failed one is noted for its shards, and stops none of the others.
    """
    future: Any  # Prefect's type knows nothing of the Dask future inside
    for future in as_completed(list(futures)):
        error: BaseException | None = None
        try:
            result = future.result()
        except Exception as raised:
            error = raised
        future.wrapped_future.release()  # a result held on a worker that dies would be computed again
        if error is None:
            yield futures[future], result
        elif isinstance(error, ShardsFailed):
            failures.update({failure.shard: failure for failure in error.failures})
        else:
            for shard in futures[future]:  # its worker died, or Prefect could not run it
                failures[shard.name] = replace(ShardFailure.of(shard.name, error), alone=True)


def span(shards: Sequence[Shard]) -> str:
    """A group of shards as a person says it: "00012" or "00012–00019"."""
    first, last = shards[0].name, shards[-1].name
    return first if first == last else f"{first}\N{EN DASH}{last}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line of `python -m flows.embed`, or of `shard-embed embed`, and return its exit status.

    Args:
        arguments: What follows the command's name; by default this process's.
    """
    from flows import cli

    return cli.main(sys.argv[1:] if arguments is None else arguments, run)


if __name__ == "__main__":
    # By its name: Prefect sends the flow to the workers, and a flow of `__main__` would be sent with all it refers to.
    from flows.embed import main

    sys.exit(main())
