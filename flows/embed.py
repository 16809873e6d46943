"""The flow: plan, index, embed, merge, report. And `python -m flows.embed`, its command line."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any

from prefect import flow
from prefect.futures import as_completed

from embedders.base import ImageEmbedder
from flows.config import EmbedConfig, OnError
from flows.progress import Progress, Silent
from flows.server import has_server, prefect_server
from flows.work import Work, handed_over, merge_options, prepare, received
from tasks.cluster import choose_workers, main_module_hidden, task_runner
from tasks.embed import EmbedOptions, embed_shards
from tasks.failures import ShardFailure, ShardsFailed
from tasks.index import index_shards
from tasks.merge import SHARDS_A_TASK as SHARDS_A_MERGE
from tasks.merge import merge_shards
from tasks.plan import Plan, group_shards, make_plan
from tasks.report import Manifest, Spent, account, write_manifest
from tasks.shards import Shard


class RunFailed(Exception):
    """Some shards failed after their retries; `manifest` names them. All others are done."""

    def __init__(self, manifest: Manifest) -> None:
        super().__init__(
            f"{manifest.shards_failed} of {manifest.shards} shards failed; run the same again to finish them"
        )
        self.manifest = manifest


def embed_dataset(
    dataset: str,
    output: str,
    embedder: ImageEmbedder | None = None,
    *,
    progress: Progress | None = None,
    **parameters: Any,
) -> Manifest:
    """Embed every image of a dataset, doing only what is missing.

    :param dataset: folder or fsspec URL with the shards.
    :param output: folder or fsspec URL for what is made.
    :param embedder: by default a TimmImageEmbedder with the parameters given.
    :param progress: is told what happens; silent by default.
    :param parameters: the other fields of `flows.config.EmbedConfig`.
    :return: the account. `shards_failed` is 0 unless some shards failed after their retries.
    :raises InputError: the call or its input is wrong; nothing is written then.
    """
    config = EmbedConfig(dataset=str(dataset), output=str(output), **parameters)
    return run(config, embedder, progress or Silent())


def run(config: EmbedConfig, embedder: ImageEmbedder | None, progress: Progress) -> Manifest:
    """Plan, and start Prefect's flow if there is anything to do or a server that should know of the run."""
    work = prepare(config, embedder)
    if work.embedder.notice:
        progress.note(work.embedder.notice)
    if not work.anything and not has_server():
        spent = Spent(time.monotonic() - work.started)
        manifest = account(work.plan, len(work.plan.shards), (), work.fingerprint, spent, 0)
        write_manifest(manifest)
        progress.found(work.plan)
        return manifest
    try:
        with handed_over(work, progress), prefect_server():
            return embed.with_options(flow_run_name=run_name(config, work))(config)
    except RunFailed as failed:
        return failed.manifest


def run_name(config: EmbedConfig, work: Work) -> str:
    """ "embed demo-data with tf_efficientnet_lite0" """
    model = str(work.fingerprint.get("model") or work.fingerprint.get("embedder"))
    name = f"embed {config.dataset.rstrip('/').rpartition('/')[2]} with {model}"
    return name.replace("{", "{{").replace("}", "}}")  # Prefect takes it for a format string


@flow(
    name="embed",
    persist_result=False,
    result_serializer="json",  # the error of a failed run is kept in any case, by default as a pickle
)
def embed(config: EmbedConfig) -> Manifest:
    """Give every image of a dataset an embedding.

    :raises RunFailed: some shards failed after their retries; a second run does only those.
    """
    work, progress = received() or (prepare(config, None), Silent())
    progress.found(work.plan)
    workers = choose_workers(work.device, config.workers, len(work.plan.to_embed) or len(work.plan.to_merge))
    failures: dict[str, ShardFailure] = {}
    plan, first = work.plan, 0.0
    if work.anything:
        with main_module_hidden(), task_runner(work.device, workers, config.scheduler) as runner, progress:
            first = _embed_all(runner, work, config, workers, progress, failures)
            plan = _plan_again(work, config)
            _merge_all(runner, plan, work, config, failures)
        plan = _plan_again(work, config)
    for shard in [*plan.to_embed, *plan.to_merge]:
        failures.setdefault(shard.name, ShardFailure(shard.name, "its task ended and left no whole output", True))
    fresh = sum(r.samples for name, r in plan.embedded.items() if name not in work.plan.embedded)
    cached = len(work.plan.embedded)
    spent = Spent(time.monotonic() - work.started, first)
    manifest = account(plan, cached, list(failures.values()), work.fingerprint, spent, fresh)
    write_manifest(manifest)
    if manifest.shards_failed:
        raise RunFailed(manifest)
    return manifest


