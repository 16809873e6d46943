"""`python -m benchmarks.terminal DATASET OUT PICTURE.svg`: take a picture of the terminal during a run."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console

from embedders import TimmImageEmbedder
from flows.embed import embed_dataset
from flows.progress import Terminal
from tasks.records import LayerRecord


class Photographed(Terminal):
    """A terminal that saves a picture of itself when three quarters of the shards are done."""

    def __init__(self, path: str) -> None:
        super().__init__(Console(stderr=True, highlight=False, soft_wrap=True))
        self.path = path

    def embedded(self, records: Sequence[LayerRecord]) -> None:
        """Count a group of shards, and take the picture at the right moment."""
        super().embedded(records)
        if self.pace.share >= 0.75 and self.path:
            console = Console(record=True, width=84, file=io.StringIO(), force_terminal=True)
            console.print(self.view())
            console.save_svg(self.path, title="python -m flows.embed")
            self.path = ""


def main(arguments: Sequence[str]) -> int:
    """Embed a dataset on the CPU and take the picture."""
    dataset, output, picture = arguments
    embedder = TimmImageEmbedder("tf_efficientnet_lite0", pretrained=False)
    embed_dataset(dataset, output, embedder, progress=Photographed(picture), device="cpu")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
