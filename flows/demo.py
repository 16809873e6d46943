"""`python -m flows.demo`: photographs in, embeddings out, and the proof that they mean something."""

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
    """The `count` samples most like the sample `query`: cosine, key and caption, the best first.

    Vectors are normalised, so their product is the cosine.
    """
    table = pq.read_table(output / "metadata")
    column = table.column("image_embedding").combine_chunks()
    vectors = column.values.to_numpy().reshape(len(table), -1)
    keys, captions = (table.column(name).to_pylist() for name in ("key", "caption"))
    cosines = vectors @ vectors[keys.index(query)]
    return [(float(cosines[i]), keys[i], captions[i]) for i in np.argsort(-cosines)[: count + 1]]


def show_neighbours(console: Console) -> None:
    """Print what lies nearest to one photograph."""
    found = nearest(OUTPUT, QUERY, NEIGHBOURS)
    table = Table(title=f"nearest to {QUERY}: {found[0][2]}", title_justify="left", title_style="bold")
    for name in ("cosine", "key", "caption"):
        table.add_column(name)
    for cosine, key, caption in found[1:]:
        table.add_row(f"{cosine:.3f}", key, caption)
    console.print(table)


app = App(
    name="python -m flows.demo",
    help="Embed 256 photographs that are made here, in demo-data, into demo-out, and show what is alike.",
    help_format="plaintext",
    version_flags=[],
)


@app.default
def demo() -> int:
    """Build the dataset, embed it with the command line's own code, and show neighbours."""
    from flows.embed import main as embed

    build_dataset(DATA)
    arguments = [str(DATA), "--output", str(OUTPUT), "--model-name", "tf_efficientnet_lite0"]
    status = embed([*arguments, "--checkpoint", str(trained_weights(CHECKPOINT))])
    if status == 0:
        show_neighbours(Console())
    return status


def main(arguments: Sequence[str]) -> int:
    """Run the command line; its exit status: 2 where the call or its input is wrong."""
    try:
        status = app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    return status or 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
