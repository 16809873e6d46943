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
from functools import partial
from typing import Any

from prefect import State, flow, task
from prefect.cache_policies import NO_CACHE
from prefect.runtime import flow_run
from prefect.states import Completed

from embedders.base import ImageEmbedder
from embedders.errors import InputError
from flows.artifacts import ProgressArtifact, show_account
from flows.config import EmbedConfig, ImageOptions, ModelOptions, OnError, RunOptions, TableOptions
from flows.interrupt import Terminated, noticing_prefects_signal
from flows.lost_lock import stoppable
from flows.outcome import NO_OUTPUT, RunFailed, checkpoint_of, show_in_a_page, write_account
from flows.output_queue import turn
from flows.prepare import HandedOver, RunProgress, Work, count_shards, handed_over, prepare, received, surely_unfinished
from flows.progress import Progress, ProgressGroup, Silent, progress_here, quiet
from flows.run_labels import last_name, run_tags, tagged
from flows.server import LocalServer, check_server, has_server, parents_server, prefect_server, shared, started_early
from flows.stopped_run import note_what_is_kept
from flows.submission import Submission
from flows.tasks_in_flight import ClusterLost, SettingsOnce, TasksInFlight
from tasks.cluster import Cluster, describe
from tasks.dataset.card import finish_dataset
from tasks.dataset.even_files import missing_parts, part_groups
from tasks.dataset.schema import common_schema
from tasks.embed import EmbedOptions
from tasks.existing_cluster import task_runner
from tasks.group_size import guess
from tasks.hardware import choose_device
from tasks.manifest import Manifest, Timing, account, write_manifest
from tasks.own_cluster import OwnCluster, own_cluster
from tasks.plan import Plan, embedding_jobs, make_plan, passes
from tasks.records import LayerRecord, intact
from tasks.retries import ShardFailure
from tasks.run_lock import LOCKS, in_turn, only_run
from tasks.shards import Shard, sweep
from tasks.storage.folder import Folder
from tasks.wording import counted
from tasks.worker_count import choose_workers


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
    name, part, taken = lock_name(config, embedders), config.run_part, threading.Event()
    settings = "" if part is None else config.common_to_parts

    def taken_over(why: str) -> None:
        taken.set()
        lost(why)

    lock = partial(only_run, run=name, lost=taken_over, part=part, settings=settings)
    with contextlib.ExitStack() as stack:
        alone = [stack.enter_context(lock(config.output))]
        if _dataset_is_another_folder(config):
            alone.append(stack.enter_context(lock(config.dataset, instead="leave out --in-place")))
        _sweep(config, alone)
        try:
            yield
        finally:
            if not taken.is_set():  # what is half-written there now may be the other run's
                _sweep(config, alone)


def _dataset_is_another_folder(config: EmbedConfig) -> bool:
    """Whether a run writes beside the tars, and not into its output there."""
    dataset, output = Folder(config.dataset), Folder(config.output)
    with contextlib.suppress(OSError):  # planning says what is wrong
        return config.in_place and dataset.path("") != output.path("") and dataset.exists()
    return False


def _sweep(config: EmbedConfig, alone: Sequence[Callable[[], bool]]) -> None:
    """Remove half-written files, unless another part may be writing them: not all network file systems can tell."""
    if not all(it() for it in alone):
        return
    sweep(config.output)
    Folder(Folder(config.output).place(LOCKS)).sweep()
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
        progress.found(work.plan)
        return _in_turn(config, progress, partial(_finish_nothing_done, config, work, progress), failed=False)
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


def _in_turn(config: EmbedConfig, progress: Progress, finish: Callable[[bool], Manifest], failed: bool) -> Manifest:
    """Write the account of the output; parts of a run do so one after the other, so that the last one's is whole.

    Args:
        config: The run's parameters.
        progress: Is told if another part takes its time.
        finish: Returns the account, and writes it if the argument is true.
        failed: Whether shards of this run failed; only the run itself can write down why.
    """
    if config.part is None:
        return finish(True)
    write, read = partial(finish, True), None if failed else partial(finish, False)
    return in_turn(config.output, lock_name(config), write, read, progress.note)


def _finish_nothing_done(config: EmbedConfig, work: Work, progress: Progress, write: bool) -> Manifest:
    """Return the account of an output that this run has found done."""
    plan = work.plan if config.part is None else _plan_again(work, config)
    limit, checkpoint = config.quarantine_limit, checkpoint_of(work.embedders[0])
    spent = Timing(time.monotonic() - work.started)
    manifest = account(plan, len(work.plan.embedded), (), spent, 0, max_quarantined=limit, checkpoint=checkpoint)
    if write:
        finish_dataset(plan)
        write_manifest(manifest)
        show_in_a_page(manifest, progress.note, anew=config.part is not None)
    return manifest


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
    name = _run_name(config.dataset, made_models(work)) + ("" if config.part is None else f", part {config.part}")
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
    failures: dict[str, ShardFailure] = {}
    plan, first, anything, unexplained = work.plan, 0.0, work.anything, NO_OUTPUT
    if anything:
        with (
            task_runner(str(config.scheduler)) if cluster is None else cluster.task_runner() as runner,
            progress,
            noticing_prefects_signal(),
            SettingsOnce.now(),
        ):
            try:
                first, plan = _on_the_cluster(runner, work, config, progress, run_progress, failures)
            except ClusterLost as error:
                unexplained = f"not done: {error}"
                progress.note(f"{error}; what is embedded is kept")
                plan = _plan_again(work, config)
    finish = partial(_finish, config, work, progress, plan, first, failures, unexplained, anything)
    manifest = _in_turn(config, progress, finish, failed=bool(failures) or unexplained != NO_OUTPUT)
    run_progress.manifest = manifest
    if manifest.shards_failed or manifest.over_limit:
        raise RunFailed(manifest)
    return manifest


