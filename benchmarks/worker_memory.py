"""`python -m benchmarks.worker_memory`: memory and speed of a worker for shards of a thousand to a million samples.

Each shard is embedded by a process of its own, as a worker embeds it: opened, decoded by DALI, through a model, and
written in row groups. Memory is what is anonymous; pages of the mapped tar can go at any time. By default the model is
the mean of the pixels in 768 numbers, so that a CPU comes through a million images in minutes; `--model` takes one of
timm's.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.open_shard import Peak, jpeg, write_shard
from embedders import TimmImageEmbedder

WARM_UP = 25_000
"""Samples that a process embeds before: by then malloc has what the batches under way need."""
SAMPLES = (1_000, 10_000, 100_000, 1_000_000)
IMAGE_BYTES = 1_000
"""About what an image has, so that a million of them fit a small disk; with more than 16 pixels a side DALI decodes."""


class MeanColour(TimmImageEmbedder):
    """Reads and decodes as for a timm model, and gives 768 numbers made of an image's mean colour."""

    def load_embedding_model(self, device: str) -> Any:
        return lambda images: images.float().mean(dim=(2, 3)).repeat(1, 256)


def embed(folder: Path, model: str | None, device: str) -> dict[str, float]:
    """Embed the shard of a folder in this process; its samples, the seconds, and megabytes."""
    from embedders.recipe import recipes_of
    from tasks.embed import EmbedOptions, embed_group
    from tasks.shards import find_shards

    kind = MeanColour if model is None else TimmImageEmbedder
    embedder = kind(model or "test_vit.r160_in1k", pretrained=False, decode="exact", batch_size=256)
    options = EmbedOptions("key", device)
    (warm,) = find_shards(str(folder / "warm"), str(folder / "out"))
    embed_group([warm], recipes_of(embedder), options)  # loads the model, builds the pipeline
    (shard,) = find_shards(str(folder / "data"), str(folder / "out"))
    peak = Peak()
    peak.start()
    began = time.perf_counter()
    ((record,),) = [of_layer.values() for of_layer in embed_group([shard], recipes_of(embedder), options).values()]
    seconds = time.perf_counter() - began
    assert record.embedded == record.samples
    return {"samples": record.samples, "seconds": seconds, "before": peak.began / 1e3, "peak": peak.most / 1e3}


def main(arguments: Sequence[str]) -> int:
    """Write the shards, embed each in a process of its own, and print a line for each."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.worker_memory", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--samples", type=int, nargs="*", default=SAMPLES)
    parser.add_argument("--model", help="a timm model instead of the mean colour")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--embed", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.embed:
        print(json.dumps(embed(args.embed, args.model, args.device)))
        return 0
    for samples in args.samples:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            for name, count in (("warm", WARM_UP), ("data", samples)):
                (folder / name).mkdir()
                write_shard(folder / name / f"{name}.tar", count, jpeg(IMAGE_BYTES))
            found = _apart(folder, args.model, args.device)
        rate = found["samples"] / found["seconds"]
        more = found["peak"] - found["before"]
        print(
            f"{samples:9,} samples  {rate:8,.0f} images/s  {found['before']:6,.0f} MB before, {more:+6,.0f} MB at most"
        )
    return 0


def _apart(folder: Path, model: str | None, device: str) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.worker_memory", "--embed", str(folder), "--device", device]
    command += ["--model", model] if model else []
    done = subprocess.run(command, env=os.environ, stdout=subprocess.PIPE, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