def _plan_again(work: Work, config: EmbedConfig) -> Plan:
    """What the output holds now: the files are the record, whatever the tasks said."""
    options = merge_options(config, work.embedder)
    return make_plan(work.plan.shards, work.plan.embedder, options, overwrite=True, accepts=work.embedder.accepts)


def _embed_all(
    runner: Any, work: Work, config: EmbedConfig, workers: int, progress: Progress, failures: dict[str, ShardFailure]
) -> float:
    """Index and embed every missing shard, a group as soon as it is indexed; the seconds until the first was done."""
    bad_fails, images = config.on_error is OnError.RAISE, work.images // workers
    options = EmbedOptions(config.id_col, work.plan.embedder, work.device, bad_fails, images, config.staging_space)
    futures = []
    for group in group_shards(work.plan.to_embed, workers):
        indexed = []
        parameters: dict[str, Any]
        if work.embedder.use_index_files and group[0].source.is_local:
            beside = work.device == "cuda"
            parameters = {"shards": group, "id_col": config.id_col, "span": span(group), "beside": beside}
            indexed = [runner.submit(index_shards, parameters=parameters)]
        parameters = {"shards": group, "embedder": work.embedder, "options": options, "span": span(group)}
        futures.append(runner.submit(embed_shards, parameters=parameters, wait_for=indexed))
    first = 0.0
    for records in _drain(futures, failures):
        first = first or time.monotonic() - work.started
        progress.embedded(records)
    return first


def _merge_all(runner: Any, plan: Plan, work: Work, config: EmbedConfig, failures: dict[str, ShardFailure]) -> None:
    """Join every embedded shard whose merged file is missing or old."""
    options = merge_options(config, work.embedder)
    backend = "cudf" if work.device == "cuda" else "pandas"
    futures = []
    for start in range(0, len(plan.to_merge), SHARDS_A_MERGE):
        group = plan.to_merge[start : start + SHARDS_A_MERGE]
        parameters = {"shards": group, "options": options, "backend": backend, "span": span(group)}
        futures.append(runner.submit(merge_shards, parameters=parameters))
    for _ in _drain(futures, failures):
        pass


def _drain(futures: list[Any], failures: dict[str, ShardFailure]) -> Iterator[Any]:
    """The results of futures as they finish. A failed one is noted and stops none of the others."""
    future: Any  # Prefect's type knows nothing of the Dask future inside
    for future in as_completed(futures):
        error: BaseException | None = None
        try:
            result = future.result()
        except Exception as raised:
            error = raised
        future.wrapped_future.release()  # a result held on a worker that dies would be computed again
        if error is None:
            yield result
        elif isinstance(error, ShardsFailed):
            failures.update({failure.shard: failure for failure in error.failures})
        else:
            failures[f"task {future.task_run_id}"] = ShardFailure.of(f"task {future.task_run_id}", error)


def span(shards: Sequence[Shard]) -> str:
    """A group of shards as a person says it: "00012" or "00012–00019"."""
    first, last = shards[0].name, shards[-1].name
    return first if first == last else f"{first}\N{EN DASH}{last}"


if __name__ == "__main__":
    import sys

    from flows.cli import main

    sys.exit(main(sys.argv[1:]))
