"""The outcome of a run: its account from the files on disk, left in the output and shown in Prefect."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from embedders.base import ImageEmbedder
from flows.artifacts import show_account
from flows.config import EmbedConfig
from flows.prepare import Work
from flows.report import REPORT, write_report
from tasks.dataset.card import finish_dataset
from tasks.dataset.even_files import missing_parts
from tasks.manifest import MANIFEST, Manifest, Timing, account, write_manifest
from tasks.plan import Plan
from tasks.records import seconds_in_work
from tasks.retries import ShardFailure
from tasks.storage.folder import Folder
from tasks.wording import counted

NO_OUTPUT = "its task ended and left no whole output"


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


def write_account(
    work: Work,
    config: EmbedConfig,
    plan: Plan,
    failures: Mapping[str, ShardFailure],
    *,
    first: float,
    finish_with: str,
    unexplained: str = NO_OUTPUT,
    write: bool = True,
) -> Manifest:
    """Write the dataset's schema and card and the manifest, from what the output holds.

    Args:
        work: What the run started from.
        config: Its parameters.
        plan: What the output holds now.
        failures: What tasks have reported, by shard; those of shards that are done all the same do not count.
        first: Seconds from the start of the run to its first group of shards.
        finish_with: The call that does what failed.
        unexplained: Why a shard is not done whose failure no task has reported.
        write: Whether to write anything; else the account is only returned.

    Returns:
        The manifest. If it could not be written, that is among its failures.
    """
    left = {shard.name for shard in [*plan.to_embed, *plan.to_merge]} | {part.label for part in missing_parts(plan)}
    failed = {name: failure for name, failure in failures.items() if name in left}
    for shard in [*plan.to_embed, *plan.to_merge]:
        failed.setdefault(shard.name, ShardFailure(shard.name, unexplained, True))
    fresh = plan.embedded_since(work.plan)
    samples = sum(record.samples for record in fresh)
    spent = Timing(time.monotonic() - work.started, first, seconds_in_work(fresh))
    limit, checkpoint = config.quarantine_limit, checkpoint_of(work.embedders[0])
    cached = len(work.plan.embedded)
    manifest = account(plan, cached, list(failed.values()), spent, samples, finish_with, limit, checkpoint)
    try:
        if write:
            finish_dataset(plan)
            write_manifest(manifest)
    except OSError as error:
        failure = {MANIFEST: f"could not be written: {error}"}
        manifest = manifest.model_copy(update={"failures": manifest.failures | failure, "finish_with": finish_with})
    return manifest


def show_run(manifest: Manifest, plan: Plan, note: Callable[[str], None], *, anew: bool) -> Manifest:
    """Write report.html, make the artifacts in Prefect, and return the manifest.

    Args:
        manifest: The run's account.
        plan: What the output holds.
        note: Called with a line if the page cannot be made.
        anew: Whether the run did anything: only then are there artifacts, and a page in place of an earlier one.

    Raises:
        RunFailed: Some shards failed, or too many samples are quarantined.
    """
    show_in_a_page(manifest, note, anew=anew)
    if anew:
        show_account(manifest, plan)
    if manifest.shards_failed or manifest.over_limit:
        raise RunFailed(manifest)
    return manifest


def show_in_a_page(manifest: Manifest, note: Callable[[str], None], anew: bool = False) -> None:
    """Write report.html; that it cannot be made costs no run its status.

    Args:
        manifest: The run's account.
        note: Called with a line if the page cannot be made.
        anew: Also where there is one.
    """
    try:
        if anew or not Folder(manifest.output).has(REPORT):
            write_report(manifest.output, note=note)
    except Exception as error:
        note(f"warning: no {REPORT}: {type(error).__name__}: {error}")


def checkpoint_of(embedder: ImageEmbedder) -> str | None:
    """Return the weights file that an embedder was given; None for one that has none."""
    checkpoint = getattr(embedder, "checkpoint", None)
    return None if checkpoint is None else str(checkpoint)
