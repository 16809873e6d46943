"""Artifacts in Prefect's UI: a run's progress while it works, its account afterwards.

If an artifact cannot be made, the run only logs a warning.
"""

from __future__ import annotations

import contextvars
import html
import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Self
from urllib.parse import quote
from uuid import UUID

import numpy as np
from prefect.artifacts import (
    create_image_artifact,
    create_link_artifact,
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)

from flows.progress import Pace
from flows.report import REPORT
from flows.report_link import report_link
from flows.run_labels import name_with_hash
from tasks.dataset.sampling import sample_vectors
from tasks.dataset.thumbnails import Pictures
from tasks.manifest import MANIFEST, Manifest, read_quarantine
from tasks.plan import Plan
from tasks.records import LayerRecord
from tasks.storage.folder import Folder
from tasks.wording import counted

SECONDS_PER_UPDATE = 3.0
SHARDS_SHOWN = 500
QUARANTINED_SHOWN = 200
EMBEDDED_PICTURES, QUARANTINED_PICTURES = 16, 16
SIDE = 128
"""Longer side of a thumbnail, in pixels."""
PER_ROW = 8
MESSAGE_LENGTH = 300
"""Characters of a message in a table's cell."""
logger = logging.getLogger(__name__)


class ProgressArtifact:
    """A progress artifact of the current flow run: images done, images per second, time left."""

    def __init__(self, dataset: str, output: str) -> None:
        self.key = artifact_key("progress", dataset, output)
        self.pace = Pace()
        self._artifact: UUID | None = None
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, text: str) -> None:
        """Ignore it: the run's log has it."""

    def found(self, plan: Plan, images: int = 0) -> None:
        """Take the number of shards and images to embed."""
        self.pace = Pace.of(plan, images)

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Count a finished group of shards."""
        self.pace.count(records)

    def __enter__(self) -> Self:
        self.pace = replace(self.pace, started=time.monotonic())
        try:
            made: Any = create_progress_artifact(0.0, key=self.key, description=self.description())
            self._artifact = made
            # The context holds the server's address; without it Prefect would start another server for this thread.
            context = contextvars.copy_context()
            self._thread = threading.Thread(
                target=context.run, args=(self._keep_updated,), name="progress-artifact", daemon=True
            )
            self._thread.start()
        except Exception as error:
            logger.warning("no progress artifact: %s", error)
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()
            self._update()

    def description(self) -> str:
        """Return one line that says how far the run is and how fast."""
        pace = self.pace
        about = max(pace.images_in_all, pace.images)
        return (
            f"{pace.images:,} of about {about:,} images, {pace.progress}; "
            f"{pace.now:,.1f} images/s now, {pace.average:,.1f} on average; {pace.left}; {pace.bad}"
        )

    def _keep_updated(self) -> None:
        while not self._over.wait(SECONDS_PER_UPDATE):
            self._update()

    def _update(self) -> None:
        assert self._artifact is not None
        try:
            update_progress_artifact(self._artifact, progress=100 * self.pace.share, description=self.description())
        except Exception as error:  # the server is away for a moment, or for good
            logger.debug("progress not updated: %s", error)


def artifact_key(kind: str, dataset: str, output: str) -> str:
    """Return the key that all runs from a dataset to an output share, so that the UI shows one artifact's versions.

    Args:
        kind: What the artifact shows, such as "summary".
        dataset: Folder or URL. The key has its last name, and a hash of both.
        output: Folder or URL.

    Example:
        >>> artifact_key("summary", "s3://crawl/LAION 400m/", "s3://vectors/laion")
        'summary-laion-400m-e6eda3a8'
    """
    return name_with_hash(kind, dataset, output)


def show_account(manifest: Manifest, plan: Plan) -> None:
    """Make the artifacts of a finished run: summary, shards, quarantined images, pictures, and the report.

    Args:
        manifest: The run's account.
        plan: Its plan after the work, with the records of the shards.
    """
    for show in (_summary, _shards, _quarantine, _pictures, _report):
        try:
            show(manifest, plan)
        except Exception as error:
            logger.warning("artifact %s: %s", show.__name__.strip("_"), error)


def _summary(manifest: Manifest, plan: Plan) -> None:
    reasons = ", ".join(f"{count:,} {reason}" for reason, count in manifest.quarantined_by_reason.items())
    rows = {
        "samples": f"{manifest.samples:,} = {manifest.embedded:,} embedded + {manifest.quarantined:,} quarantined",
        "quarantined": reasons or "none",
        "shards": f"{manifest.shards:,}, {manifest.shards_cached:,} of them done before, "
        f"{manifest.shards_failed:,} failed",
        "this run": f"{manifest.seconds:,.1f} s, {manifest.images_per_second:,.1f} images/s, start-up excluded",
        "vectors": f"{counted(manifest.dimensions, 'dimension')}, decoded: {manifest.decoders}",
        "rows": manifest.told_rows,
        "dataset": f"`{manifest.metadata}/*.parquet`",
        "account": f"`{manifest.output}/{MANIFEST}`",
    }
    lines = [f"## {manifest.model}", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    lines += [f"\n**Warning:** {warning}" for warning in [*manifest.warnings, *manifest.wrong]]
    lines += [f"\n**Failed:** {manifest.over_limit} (--max-quarantined)"] * bool(manifest.over_limit)
    lines += [f"\n**Failed:** {shard}: {_cell(why)}" for shard, why in list(manifest.failures.items())[:20]]
    if manifest.finish_with:
        lines.append(f"\nRetry does only what failed, as does `{manifest.finish_with}`.")
    create_markdown_artifact("\n".join(lines), key=_key("summary", manifest))


def _shards(manifest: Manifest, plan: Plan) -> None:
    """List the shards that failed, then the others, newest first."""
    rows: list[list[Any]] = [[name, "failed", "", "", "", "", _cell(why)] for name, why in manifest.failures.items()]
    done = sorted(plan.embedded.items(), key=lambda item: -item[1].work.get("ended", 0.0))
    for name, record in done[: max(SHARDS_SHOWN - len(rows), 0)]:
        seconds = record.work.get("ended", 0.0) - record.work.get("began", 0.0)
        rate = f"{record.samples / seconds:,.1f}" if seconds > 0 else ""
        bad = sum(record.quarantined.values())
        rows.append([name, "embedded", record.samples, bad, rate, record.decoder, record.worker])
    header = ["shard", "state", "samples", "quarantined", "images/s while processed", "decoder", "worker or reason"]
    table = [dict(zip(header, row, strict=True)) for row in rows[:SHARDS_SHOWN]]
    description = f"{len(table):,} of {counted(manifest.shards, 'shard')}"
    create_table_artifact(table, _key("shards", manifest), description)


def _quarantine(manifest: Manifest, plan: Plan) -> None:
    rows = read_quarantine(Folder(manifest.output), manifest.column, QUARANTINED_SHOWN, manifest.left_out)
    table = [{name: _cell(value) for name, value in row.items()} for row in rows]
    whole = counted(manifest.quarantined, "quarantined image")
    description = f"{len(rows):,} of {whole}; all are in {manifest.output}/quarantine"
    create_table_artifact(table, _key("quarantine", manifest), description)


def _pictures(manifest: Manifest, plan: Plan) -> None:
    """Show one picture: a sample of the embedded images, and below it quarantined images that can still be shown."""
    output = Folder(manifest.output)
    embedded = sample_vectors(output, manifest.column, EMBEDDED_PICTURES, np.random.default_rng(0)).places
    quarantined = read_quarantine(output, manifest.column, QUARANTINED_PICTURES, manifest.left_out)
    bad = [(row["shard"], row["id"]) for row in quarantined]
    pictures = Pictures.of_manifest(manifest)
    shown = [list(pictures.of(places, SIDE).values()) for places in (embedded, bad)]
    sheet = contact_sheet({"embedded": shown[0], "quarantined": shown[1]})
    if sheet is not None:
        description = "A sample of the embedded images and, below, quarantined images that can still be shown."
        create_image_artifact(sheet, key=_key("pictures", manifest), description=description)


def contact_sheet(groups: dict[str, list[str]]) -> str | None:
    """Return thumbnails in rows under the name of their group, as one SVG in a data URL.

    Args:
        groups: The thumbnails of each group, as data URLs.

    Returns:
        The picture, or None if there is no thumbnail.
    """
    import base64

    parts, y = [], 0
    for name, urls in groups.items():
        if not urls:
            continue
        parts.append(
            f'<text x="4" y="{y + 18}" font-family="sans-serif" font-size="14" fill="#888">{html.escape(name)}</text>'
        )
        y += 26
        for i, url in enumerate(urls):
            at = f'x="{i % PER_ROW * (SIDE + 8)}" y="{y + i // PER_ROW * (SIDE + 8)}"'
            parts.append(f'<image href="{url}" {at} width="{SIDE}" height="{SIDE}"/>')
        y += -(-len(urls) // PER_ROW) * (SIDE + 8)
    if not parts:
        return None
    size = f'width="{PER_ROW * (SIDE + 8)}" height="{y}"'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _report(manifest: Manifest, plan: Plan) -> None:
    """Link to the report if a server hands it out, else say where it is: a page of Prefect's may open no file."""
    output, key = Folder(manifest.output), _key("report", manifest)
    place = output.path(REPORT) if output.is_local else output.place(REPORT)
    description = "A page with the vectors, their neighbours and the quarantined images."
    if (link := report_link(manifest.output)) is not None:
        create_link_artifact(link, link_text=REPORT, key=key, description=f"{description} It is {place}.")
        return
    lines = [f"## {REPORT}", description, f"    {place}"]
    if output.is_local:
        way = f"Copy this into the browser's address bar, on the machine that ran it: `file://{quote(place)}`"
        lines.append(f"{way}. (A browser follows no link from this page to a file.)")
    else:
        lines.append("Copy it from there and open it; it needs nothing beside it.")
    create_markdown_artifact("\n\n".join(lines), key=key, description=description)


def _key(kind: str, manifest: Manifest) -> str:
    return artifact_key(kind, manifest.dataset, manifest.output)


def _cell(value: str) -> str:
    """Return text that fits in a cell of a Markdown table, whatever a file name or a message holds."""
    return " ".join(str(value).split()).replace("|", "\\|")[:MESSAGE_LENGTH]
