"""Export to npy, the layout of clip-retrieval and autofaiss."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from tasks.dataset.export.source import Batch, Dtype, Exported


class NpyWriter:
    """Write an .npy file row by row, which works because numpy leaves room in the header for the number of rows."""

    def __init__(self, path: Path, dimensions: int, dtype: Dtype) -> None:
        """Create the file.

        Args:
            path: Where to write it.
            dimensions: Values per row.
            dtype: Their type.
        """
        self.dimensions, self.dtype, self.rows = dimensions, np.dtype(dtype), 0
        self._file = path.open("wb")
        self._write_header()

    def _write_header(self) -> None:
        shape = (self.rows, self.dimensions)
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)

    def write(self, vectors: np.ndarray) -> None:
        """Append rows, (rows, dimensions) of any float type."""
        self._file.write(np.ascontiguousarray(vectors, self.dtype).data)
        self.rows += len(vectors)

    def close(self) -> None:
        """Write the number of rows to the header, and close the file."""
        self._file.seek(0)
        self._write_header()
        self._file.close()


def export_npy(dataset: Exported, folder: Path, dtype: Dtype, rows_per_file: int) -> int:
    """Write img_emb/img_emb_0.npy and metadata/metadata_0.parquet, and so on, with the same rows in both.

    Args:
        dataset: What to export.
        folder: Where to write.
        dtype: Type of the vectors' values.
        rows_per_file: Rows per pair of files.

    Returns:
        How many rows were written: those that have a vector.
    """
    digits = len(str(max(0, -(-dataset.rows // rows_per_file) - 1)))
    for name in ("img_emb", "metadata"):
        (folder / name).mkdir()
    total, number = 0, 0
    batches = _cut(dataset.batches(), rows_per_file)
    for ends in batches:
        vectors = NpyWriter(folder / f"img_emb/img_emb_{number:0{digits}}.npy", dataset.dimensions, dtype)
        path = folder / f"metadata/metadata_{number:0{digits}}.parquet"
        with contextlib.closing(vectors), pq.ParquetWriter(path, dataset.schema, compression="zstd") as metadata:
            for batch in ends:
                vectors.write(batch.vectors)
                metadata.write_table(batch.metadata)
        total, number = total + vectors.rows, number + 1
    return total


def _cut(batches: Iterator[Batch], rows: int) -> Iterator[Iterator[Batch]]:
    """Cut a stream of batches into streams of `rows` rows each. Use up each stream before the next."""
    waiting = [batch for batch in [next(batches, None)] if batch is not None]

    def some() -> Iterator[Batch]:
        room = rows
        while room:
            if not waiting:
                following = next(batches, None)
                if following is None:
                    return
                waiting.append(following)
            batch = waiting.pop()
            if len(batch.vectors) > room:
                waiting.append(Batch(batch.metadata.slice(room), batch.vectors[room:]))
                batch = Batch(batch.metadata.slice(0, room), batch.vectors[:room])
            room -= len(batch.vectors)
            yield batch
        if not waiting and (following := next(batches, None)) is not None:
            waiting.append(following)

    while waiting:
        yield some()
