"""Build a Prefect flow of your own from the stages: plan a dataset, submit the tasks, finish as `flows.embed` does.

`examples/own_flow.py` is such a flow.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from prefect import get_run_logger
from prefect.exceptions import MissingContextError
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run

from embedders.base import ImageEmbedder
from embedders.errors import one_line
from embedders.recipe import Recipe
from flows.config import EmbedConfig
from flows.embed import embed_options
from flows.outcome import NO_OUTPUT, show_run, write_account
from flows.prepare import Work, prepare
from tasks.dataset.even_files import missing_parts, part_groups, write_parts
from tasks.dataset.schema import common_schema
from tasks.embed import EmbedOptions
from tasks.group_size import SECONDS_OF_A_MERGE, GroupSize, guess, split
from tasks.hardware import count_gpus
from tasks.manifest import Manifest
from tasks.merge_options import MergeOptions
from tasks.plan import Plan, embedding_jobs, make_plan
from tasks.records import LayerRecord
from tasks.retries import ShardFailure, ShardsFailed
from tasks.run_lock import only_run
from tasks.shards import Shard, sweep
from tasks.worker_count import TASKS_PER_WORKER, choose_workers

DEVICES = {"auto": "auto", "gpu": "cuda", "cpu": "cpu"}
"""What a worker computes on, by what was asked for. "auto" is what that worker has: this process may have none."""

CRASHES_TOLD = 3
"""Errors of tasks that could not say which shards they failed at; the flow run's log has all."""


class EmbeddingGroup(NamedTuple):
    """The arguments of one `embed_shards` task: shards, and the layers that they lack and share a pass for."""

    shards: tuple[Shard, ...]
    recipes: tuple[Recipe, ...]
    options: EmbedOptions


class MergingGroup(NamedTuple):
    """The arguments of one `merge_shards` task: embedded shards, and the records of their layers."""

    shards: tuple[Shard, ...]
    records: Mapping[str, Mapping[str, LayerRecord]]
    options: MergeOptions


