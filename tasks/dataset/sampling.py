"""Take a sample of an output's vectors, which costs the same however large the output is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow.parquet as pq

from tasks.storage.folder import Folder

SHARDS = 16
"""The most shards that a sample is taken from."""


@dataclass(frozen=True)
class Sampled:
    """Some rows of an output."""

    vectors: np.ndarray
    """(n, dimensions) float32."""
    places: tuple[tuple[str, str], ...]
    """The shard and the id of each."""


def sample_vectors(output: Folder, layer: str, count: int, generator: np.random.Generator) -> Sampled:
    """Draw rows of a layer without repetition, from one row group of each of up to `SHARDS` shards.

    Args:
        output: The output's folder.
        layer: The layer that holds the vectors.
        count: The most rows to draw.
        generator: Source of the draws.
    """
    folder = Folder(output.place(f"layers/{layer}"))
    files = folder.list(".parquet")
    chosen = sorted(generator.permutation(len(files))[:SHARDS].tolist())
    vectors: list[np.ndarray] = []
    places: list[tuple[str, str]] = []
    for left, number in zip(range(len(chosen), 0, -1), chosen, strict=True):
        with folder.open(files[number].name) as file:
            parquet = pq.ParquetFile(file)
            if not parquet.metadata.num_rows:
                continue
            group = int(generator.integers(parquet.num_row_groups))
            table = parquet.read_row_group(group, use_threads=False)  # see `tasks.manifest.read_quarantine`
        rows = np.sort(generator.permutation(len(table))[: -(-(count - len(places)) // left)])
        matrix = table.column(layer).combine_chunks().values.to_numpy().reshape(len(table), -1)
        vectors.append(np.asarray(matrix[rows], np.float32))
        ids = table.column(0).to_pylist()
        places += [(files[number].name.removesuffix(".parquet"), ids[row]) for row in rows]
    whole = np.concatenate(vectors) if vectors else np.zeros((0, 0), np.float32)
    return Sampled(whole, tuple(places))
