"""`python -m flows.export OUT --format npy|faiss|lance`: write a finished dataset in the layout of another tool."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

from cyclopts import App

from embedders.errors import InputError
from flows.errors import exit_status
from tasks.dataset.export.faiss_index import export_faiss
from tasks.dataset.export.lance_dataset import export_lance
from tasks.dataset.export.npy import export_npy
from tasks.dataset.export.source import Dtype, Exported
from tasks.dataset.export.whole_folder import whole_folder
from tasks.storage.folder import Folder, writing
from tasks.wording import counted

WRITERS: dict[str, Callable[..., int]] = {"npy": export_npy, "faiss": export_faiss, "lance": export_lance}

app = App(
    name="python -m flows.export",
    help="Write a dataset that flows.embed made in the layout of another tool.",
    help_format="plaintext",
    version_flags=[],
)


@app.default
def export(
    output: str,
    *,
    format: Literal["npy", "faiss", "lance"],
    to: str | None = None,
    dtype: Dtype = "float32",
    rows_per_file: int = 1_000_000,
    index: Literal["auto", "flat", "ivf"] = "auto",
    dataset: str | None = None,
    layer: str | None = None,
) -> str:
    """Write a dataset that flows.embed made in the layout of another tool.

    Parameters
    ----------
    output
        The --output of a run of flows.embed.
    format
        npy: img_emb/img_emb_0.npy and metadata/metadata_0.parquet, as in clip-retrieval and autofaiss;
        faiss: vectors.index and ids.parquet; lance: data.lance.
    to
        Folder or fsspec URL to write, OUT/export/FORMAT by default. This export replaces an earlier one there when it
        is complete.
    dtype
        Type of the values in npy and lance.
    rows_per_file
        Rows per pair of files, for npy.
    index
        For faiss: flat is exact and in memory, ivf searches parts and stays on disk; auto is flat up to 4 GiB.
    dataset
        The dataset's folder, if it was embedded in place and has moved.
    layer
        The layer of vectors to export, if the output has several. By default the first of the last run.
    """
    if rows_per_file < 1:
        raise InputError(f"--rows-per-file: give at least 1, not {rows_per_file}")
    target = Folder(to if to is not None else Folder(output).place(f"export/{format}"))
    options: dict[str, dict[str, Any]] = {
        "npy": {"dtype": dtype, "rows_per_file": rows_per_file},
        "faiss": {"kind": index},
        "lance": {"dtype": dtype},
    }
    made = Exported.open(output, dataset, layer)
    made_of = {"format": format, "from": made.folder.url, **options[format]}
    with writing(target.url, "give another --to"), whole_folder(target, made_of) as folder:
        rows = WRITERS[format](made, folder, **options[format])
    print(f"{target.url}: {rows:,} of {counted(made.rows, 'row')}, those that have a vector", file=sys.stderr)
    return target.url


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status: 2 if the call or its input is wrong."""
    return exit_status(app, arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
