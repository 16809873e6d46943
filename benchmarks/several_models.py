"""`python -m benchmarks.several_models [--model A --model B]`: models in one pass, beside each alone and one decode.

Prints the seconds that the same images take with all models in one pass, with each model alone on images that are
decoded already, and for one decode without a model. They are taken in turns in one process, and the medians compared:
one pass costs no more than the models and one decode if the ratio is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.throughput import make_shards, synchronizer
from embedders import TimmImageEmbedder
from embedders.engine import Engine, Rows, keep_freed_memory
from embedders.session import Session
from embedders.shard_batch import ShardBatch
from embedders.shared_loading import open_together
from embedders.webdataset import OpenShard, open_shard

MODELS = ("tf_efficientnet_lite0", "mobilenetv3_small_100")


def main(arguments: Sequence[str]) -> int:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.several_models", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--model", action="append", help=f"timm names; by default {' and '.join(MODELS)}")
    parser.add_argument("--samples", type=int, default=512, help="images that each turn embeds")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--photographs", help="a folder with photographs instead of scikit-image's")
    parser.add_argument("--folder", help="where shards are made and stay; by default a temporary folder")
    args = parser.parse_args(arguments)
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(args.folder or temporary)
        make_shards(folder, 1, args.samples, args.photographs, 2)
        shard = open_shard(folder / "00000.tar")
        seconds = measure(args.model or list(MODELS), shard, args.device, args.turns)
    images = shard.count
    for name, spent in seconds.items():
        print(f"{name:40} {spent:8.2f} s  {images / spent:10,.0f} images/s")
    alone = sum(spent for name, spent in seconds.items() if name != TOGETHER)
    print(f"one pass / (each model + one decode)     {seconds[TOGETHER] / alone:8.2f}")
    return 0


TOGETHER, DECODE = "all models in one pass", "one decode"


def measure(models: Sequence[str], shard: OpenShard, device: str, turns: int) -> dict[str, float]:
    """Return the median seconds for the images of a shard, by what was done with them."""
    embedders = [
        TimmImageEmbedder(model, pretrained=False, image_embedding_column=f"model_{number}", decode="exact")
        for number, model in enumerate(models)
    ]
    sessions = open_together(embedders, device)
    engine = Engine(sessions)
    works: dict[str, Callable[[], None]] = {TOGETHER: lambda: _embed(engine, shard)}
    works[DECODE] = lambda: _decode(sessions[0], shard)
    for model, session in zip(models, sessions, strict=True):
        decoded = _kept(session, shard)
        works[f"{model} alone"] = lambda session=session, decoded=decoded: _forward(session, decoded)  # type: ignore[misc]
    finish = synchronizer(device)
    spent: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(turns + 1):
        for name, work in works.items():
            started = time.perf_counter()
            work()
            finish()
            if turn:  # the first one warms up
                spent[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in spent.items()}


def _embed(engine: Engine, shard: OpenShard) -> None:
    rows = sum(len(found.samples) for found in engine.embed([shard]) if isinstance(found, Rows))
    assert rows == shard.count * len(engine.sessions)


def _decode(session: Session, shard: OpenShard) -> None:
    assert sum(len(batch.rows) for batch in session.batches([shard])) == shard.count


def _kept(session: Session, shard: OpenShard) -> list[ShardBatch]:
    """Return batches whose images are copied: a loader uses its memory again."""
    return [ShardBatch(batch.images.clone(), batch.rows) for batch in session.batches([shard]) if batch.rows]


def _forward(session: Session, batches: Sequence[ShardBatch]) -> None:
    with torch.inference_mode():
        for batch in batches:
            session.model(batch.images)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