def _finish(
    config: EmbedConfig,
    work: Work,
    progress: Progress,
    plan: Plan,
    first: float,
    failures: Mapping[str, ShardFailure],
    unexplained: str,
    anything: bool,
    write: bool,
) -> Manifest:
    """Return the account of what the output holds now; write it, with the card and the report, if that is asked for."""
    if config.part is not None:  # other parts have gone on meanwhile
        plan = _plan_again(work, config)
    manifest = write_account(
        work,
        config,
        plan,
        failures,
        first=first,
        finish_with=finish_with(config, work),
        unexplained=unexplained,
        write=write,
    )
    if write:
        show_in_a_page(manifest, progress.note, anew=anything or config.part is not None)
    if anything:
        show_account(manifest, plan)
    return manifest


@task(name="done-before", cache_policy=NO_CACHE, persist_result=False)
def done_before(shards: int) -> State[int]:
    """Show the shards that were found done by their key, as one task run."""
    return Completed(name="Cached", message=f"{counted(shards, 'shard')} done before", data=shards)


def _plan_again(work: Work, config: EmbedConfig) -> Plan:
    """What the output holds now: the files are the record, whatever the tasks said."""
    plan = work.plan
    return make_plan(plan.shards, plan.recipes, plan.options, overwrite=True, part=plan.part)


def _on_the_cluster(
    runner: Any,
    work: Work,
    config: EmbedConfig,
    progress: Progress,
    run_progress: RunProgress,
    failures: dict[str, ShardFailure],
) -> tuple[float, Plan]:
    """Do everything that is done by tasks.

    Returns:
        The seconds until the first group was embedded, and what the output holds now.

    Raises:
        ClusterLost: There is no cluster any more.
        InputError: The cluster has no GPU, and one was asked for.
    """
    found = describe(runner.client)
    device = work.device if config.scheduler is None else choose_device_on(found, config.device)
    options = embed_options(config, work, device, work.images // max(found.workers, 1))
    first, passes_left = 0.0, Counter(shard.name for _, shards in embedding_jobs(work.plan) for shard in shards)

    def embedded(shards: Sequence[Shard], records: Sequence[LayerRecord]) -> None:
        nonlocal first
        first = first or time.monotonic() - work.started
        progress.embedded(records)
        passes_left.subtract(shard.name for shard in shards)
        run_progress.embedded += sum(not passes_left[shard.name] for shard in shards)

    tasks = TasksInFlight(runner, config.worker_timeout, progress.note)
    size = guess(work.images, len(work.plan.to_embed), device != "cpu")
    submission = Submission(tasks, work.plan, options, size, embedded, failures, deciders=found.with_gpu)
    submission.embed_all()
    plan = _plan_again(work, config)
    alone = [shard for shard in plan.to_embed if shard.name in failures and failures[shard.name].alone]
    if alone:
        submission.embed_alone(alone, plan)
        plan = _plan_again(work, config)
    if plan.to_merge:
        submission.merge_all(plan)
        plan = _plan_again(work, config)
    if damaged := _damaged(plan, failures):
        submission.options = replace(options, verify=True)
        submission.embed_again(damaged, passes(work.plan.recipes))
        submission.merge_all(_plan_again(work, config))
        plan = _plan_again(work, config)
    if missing := missing_parts(plan):
        submission.write_parts(part_groups(missing), plan.options, common_schema(plan))
    return first, plan


def choose_device_on(cluster: Cluster, asked: str) -> str:
    """Return what the workers of a cluster that is there compute on: "cuda", "cpu", or "auto" for what each has.

    Args:
        cluster: What its workers have.
        asked: What the user asked for: "auto", "gpu" or "cpu".

    Raises:
        InputError: The user asked for a GPU, and no worker has one.
    """
    if asked == "cpu":
        return "cpu"
    if asked == "gpu" and not cluster.with_gpu:
        raise InputError("--device gpu: no worker of this scheduler has a GPU; start some with: dask cuda worker")
    return cluster.device


def embed_options(config: EmbedConfig, work: Work, device: str, images: int = 0) -> EmbedOptions:
    """What embedding tasks need beside shards and recipes."""
    return EmbedOptions(
        config.id_col,
        device,
        raise_on_bad_image=config.on_error is OnError.RAISE,
        images=images,
        staging_space=config.staging_space,
        verify=config.verify,
        shard_timeout=config.shard_timeout,
        strict_ids=config.strict_ids,
    )


def _damaged(plan: Plan, failures: Mapping[str, ShardFailure]) -> list[Shard]:
    """The shards that could not be merged because a layer's file, whole by its footer, has a damaged page."""
    failed = [shard for shard in plan.to_merge if shard.name in failures]
    names = [layer.name for layer in plan.asked]
    return [shard for shard in failed if not all(intact(shard.target, shard.layer_file(name)) for name in names)]


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
