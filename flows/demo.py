"""`python -m flows.demo`: embed some photographs, and show that similar ones have similar vectors."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from cyclopts import App, CycloptsError
from rich.console import Console
from rich.table import Table

from embedders.errors import InputError, one_line
from flows.demo_data import build_dataset, trained_weights

DATA, OUTPUT = Path("demo-data"), Path("demo-out")
CHECKPOINT = DATA / "weights" / "tf_efficientnet_lite0.safetensors"
QUERY, NEIGHBOURS = "000000002", 5


def nearest(output: Path, query: str, count: int) -> list[tuple[float, str, str]]:
    """Return the samples that are most like one, itself included, with the most similar first.

    Args:
        output: Folder with the merged dataset. Its vectors are normalised, so their product is the cosine.
        query: Key of the sample.
        count: How many others.

    Returns:
        Cosine, key and caption of each sample.
    """
    table = pq.read_table(output / "metadata")
    column = table.column("image_embedding").combine_chunks()
    vectors = column.values.to_numpy().reshape(len(table), -1)
    keys, captions = (table.column(name).to_pylist() for name in ("key", "caption"))
    cosines = vectors @ vectors[keys.index(query)]
    return [(float(cosines[i]), keys[i], captions[i]) for i in np.argsort(-cosines)[: count + 1]]


def show_neighbours(console: Console) -> None:
    """Print the samples that are most like one photograph."""
    found = nearest(OUTPUT, QUERY, NEIGHBOURS)
    table = Table(title=f"nearest to {QUERY}: {found[0][2]}", title_justify="left", title_style="bold")
    for name in ("cosine", "key", "caption"):
        table.add_column(name)
    for cosine, key, caption in found[1:]:
        table.add_row(f"{cosine:.3f}", key, caption)
    console.print(table)


app = App(
    name="python -m flows.demo",
    help="Make 256 photographs in demo-data, embed them into demo-out, and show which are alike.",
    help_format="plaintext",
    version_flags=[],
)


@app.default
def demo() -> int:
    """Build the dataset, embed it as the command line does, and show neighbours; return the exit status."""
    from flows.embed import main as embed

    build_dataset(DATA)
    arguments = [str(DATA), "--output", str(OUTPUT), "--model-name", "tf_efficientnet_lite0"]
    status = embed([*arguments, "--checkpoint", str(trained_weights(CHECKPOINT))])
    if status == 0:
        show_neighbours(Console())
    return status


def main(arguments: Sequence[str]) -> int:
    """Run the command line and return its exit status: 2 if the call or its input is wrong."""
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