@dataclass(frozen=True)
class DatasetPlan:
    """What the output of a dataset holds and lacks; `plan_dataset` makes it.

    Attributes:
        config: The parameters of the run.
        work: What the run started from.
        now: What the output held when it was read last; see `again`.

    Example:
        >>> embedded = [embed_shards.submit(*group) for group in plan.groups_to_embed()]  # doctest: +SKIP
        >>> wait(embedded)  # doctest: +SKIP
        >>> merged = [merge_shards.submit(*group) for group in plan.again().groups_to_merge()]  # doctest: +SKIP
    """

    config: EmbedConfig
    work: Work
    now: Plan

    @property
    def shards(self) -> tuple[Shard, ...]:
        """Return all shards of the dataset."""
        return self.now.shards

    @property
    def id_col(self) -> str:
        """Return the name of the column with the ids."""
        return self.config.id_col

    def groups_to_embed(self, workers: int | None = None) -> list[EmbeddingGroup]:
        """Return what is left to embed, in groups for one task each.

        Args:
            workers: How many workers share them; by default as many as `flows.embed` would start here.
        """
        shards = self.now.to_embed
        device = self.work.device
        here = "cuda" if device != "cpu" and count_gpus() else "cpu"
        workers = workers or choose_workers(here, self.config.workers, len(shards))
        options = embed_options(self.config, self.work, device, self.work.images // workers)
        size = guess(self.work.images, len(shards), here == "cuda")
        return [
            EmbeddingGroup(group, recipes, options)
            for recipes, lacking in embedding_jobs(self.now)
            for group in split(lacking, size, workers * TASKS_PER_WORKER)
        ]

    def groups_to_merge(self) -> list[MergingGroup]:
        """Return the shards that are embedded and whose rows are missing or out of date, in groups for one task each.

        What was embedded after this plan was made counts in the plan that `again` returns.
        """
        now, workers = self.now, choose_workers("cpu", self.config.workers, len(self.now.to_merge))
        groups = split(now.to_merge, GroupSize(SECONDS_OF_A_MERGE), workers * TASKS_PER_WORKER)
        return [MergingGroup(group, {s.name: now.records(s) for s in group}, now.options) for group in groups]

    def again(self) -> DatasetPlan:
        """Return the plan of what the output holds now: the files are the record, whatever the tasks have said."""
        now = self.now
        return replace(self, now=make_plan(now.shards, now.recipes, now.options, overwrite=True))


def plan_dataset(
    dataset: str,
    output: str,
    embedder: ImageEmbedder | Sequence[ImageEmbedder] | None = None,
    **parameters: Any,
) -> DatasetPlan:
    """Read what an output holds of a dataset, and find what can be found wrong. Nothing is written.

    Args:
        dataset: Folder or fsspec URL with the shards, as the workers see it too.
        output: Folder or fsspec URL for what is made.
        embedder: By default a TimmImageEmbedder with the parameters given. Several make a layer each.
        parameters: The other fields of `flows.config.EmbedConfig`, such as `id_col`, `overwrite` or `device`. Where
            the tasks run is up to the flow's task runner.

    Raises:
        InputError: The call or its input is wrong; one line says what and what to do.

    Example:
        >>> plan = plan_dataset("shards", "out", TimmImageEmbedder("resnet50"))  # doctest: +SKIP
        >>> [len(group.shards) for group in plan.groups_to_embed()]  # doctest: +SKIP
        [32, 32, 17]
    """
    config = EmbedConfig(dataset=str(dataset), output=str(output), **parameters)
    embedders = () if embedder is None else (embedder,) if isinstance(embedder, ImageEmbedder) else tuple(embedder)
    work = prepare(config, embedders, DEVICES[config.device])
    for notice in work.notices:
        _warn(notice)
    return DatasetPlan(config, work, work.plan)


@contextlib.contextmanager
def only_writer(output: str) -> Iterator[None]:
    """Keep other runs away from an output within the block, and clear away what killed runs have left half-written.

    Args:
        output: Folder or fsspec URL of the output. With `in_place` hold the dataset's folder in the same way.

    Raises:
        InputError: Another run writes there, or the output cannot be written to.

    Example:
        >>> with only_writer("out"):  # doctest: +SKIP
        ...     plan = plan_dataset("shards", "out", TimmImageEmbedder("resnet50"))
    """
    with only_run(output, str(flow_run.flow_name or "a script"), _warn):
        sweep(output)
        try:
            yield
        finally:
            sweep(output)


def finish(plan: DatasetPlan, futures: Iterable[PrefectFuture[Any]] = ()) -> Manifest:
    """Wait for the tasks of a flow and leave what `flows.embed` leaves: manifest, schema, card, report and artifacts.

    With `rows_per_file` the files with even numbers of rows are written first, in tasks of the flow.

    Args:
        plan: What the flow has worked on. The output is read again here.
        futures: Of the flow's tasks: what failed in them is in the manifest.

    Returns:
        The account, from the files in the output.

    Raises:
        RunFailed: Some shards failed, or more samples are quarantined than `max_quarantined` allows. All else is
            written, and `manifest` of the exception says what failed and why. Another run does only that.

    Example:
        >>> finish(plan, [*embedded, *merged]).embedded  # doctest: +SKIP
        40000
    """
    failures, crashes = _failures(futures)
    plan = plan.again()
    if missing := missing_parts(plan.now):
        output, options, schema = plan.shards[0].output, plan.now.options, common_schema(plan.now)
        written = [write_parts.submit(parts, output, options, schema) for parts in part_groups(missing)]
        more, crashed = _failures(written)
        failures, crashes, plan = failures | more, crashes + crashed, plan.again()
    manifest = write_account(
        plan.work,
        plan.config,
        plan.now,
        failures,
        first=_seconds_to_first(plan),
        finish_with=f"another run of {flow_run.flow_name or 'this script'}",
        unexplained="; ".join([NO_OUTPUT, *list(dict.fromkeys(crashes))[:CRASHES_TOLD]]),
    )
    return show_run(manifest, plan.now, _warn, anew=plan.work.anything)


def _failures(futures: Iterable[PrefectFuture[Any]]) -> tuple[dict[str, ShardFailure], list[str]]:
    """Wait for tasks; return the shards that they report as failed, and a line for each task that could not report."""
    failures: dict[str, ShardFailure] = {}
    crashes = []
    for future in futures:
        try:
            future.result()
        except ShardsFailed as error:
            failures |= {failure.shard: failure for failure in error.failures}
        except Exception as error:  # its worker died, or Prefect could not run it
            crashes.append(one_line(error, named=True))
    return failures, crashes


def _seconds_to_first(plan: DatasetPlan) -> float:
    """Return the seconds from the planning to the end of the first shard of this run; 0 if there was none to embed."""
    fresh = [record for name, record in plan.now.embedded.items() if name not in plan.work.plan.embedded]
    ended = [record.work["ended"] for record in fresh if "ended" in record.work]
    began = time.time() - (time.monotonic() - plan.work.started)
    return max(0.0, min(ended) - began) if ended else 0.0


def _warn(text: str) -> None:
    """Log a line that a person should read, in the flow run's log if there is one."""
    try:
        get_run_logger().warning(text)
    except MissingContextError:
        logging.getLogger(__name__).warning(text)
