"""The summary that a command prints on the terminal once a run is over, and what is wrong with it."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.console import Console

from tasks.manifest import MANIFEST, Manifest, PartAccount, read_quarantine
from tasks.storage.folder import Folder
from tasks.wording import counted

QUARANTINE_SHOWN = 20
"""The most quarantined samples that are listed."""


def print_summary(manifest: Manifest) -> None:
    """Print the account of a run, and where its files are, on standard error."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.quarantined_by_reason.items())
    if manifest.part is not None:
        console.print(_told_part(manifest, manifest.part))
    console.print(
        ("the output so far: " if manifest.part is not None and manifest.shards_missing else "")
        + f"{counted(manifest.samples, 'sample')} = "
        + f"{manifest.embedded:,} embedded + {manifest.quarantined:,} quarantined"
        + (f" ({reasons})" if reasons else "")
    )
    for row in read_quarantine(Folder(manifest.output), manifest.column, QUARANTINE_SHOWN, manifest.left_out):
        console.print(f"  quarantined: {row['shard']}.tar {row['member']}: {row['reason']} ({row['detail']})")
    for name, layer in manifest.layers.items():
        if name != manifest.column:
            console.print(
                f"layer {name}: {counted(layer.samples, 'sample')} = {layer.embedded:,} embedded + "
                f"{layer.quarantined:,} quarantined"
            )
    if manifest.ignored:
        examples = ", ".join(manifest.ignored_examples)
        console.print(f"part of no sample: {manifest.ignored} of the tars' members, such as {examples}")
    if manifest.rows_without_embedding or manifest.embeddings_without_row:
        console.print(
            f"metadata rows without an embedding: {manifest.rows_without_embedding:,}; "
            f"embeddings without a metadata row: {manifest.embeddings_without_row:,}"
        )
    console.print(
        f"{counted(manifest.shards, 'shard')}, {manifest.shards_cached:,} done before"
        + (
            f", {manifest.shards_missing:,} not done yet"
            if manifest.part is not None and manifest.shards_missing
            else ""
        )
        + f"; {counted(manifest.dimensions, 'dimension')}; {manifest.seconds:.1f} s"
    )
    for name, path in _written(manifest):
        console.print(f"{name + ':':11} {path}")


def _told_part(manifest: Manifest, part: PartAccount) -> str:
    """Return the line about this run's own shards: "part 3 of 16: 12 of 200 shards; 96 samples = …"."""
    number, _, count = part.part.partition("/")
    left = part.shards - part.shards_done
    return (
        f"part {number} of {count}: {part.shards:,} of {counted(manifest.shards, 'shard')}"
        + (f", {left:,} of them not done" if left else "")
        + f"; {counted(part.samples, 'sample')} = {part.embedded:,} embedded + {part.quarantined:,} quarantined"
    )


def print_problems(manifest: Manifest) -> None:
    """Print what is wrong with a run on standard error."""
    for warning in manifest.warnings:
        print(f"warning: {warning}", file=sys.stderr)
    for shard, why in manifest.failures.items():
        print(f"failed: {shard}: {why}", file=sys.stderr)
    if manifest.failures:
        failed = counted(manifest.shards_failed, "shard")
        print(f"{failed} failed; this does only what failed: {manifest.finish_with}", file=sys.stderr)
    for what in manifest.wrong:
        print(f"warning: the vectors look wrong: {what}", file=sys.stderr)
    if manifest.over_limit:
        print(f"failed: {manifest.over_limit} (--max-quarantined)", file=sys.stderr)


def _written(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """Yield the name and the path or URL of each thing that the output holds."""
    output = Folder(manifest.output)
    if manifest.rows:
        yield "dataset", f"{manifest.metadata.rstrip('/')}/*.parquet"
    if Folder(output.place("quarantine")).list(".parquet"):
        yield "quarantine", output.place("quarantine/*/*.parquet")
    for name, file in (("account", MANIFEST), ("report", "report.html")):
        if output.has(file):
            yield name, output.place(file)
