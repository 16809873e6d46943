"""`python -m benchmarks.report [IMAGES]`: measure report.html and a search over synthetic vectors."""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from flows.report import write_report
from tasks.dataset.nearest import find_vector, nearest
from tasks.dataset.vectors import vector_array, write_vectors
from tasks.manifest import Manifest, write_manifest
from tasks.records import Column, LayerRecord, with_record
from tasks.storage.folder import Folder
from tasks.vector_checks import measure_vectors

ROWS, DIMENSIONS = 10_000, 64

LAYER = "image_embedding"


def write_output(output: Path, images: int) -> None:
    """Write an output of clustered unit vectors without a dataset."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(50, DIMENSIONS))
    (output / "layers/image_embedding").mkdir(parents=True)
    for shard in range(images // ROWS):
        vectors = centres[generator.integers(50, size=ROWS)] + generator.normal(size=(ROWS, DIMENSIONS))
        vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
        work = {"began": 60.0 * shard, "ended": 60.0 * shard + 50}
        measured = measure_vectors(vectors)
        record = LayerRecord(
            "key",
            LAYER,
            "digest",
            ROWS,
            ROWS,
            {},
            ROWS,
            {LAYER: Column("float32", (DIMENSIONS,))},
            decoder="exact",
            statistics={LAYER: measured},
            work=work,
            worker=f"host:{shard % 8}",
        )
        ids = pa.array([f"{shard:05}{row:05}" for row in range(ROWS)])
        table = pa.table({"id": ids, "image_embedding": vector_array(vectors)})
        table = table.cast(with_record(table.schema, record))
        write_vectors(table, str(output / f"layers/image_embedding/{shard:05}.parquet"), "image_embedding")
    counts = {"samples": images, "embedded": images, "quarantined": 0, "rows": images}
    counts |= {"shards": images // ROWS, "shards_cached": 0, "shards_failed": 0, "dimensions": DIMENSIONS}
    write_manifest(
        Manifest(**counts, images_per_second=0, seconds=1, model="synthetic", column=LAYER, output=str(output))
    )


def main(arguments: Sequence[str]) -> int:
    """Measure, print the figures, and return the exit status."""
    images = int(arguments[0]) if arguments else 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out"
        write_output(output, images)
        started = time.monotonic()
        page = write_report(str(output))
        seconds = time.monotonic() - started
        print(f"report.html over {images:,} vectors: {Path(page).stat().st_size / 1e6:.1f} MB in {seconds:.1f} s")
        target = Folder(str(output))
        query = find_vector(target, LAYER, "0000000005")
        started = time.monotonic()
        found = nearest(target, LAYER, query, 12)
        print(f"nearest 12 of {images:,}: {time.monotonic() - started:.1f} s, best {found[0].score:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
