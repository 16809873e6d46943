"""Export to a faiss index."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.parquet as pq

from tasks.dataset.export.source import Exported, imported

FLAT_BYTES = 4 << 30
"""Vectors that an index may hold in memory. An index of more keeps its lists on disk."""
BLOCK_BYTES = 512 << 20
"""Vectors in memory while such an index is made: those of one block, or the sample that centres are learnt from."""
TRAINED_ON = 64
"""Vectors per list that its centre is learnt from."""


def export_faiss(dataset: Exported, folder: Path, kind: Literal["auto", "flat", "ivf"]) -> int:
    """Write vectors.index, by inner product, and ids.parquet with the metadata of its vectors in the same order.

    A flat index is exact and is held in memory. An IVF index is made block by block, and its lists stay on disk in
    vectors.ivfdata.

    Args:
        dataset: What to export.
        folder: Where to write.
        kind: Of the index; "auto" is flat up to `FLAT_BYTES`.

    Returns:
        How many vectors it has.

    Raises:
        InputError: faiss is not installed.

    Example:
        >>> index = faiss.read_index("vectors.index", faiss.IO_FLAG_ONDISK_SAME_DIR)  # of an IVF index
    """
    faiss = imported("faiss", "faiss-cpu")
    size = dataset.rows * dataset.dimensions * 4
    flat = kind == "flat" or (kind == "auto" and size <= FLAT_BYTES)
    with pq.ParquetWriter(folder / "ids.parquet", dataset.schema, compression="zstd") as ids:

        def vectors() -> Iterator[np.ndarray]:
            for batch in dataset.batches():
                ids.write_table(batch.metadata)
                yield batch.vectors

        if not flat:
            return _write_ivf(faiss, dataset, folder, vectors())
        index = faiss.IndexFlatIP(dataset.dimensions)
        for batch in vectors():
            index.add(batch)
        _write_index(faiss, index, folder / "vectors.index")
        return int(index.ntotal)


def _write_ivf(faiss: Any, dataset: Exported, folder: Path, vectors: Iterator[np.ndarray]) -> int:
    """Write an IVF index with its lists on disk, from blocks that fit in memory; return how many vectors it has."""
    from faiss.contrib.ondisk import merge_ondisk

    blocks: list[str] = []
    empty, total = str(folder / "empty.index"), 0
    _write_index(faiss, _trained(faiss, dataset), empty)
    block = faiss.read_index(empty)

    def close() -> None:
        blocks.append(str(folder / f"block-{len(blocks)}.index"))
        _write_index(faiss, block, blocks[-1])

    for batch in vectors:
        block.add_with_ids(batch, np.arange(total, total + len(batch)))
        total += len(batch)
        if block.ntotal * dataset.dimensions * 4 >= BLOCK_BYTES:
            close()
            block = faiss.read_index(empty)
    if block.ntotal or not blocks:
        close()
    index = faiss.read_index(empty)
    merge_ondisk(index, blocks, str(folder / "vectors.ivfdata"))
    _write_index(faiss, index, folder / "vectors.index")
    for path in (empty, *blocks):
        os.unlink(path)
    return total


def _trained(faiss: Any, dataset: Exported) -> Any:
    """Return an empty IVF index whose lists' centres were learnt from a sample of the dataset."""
    lists = int(np.clip(4 * np.sqrt(dataset.rows), 1, 65_536))
    sample = _sample(dataset, min(dataset.rows, TRAINED_ON * lists, BLOCK_BYTES // (4 * dataset.dimensions)))
    lists = max(1, min(lists, len(sample)))
    centres = faiss.IndexFlatIP(dataset.dimensions)
    index = faiss.IndexIVFFlat(centres, dataset.dimensions, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.min_points_per_centroid = 1
    index.train(sample)
    return index


def _write_index(faiss: Any, index: Any, path: Path | str) -> None:
    """Write an index.

    Raises:
        OSError: It cannot be written. faiss raises a RuntimeError whose text holds lines of its source.
    """
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(str(error).rpartition("Error: ")[2]) from error


def _sample(dataset: Exported, count: int) -> np.ndarray:
    """Return about `count` vectors, taken evenly from the whole dataset: (n, dimensions) float32."""
    step = -(-dataset.rows // max(count, 1))
    return np.concatenate([batch.vectors[::step] for batch in dataset.batches()])
