"""The command line of `python -m flows.embed`.

| exit status | means |
|---|---|
| 0 | every sample is accounted for |
| 1 | some shards failed, the vectors look wrong, or too many samples are quarantined (--max-quarantined) |
| 2 | the call is wrong; nothing was written |
| 130, 143 | the command was stopped by SIGINT or SIGTERM |
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.help import HelpEntry, HelpPanel, PlainFormatter
from pydantic import ByteSize, ValidationError
from rich.console import Console, ConsoleOptions
from rich.table import Table
from rich.text import Text

from embedders import ImageEmbedder
from embedders.errors import InputError
from flows.config import SWITCHED_OFF, EmbedConfig, ImageOptions, ModelOptions, RunOptions, TableOptions
from flows.errors import explain
from flows.interrupt import Terminated, ending_in_time
from flows.progress import Progress, Silent, Terminal
from flows.summary import print_problems, print_summary
from tasks.manifest import Manifest

COMMON = frozenset({
    "--dataset", "--output", "--model-name", "--checkpoint", "--no-pretrained", "--batch-size", "--id-col", "--decode",
    "--on-error", "--device", "--workers", "--scheduler", "--json", "--quiet", "--verbose", "--help-all",
})  # fmt: skip
"""The options that --help shows; --help-all shows all."""

EXAMPLES = """\
Examples:
  python -m flows.embed /data/laion --output /data/laion-embedded
  python -m flows.embed s3://crawl --output s3://vectors --model-name resnet50
  python -m flows.embed shards --output out --device cpu --json > account.json
You can stop it at any time; the same command does the rest. --help-all shows all options.
Exit status: 0 every sample is accounted for, 1 some shards failed, 2 the call is wrong."""


class TwoColumns(PlainFormatter):
    """Print the help in two columns."""

    def __init__(self, shown: frozenset[str] | None) -> None:
        """Take the options to show; None for all."""
        super().__init__()
        self.shown = shown

    def __call__(self, console: Console, options: ConsoleOptions, panel: HelpPanel) -> None:
        """Print one group of options."""
        table = Table.grid(padding=(0, 2, 0, 0))
        table.add_column(min_width=26, no_wrap=True)
        for entry in panel.entries:
            names = entry.positive_names or entry.positive_shorts
            if self.shown is None or self.shown & {*names, *entry.negative_names}:
                if entry.default == "True":  # the only use of such a switch is to turn it off
                    table.add_row(f"  {entry.negative_names[-1]}", SWITCHED_OFF[entry.negative_names[-1]])
                    continue
                value = "" if entry.choices or entry.positional_label else entry.metavar or ""
                if choices := _choices(entry):
                    entry.description.append(Text(f"({choices})"))
                table.add_row(f"  {entry.positional_label or names[-1]} {value}".rstrip(), entry.description)
        if table.row_count:
            console.print(f"{panel.title}:", table, sep="\n", markup=False, highlight=False)


def _choices(entry: HelpEntry) -> str:
    """Return the values that an option may have, and its default."""
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
app = App(**ABOUT, help_formatter=TwoColumns(COMMON))
MODEL, IMAGES, TABLE, WORK = (
    Group(name, sort_key=i) for i, name in enumerate(("Model", "Images", "Dataset that is made", "Where it runs"))
)

Flag = Annotated[bool, Parameter(negative=())]
Run = Callable[[EmbedConfig, Sequence[ImageEmbedder], Progress], Manifest]
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
    """Embed a dataset; do only what is not done yet.

    Parameters
    ----------
    dataset
        Folder or fsspec URL with the .tar shards and their metadata .parquet.
    output
        Folder or fsspec URL to write layers, metadata, quarantine and manifest to.
    json_
        Print the manifest, and nothing else, on standard output.
    quiet
        Show no progress and no summary.
    verbose
        Show the log lines of Prefect and Dask too.
    """
    if not verbose:
        _silence_libraries()
    config = EmbedConfig.of(dataset, output, model, images, table, work)
    manifest = run(config, (), Silent() if quiet else Terminal())
    if json_:
        print(json.dumps(manifest.model_dump(mode="json")))
    elif not quiet:
        print_summary(manifest)
    print_problems(manifest)
    return 1 if manifest.failures or manifest.wrong or manifest.over_limit else 0


def _silence_libraries() -> None:
    """Keep Prefect's and Dask's log lines off the terminal, here and in the workers. The UI still gets them."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    import distributed  # noqa: F401  # its import sets levels
    from prefect.logging.configuration import setup_logging

    setup_logging()
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.CRITICAL)


def main(arguments: Sequence[str], run: Run) -> int:
    """Run the command line and return its exit status.

    Args:
        arguments: What follows the command's name.
        run: `flows.embed.run`, which this file does not import: `flows/embed.py`, which has to be the command, imports
            this file.
    """
    if "--help-all" in arguments:
        App(**ABOUT, help_formatter=TwoColumns(None), default_command=embed_command).help_print([])
        return 0
    try:
        with ending_in_time():
            command, bound, unparsed = app.parse_args(arguments, exit_on_error=False, print_error=False)
            status = command(*bound.args, **bound.kwargs, **dict.fromkeys(unparsed, run))
    except (InputError, CycloptsError, ValidationError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        notes = getattr(stop, "__notes__", None) or ["stopped before any work began"]
        print(notes[-1], file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return status or 0
