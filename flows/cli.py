"""The command line.

Exit status 0: every sample is accounted for; 1: some shards failed, the vectors are wrong as a whole, or more
samples are quarantined than --max-quarantined allows;
2: the call is wrong; 130 and 143: it was stopped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.help import HelpEntry, HelpPanel, PlainFormatter
from pydantic import ByteSize, ValidationError
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from embedders.errors import InputError
from flows.config import SWITCHED_OFF, EmbedConfig, ImageOptions, ModelOptions, RunOptions, TableOptions
from flows.errors import explain
from flows.interrupt import Terminated, ending_in_time
from flows.progress import Progress, Silent, Terminal
from tasks.counted import counted
from tasks.manifest import MANIFEST, Manifest, read_quarantine
from tasks.storage.folder import Folder

QUARANTINE_SHOWN = 20

COMMON = frozenset(
    {
        *("--dataset", "--output", "--model-name", "--checkpoint", "--no-pretrained", "--batch-size", "--id-col"),
        *(
            "--decode",
            "--on-error",
            "--device",
            "--workers",
            "--scheduler",
            "--json",
            "--quiet",
            "--verbose",
            "--help-all",
        ),
    }
)
"""The options that --help shows; --help-all shows all."""

EXAMPLES = """\
Examples:
  python -m flows.embed /data/laion --output /data/laion-embedded
  python -m flows.embed s3://crawl --output s3://vectors --model-name resnet50
  python -m flows.embed shards --output out --device cpu --json > account.json
The same command again does only what is missing. --help-all shows all options.
Exit status: 0 all accounted for, 1 some shards failed, 2 a wrong call."""


class Compact(PlainFormatter):
    """Help in two columns; only `shown` options, or all."""

    def __init__(self, shown: frozenset[str] | None) -> None:
        super().__init__()
        self.shown = shown

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print a group of options."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=26, no_wrap=True)
        for entry in panel.entries:
            names = entry.positive_names or entry.positive_shorts
            if self.shown is None or self.shown & {*names, *entry.negative_names}:
                if entry.default == "True":  # such a switch is only of use to be put off
                    table.add_row(f"  {entry.negative_names[-1]}", SWITCHED_OFF[entry.negative_names[-1]])
                    continue
                value = "" if entry.choices or entry.positional_label else entry.metavar or ""
                if said := _choices(entry):
                    entry.description.append(Text(f"({said})"))
                table.add_row(f"  {entry.positional_label or names[-1]} {value}".rstrip(), entry.description)
        if table.row_count:
            console.print(f"{panel.title}:", table, sep="\n", markup=False, highlight=False)


def _choices(entry: HelpEntry) -> str:
    """What an option may be, and what it is by default."""
    default, choices = entry.default, ", ".join(entry.choices or ())
    if default in {None, "False", '""'} or entry.positional_label:
        return choices
    if entry.metavar == "BYTESIZE":
        default = ByteSize(default).human_readable()
    elif default.isdecimal():
        default = f"{int(default):,}"
    return f"{choices}; default: {default}" if choices not in {"", default} else f"default: {default}"


ABOUT: dict[str, Any] = {
    "name": "python -m flows.embed",
    "help": "Give every image of a WebDataset an embedding, as a new column of its metadata.",
    "help_epilogue": EXAMPLES,
    "help_format": "plaintext",
    "version_flags": [],
    "suppress_keyboard_interrupt": False,
}
app = App(**ABOUT, help_formatter=Compact(COMMON))
MODEL, IMAGES, TABLE, WORK = (
    Group(name, sort_key=i) for i, name in enumerate(("Model", "Images", "Dataset that is made", "Where it runs"))
)

Flag = Annotated[bool, Parameter(negative=())]
Run = Callable[[EmbedConfig, None, Progress], Manifest]
"""Embeds a dataset and returns the account of the run."""


@app.default
def embed_command(
    dataset: str,
    *,
    output: str,
    model: Annotated[ModelOptions, Parameter(name="*", group=MODEL)] = ModelOptions(),  # noqa: B008  # frozen
    images: Annotated[ImageOptions, Parameter(name="*", group=IMAGES)] = ImageOptions(),  # noqa: B008
    table: Annotated[TableOptions, Parameter(name="*", group=TABLE)] = TableOptions(),  # noqa: B008
    work: Annotated[RunOptions, Parameter(name="*", group=WORK)] = RunOptions(),  # noqa: B008
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Flag = False,
    verbose: Flag = False,
    run: Annotated[Run, Parameter(parse=False)],
) -> int:
    """Embed a dataset, doing only what is missing.

    Parameters
    ----------
    dataset
        Folder or fsspec URL with the .tar shards and their metadata .parquet.
    output
        Folder or fsspec URL that gets embeddings, metadata, quarantine and manifest.
    json_
        Print the manifest on standard output and nothing else there.
    quiet
        Say nothing on the way.
    verbose
        Let Prefect and Dask speak too.
    """
    if not verbose:
        _hush()
    config = EmbedConfig.of(dataset, output, model, images, table, work)
    manifest = run(config, None, Silent() if quiet else Terminal())
    if json_:
        print(json.dumps(manifest.model_dump(mode="json")))
    elif not quiet:
        _print_summary(manifest)
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
    return 1 if manifest.failures or manifest.wrong or manifest.over_limit else 0


def _hush() -> None:
    """Keep Prefect's and Dask's own words off the terminal, here and in the workers; the UI still gets them."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    import distributed  # noqa: F401  # its import sets levels
    from prefect.logging.configuration import setup_logging

    setup_logging()
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.CRITICAL)


