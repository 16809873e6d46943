"""The command line.

Exit status 0: every sample is accounted for; 1: some shards failed, or the vectors are wrong as a whole;
2: the call is wrong; 130 and 143: it was stopped.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from cyclopts import App, CycloptsError, Parameter
from pydantic import ValidationError
from rich.console import Console

from embedders.errors import InputError
from flows.config import EmbedConfig
from flows.interrupt import Terminated, ending_in_time

QUARANTINE_SHOWN = 20

app = App(
    name="python -m flows.embed",
    help="Give every image of a WebDataset an embedding, as a new column of its metadata.",
    help_format="plaintext",
    version_flags=[],
    suppress_keyboard_interrupt=False,
)

Flag = Annotated[bool, Parameter(negative=())]


@app.default
def embed_command(
    config: Annotated[EmbedConfig, Parameter(name="*")],
    *,
    json_: Annotated[bool, Parameter(name="--json", negative=())] = False,
    quiet: Flag = False,
    verbose: Flag = False,
) -> int:
    """Embed a dataset, doing only what is missing.

    Parameters
    ----------
    json_
        Print the manifest on standard output and nothing else there.
    quiet
        Say nothing on the way.
    verbose
        Let Prefect and Dask speak too.
    """
    if not verbose:
        _hush()
    from flows.embed import run
    from flows.progress import Silent, Terminal

    manifest = run(config, None, Silent() if quiet else Terminal())
    if json_:
        print(json.dumps(manifest.model_dump(mode="json")))
    elif not quiet:
        _tell(manifest)
    for shard, why in manifest.failures.items():
        print(f"failed: {shard}: {why}", file=sys.stderr)
    if manifest.failures:
        print(f"{manifest.shards_failed} shards failed; this does only those: {manifest.finish_with}", file=sys.stderr)
    for what in manifest.wrong:
        print(f"warning: the vectors look wrong: {what}", file=sys.stderr)
    return 1 if manifest.failures or manifest.wrong else 0


def _hush() -> None:
    """Keep Prefect's and Dask's own words off the terminal, here and in the workers; the UI still gets them."""
    os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
    import distributed  # noqa: F401  # its import sets levels
    from prefect.logging.configuration import setup_logging

    setup_logging()
    for handler in logging.getLogger().handlers:
        handler.setLevel(logging.CRITICAL)


def _tell(manifest: Any) -> None:
    """The account, for a person."""
    from tasks.report import read_quarantine
    from tasks.storage import Folder

    console = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
    reasons = ", ".join(f"{count} {reason}" for reason, count in manifest.quarantined_by_reason.items())
    console.print(
        f"{manifest.samples} samples = {manifest.embedded} embedded + {manifest.quarantined} quarantined"
        + (f" ({reasons})" if reasons else "")
    )
    for row in read_quarantine(Folder(manifest.output), QUARANTINE_SHOWN):
        console.print(f"  quarantined: {row['shard']}.tar {row['member']}: {row['reason']} ({row['detail']})")
    if manifest.rows_without_embedding or manifest.embeddings_without_row:
        console.print(
            f"{manifest.rows_without_embedding} metadata rows have no embedding, "
            f"{manifest.embeddings_without_row} embeddings have no metadata row"
        )
    console.print(
        f"{manifest.shards} shards, {manifest.shards_cached} of them done before; "
        f"{manifest.dimensions} dimensions; {manifest.seconds:.1f} s"
    )
    for warning in manifest.warnings:
        console.print(f"warning: {warning}")
    console.print(f"dataset:    {manifest.metadata}/*.parquet")
    console.print(f"quarantine: {manifest.output}/quarantine/*.parquet")
    console.print(f"account:    {manifest.output}/manifest.json")
    console.print(f"report:     {manifest.output}/report.html")


def main(arguments: Sequence[str]) -> int:
    """Run the command line; its exit status."""
    try:
        with ending_in_time():
            status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, ValidationError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except (KeyboardInterrupt, Terminated) as stop:
        told = getattr(stop, "__notes__", None) or ["stopped before anything was begun"]
        print(told[-1], file=sys.stderr)
        return 130 if isinstance(stop, KeyboardInterrupt) else 143
    return status or 0


def one_line(error: BaseException) -> str:
    """What went wrong, as one line for a person."""
    cause: BaseException | None = error
    seen: set[int] = set()  # a store's client may raise an error that leads back to itself
    while cause is not None and not isinstance(cause, ValidationError) and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        wrong = " or ".join(dict.fromkeys(str(e["msg"]).removeprefix("Input should be ") for e in cause.errors()))
        return f"{option}: give {wrong}, not {first['input']!r}"
    return " ".join(str(error).split())
