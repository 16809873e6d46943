"""Layer files: ids and values of a shard's samples, written in row groups as they come."""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embedders.quarantine import QuarantinedSample
from tasks.dataset.vectors import parquet_options, rows_per_group, vector_array
from tasks.records import RECORD, Column, LayerRecord, seal_footer, to_json
from tasks.shards import Shard
from tasks.vector_checks import VectorStatistics

ID = "id"
"""The column with the ids, in every layer."""


class LayerWriter:
    """One layer file that grows by row groups, and takes its name only with its record.

    What is in memory is one row group, however large the shard. Nothing is left behind if it is not finished.

    Example:
        >>> with LayerWriter(shard, "image_embedding") as writer:  # doctest: +SKIP
        ...     writer.add(samples, ids, {"image_embedding": vectors})
        ...     writer.finish(record, quarantined)
    """

    def __init__(self, shard: Shard, layer: str) -> None:
        self.shard = shard
        self.layer = layer
        self.rows = 0
        self.columns: dict[str, Column] = {}
        self.in_order = True
        self._last = -1
        self._stack = contextlib.ExitStack()
        self._writer: pq.ParquetWriter | None = None
        self._waiting: list[tuple[pa.Array, Mapping[str, np.ndarray]]] = []
        self._waiting_rows = 0
        self._group = 1
        self._statistics: dict[str, VectorStatistics] = {}

    def __enter__(self) -> LayerWriter:
        return self

    def __exit__(self, *error: Any) -> None:
        self.abandon()

    @property
    def statistics(self) -> dict[str, dict[str, float]]:
        """Return what was measured of the vectors so far, by column; complete after `flush`."""
        return {name: found.result() for name, found in self._statistics.items()}

    def add(self, samples: np.ndarray, ids: pa.Array, columns: Mapping[str, np.ndarray]) -> None:
        """Add rows.

        Args:
            samples: (n,) int64, ascending: the places of the samples in the tar.
            ids: (n,) text.
            columns: Arrays (n, ...) by name, of the same names, types and shapes each time.
        """
        if self._writer is None:
            self._open(columns)
        self.in_order = self.in_order and int(samples[0]) > self._last
        self._last = int(samples[-1])
        self._waiting.append((ids, columns))
        self._waiting_rows += len(ids)
        if self._waiting_rows >= self._group:
            self._write(self._waiting_rows // self._group * self._group)

    def flush(self) -> None:
        """Write the rows that wait for a full row group."""
        if self._waiting_rows:
            self._write(self._waiting_rows)

    def finish(self, record: LayerRecord, quarantined: Sequence[QuarantinedSample]) -> None:
        """Write the quarantine and then, as the record that the shard is done, let the file take its name.

        Args:
            record: With the rows, columns and statistics of this file.
            quarantined: The samples that have no value.

        Raises:
            OSError: The disk or the store did not take it; nothing is left behind.
        """
        self.flush()
        if self._writer is None:
            self._open({self.layer: np.zeros((0, 0), np.float32)})
        assert self._writer is not None
        self._writer.add_key_value_metadata({RECORD: to_json(record).encode()})
        self._writer.close()
        self._writer = None
        seal_footer(self._path)
        write_quarantine(self.shard, self.layer, quarantined)
        self._stack.close()

    def abandon(self) -> None:
        """Leave nothing behind, unless it is finished."""
        if self._writer is not None:
            with contextlib.suppress(Exception):  # a full disk, say; the file goes in any case
                self._writer.close()
            self._writer = None
        self._waiting.clear()
        stop = _Abandoned()
        self._stack.__exit__(type(stop), stop, None)

    def _open(self, columns: Mapping[str, np.ndarray]) -> None:
        self.columns = {name: Column(str(values.dtype), values.shape[1:]) for name, values in columns.items()}
        self._statistics = {
            name: VectorStatistics()
            for name, values in columns.items()
            if values.ndim == 2 and values.dtype.kind == "f"
        }
        self._group = rows_per_group(sum(values[:1].nbytes for values in columns.values()))
        fields = [pa.field(name, column_array(values[:1]).type) for name, values in columns.items()]
        schema = pa.schema([pa.field(ID, pa.string()), *fields])
        self._path = self._stack.enter_context(self.shard.target.replacing(self.shard.layer_file(self.layer)))
        self._writer = pq.ParquetWriter(self._path, schema, **parquet_options(schema, self.columns))

    def _write(self, rows: int) -> None:
        """Write that many of the waiting rows as row groups."""
        assert self._writer is not None
        ids = pa.concat_arrays([ids for ids, _ in self._waiting])
        columns = {name: _joined([columns[name] for _, columns in self._waiting]) for name in self.columns}
        for start in range(0, rows, self._group):
            part = slice(start, min(start + self._group, rows))
            for name, statistics in self._statistics.items():
                statistics.add(columns[name][part])
            arrays = [ids[part], *(column_array(values[part]) for values in columns.values())]
            self._writer.write_table(pa.table(arrays, schema=self._writer.schema), row_group_size=self._group)
        self.rows += rows
        left = {name: values[rows:].copy() for name, values in columns.items()}
        self._waiting_rows -= rows
        self._waiting = [(ids[rows:], left)] if self._waiting_rows else []


class _Abandoned(Exception):
    """Tells the file's context that it did not end well."""


def _joined(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def column_array(values: np.ndarray) -> pa.Array:
    """Return values as the Arrow array that layer files hold.

    Args:
        values: (n,) numbers; (n, dimensions) vectors, which become lists; or (n, a, b, ...) tensors, which become
            Arrow's fixed-shape tensors: `column.combine_chunks().to_numpy_ndarray()` is (n, a, b, ...) again.
    """
    if values.ndim == 1:
        return pa.array(values)
    if values.ndim > 2:
        return pa.FixedShapeTensorArray.from_numpy_ndarray(np.ascontiguousarray(values))
    if values.dtype == np.float32:
        return vector_array(values)
    kind = pa.list_(pa.field("element", pa.from_numpy_dtype(values.dtype), nullable=False))
    offsets = pa.array(np.arange(len(values) + 1) * values.shape[1], pa.int32())
    return pa.ListArray.from_arrays(offsets, pa.array(values.reshape(-1)), type=kind)


def write_quarantine(shard: Shard, layer: str, samples: Sequence[QuarantinedSample]) -> None:
    """Write a layer's quarantine, or remove it if no sample is in it."""
    name = shard.quarantine_file(layer)
    if not samples:
        shard.target.remove(name)
        return
    table = quarantine_table(samples)
    with shard.target.replacing(name) as path:
        pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def quarantine_table(samples: Sequence[QuarantinedSample]) -> pa.Table:
    """Return id, member, reason and detail of samples, as text: what quarantine files hold."""
    names = QuarantinedSample._fields
    return pa.table({name: pa.array([str(getattr(s, name)) for s in samples], pa.string()) for name in names})


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions of what makes the values; not to be changed."""
    names = ("torch", "timm", "nvidia-dali-cuda120", "pillow", "pyarrow")
    found = {"python": platform.python_version()}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found