def _print_summary(manifest: Manifest) -> None:
    """The account, for a person."""
    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.quarantined_by_reason.items())
    console.print(
        f"{counted(manifest.samples, 'sample')} = {manifest.embedded:,} embedded + {manifest.quarantined:,} quarantined"
        + (f" ({reasons})" if reasons else "")
    )
    for row in read_quarantine(Folder(manifest.output), QUARANTINE_SHOWN, manifest.left_out):
        console.print(f"  quarantined: {row['shard']}.tar {row['member']}: {row['reason']} ({row['detail']})")
    if manifest.ignored:
        examples = ", ".join(manifest.ignored_examples)
        console.print(f"part of no sample: {manifest.ignored} of the tars' members, such as {examples}")
    if manifest.rows_without_embedding or manifest.embeddings_without_row:
        console.print(
            f"metadata rows without an embedding: {manifest.rows_without_embedding:,}; "
            f"embeddings without a metadata row: {manifest.embeddings_without_row:,}"
        )
    console.print(
        f"{counted(manifest.shards, 'shard')}, {manifest.shards_cached:,} done before; "
        f"{counted(manifest.dimensions, 'dimension')}; {manifest.seconds:.1f} s"
    )
    for name, place in _written(manifest):
        console.print(f"{name + ':':11} {place}")


def _written(manifest: Manifest) -> Iterator[tuple[str, str]]:
    """What the output holds, and where: nothing is named that is not there."""
    output = Folder(manifest.output)
    if manifest.rows:
        yield "dataset", f"{manifest.metadata.rstrip('/')}/*.parquet"
    if Folder(output.place("quarantine")).list(".parquet"):
        yield "quarantine", output.place("quarantine/*.parquet")
    for name, file in (("account", MANIFEST), ("report", "report.html")):
        if output.has(file):
            yield name, output.place(file)


def main(arguments: Sequence[str], run: Run) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: What follows the command's name.
        run: `flows.embed.run`, which this file does not import: `flows/embed.py`, which has to be the command, imports
            this file.
    """
    if "--help-all" in arguments:
        App(**ABOUT, help_formatter=Compact(None), default_command=embed_command).help_print([])
        return 0
    try:
        with ending_in_time():
            command, bound, unparsed = app.parse_args(arguments, exit_on_error=False, print_error=False)
            status = command(*bound.args, **bound.kwargs, **dict.fromkeys(unparsed, run))
    except (InputError, CycloptsError, ValidationError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        told = getattr(stop, "__notes__", None) or ["stopped before anything was begun"]
        print(told[-1], file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return status or 0
