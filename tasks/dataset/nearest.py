"""Find the vectors of an output that are nearest to a query, by exact search over one row group at a time."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from embedders.errors import InputError
from tasks.dataset.ids import canonical_ids
from tasks.records import layer_record
from tasks.storage.folder import Folder


@dataclass(frozen=True, order=True)
class Found:
    """A sample and its cosine to the query."""

    score: float
    shard: str
    id: str

    @property
    def place(self) -> tuple[str, str]:
        """Return the shard and the id."""
        return self.shard, self.id


def find_vector(output: Folder, layer: str, sample_id: str) -> np.ndarray:
    """Return the vector of a sample.

    Args:
        output: The output's folder.
        layer: The layer that holds the vectors.
        sample_id: The sample's id. If several shards have it, the first counts.

    Returns:
        (dimensions,) float32.

    Raises:
        InputError: No shard has it.
    """
    for _, parquet in _files(output, layer):
        for group in range(parquet.num_row_groups):
            ids = parquet.read_row_group(group, columns=["id"], use_threads=False).column(0).to_pylist()
            if sample_id in ids:
                return _matrix(parquet, layer, group)[ids.index(sample_id)]
    raise InputError(f"{output.url}: no embedded sample has the id {sample_id!r}; quarantined ones have no vector")


def nearest(output: Folder, layer: str, query: np.ndarray, count: int, recipe: str | None = None) -> list[Found]:
    """Find the samples whose vectors have the highest cosines to a query; read all vectors once.

    Args:
        output: The output's folder.
        layer: The layer that holds the vectors.
        query: (dimensions,) float32.
        count: How many samples to return.
        recipe: Digest of the fingerprint of the recipe that made the query; None to compare none.

    Returns:
        The samples, with the most similar first.

    Raises:
        InputError: The vectors are of another recipe or have other dimensions, or there are none.

    Example:
        >>> nearest(Folder("out"), "image_embedding", query, 2)
        [Found(score=0.93, shard='00001', id='000000071'), Found(score=0.91, shard='00003', id='000000199')]
    """
    best: list[Found] = []
    unit = query / max(float(np.linalg.norm(query)), 1e-30)
    for shard, parquet in _files(output, layer):
        record = layer_record(parquet.metadata)
        if recipe is not None and (record is None or record.recipe != recipe):
            raise InputError(f"{output.url}/layers/{layer}/{shard}.parquet: made by another model; rerun flows.embed")
        for group in range(parquet.num_row_groups):
            vectors = _matrix(parquet, layer, group)
            if not vectors.size:
                continue
            if vectors.shape[1] != len(unit):
                raise InputError(
                    f"{output.url}: its vectors have {vectors.shape[1]} dimensions, the query has {len(unit)}"
                )
            scores, rows = _top(vectors, unit, count)
            ids = parquet.read_row_group(group, columns=["id"], use_threads=False).column(0).to_pylist()
            found = [Found(score, shard, ids[row]) for score, row in zip(scores, rows, strict=True)]
            best = heapq.nlargest(count, [*best, *found])
    if not best:
        raise InputError(f"{output.url}: holds no embeddings; give the --output of a run of flows.embed")
    return best


def read_rows(folders: Sequence[Folder], found: Sequence[Found], id_col: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Read the user's own metadata columns of the samples that were found.

    Args:
        folders: Where SHARD.parquet may be. The first folder that has it counts.
        found: The samples.
        id_col: Name of the id's column. It is left out of the rows, like nested and binary columns.

    Returns:
        The values by column, by shard and id. A sample without a metadata row has no entry.
    """
    wanted: dict[str, list[str]] = defaultdict(list)
    for one in found:
        wanted[one.shard].append(one.id)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for shard, ids in wanted.items():
        folder = next((folder for folder in folders if folder.has(f"{shard}.parquet")), None)
        if folder is not None:
            with folder.open(f"{shard}.parquet") as file:
                for sample_id, row in _rows(pq.ParquetFile(file, pre_buffer=False), ids, id_col):
                    rows.setdefault((shard, sample_id), row)
    return rows


def _rows(parquet: pq.ParquetFile, ids: Sequence[str], id_col: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the rows that have one of some ids, with the id as text."""
    schema = parquet.schema_arrow
    if id_col not in schema.names:
        return
    names = [field.name for field in schema if field.name != id_col and _is_shown(field.type)]
    for group in range(parquet.num_row_groups):
        texts = canonical_ids(parquet.read_row_group(group, columns=[id_col], use_threads=False).column(0))
        at = np.flatnonzero(pc.is_in(texts, pa.array(ids, pa.string())).to_numpy())
        if len(at):
            table = parquet.read_row_group(group, columns=names, use_threads=False).take(at)
            values = table.to_pylist() or [{}] * len(at)
            yield from zip(texts.take(pa.array(at)).to_pylist(), values, strict=True)


def _is_shown(kind: pa.DataType) -> bool:
    """Return whether values of a type fit in a line of text."""
    binary = (pa.types.is_binary, pa.types.is_large_binary, pa.types.is_fixed_size_binary, pa.types.is_binary_view)
    return not pa.types.is_nested(kind) and not any(test(kind) for test in binary)


def _top(vectors: np.ndarray, unit: np.ndarray, count: int) -> tuple[list[float], list[int]]:
    """Return the highest cosines of some vectors to a unit vector, and their row numbers."""
    vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-30)
    count = min(count, len(vectors))
    try:
        import faiss
    except ImportError:
        scores = vectors @ unit
        rows = np.argpartition(-scores, count - 1)[:count]
        return scores[rows].tolist(), rows.tolist()
    found, numbers = faiss.knn(unit[None], vectors, count, metric=faiss.METRIC_INNER_PRODUCT)
    return found[0].tolist(), numbers[0].tolist()


def _files(output: Folder, layer: str) -> Iterator[tuple[str, pq.ParquetFile]]:
    """Yield the name of each shard and its opened layer file."""
    folder = Folder(output.place(f"layers/{layer}"))
    for file in folder.list(".parquet"):
        with folder.open(file.name) as opened:
            yield file.name.removesuffix(".parquet"), pq.ParquetFile(opened, pre_buffer=False)


def _matrix(parquet: pq.ParquetFile, layer: str, group: int) -> np.ndarray:
    """Return the vectors of a row group, (rows, dimensions) float32."""
    column = parquet.read_row_group(group, columns=[layer], use_threads=False).column(0)
    values = column.combine_chunks().flatten().to_numpy(zero_copy_only=False)
    return np.asarray(values, np.float32).reshape(len(column), -1) if len(column) else np.zeros((0, 0), np.float32)
