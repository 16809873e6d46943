"""Which row of a layer each metadata row gets, by id: found by Arrow, or by a Dask DataFrame job on cuDF.

Only ids are joined here. The places are numbers, so neither way can change a row or a value.

The DataFrame job runs inside the task of one shard, with Dask's synchronous scheduler, and ends in numpy. A job of the
whole cluster would send frames' metadata through the scheduler, which runs in the process of the run: unpickling them
there opens a CUDA context in a process that needs no GPU.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.dataset.ids import repeated
from tasks.hardware import count_gpus

logger = logging.getLogger(__name__)

Join = Literal["auto", "arrow", "cudf"]
Backend = Literal["cudf", "pandas"]

CUDF_ROWS = 1_000_000
"""Rows of a shard from which on "auto" joins on cuDF, on a worker that has it and a GPU.

From `python -m benchmarks.merge --part join` on an H100 machine, for ids in another order: 100,000 take Arrow 0.03 s
and cuDF 0.06 s, 1,000,000 take 0.85 s and 0.08 s, 10,000,000 take 10 s and 0.4 s. The first job of a worker takes 9 s
more, to import cuDF and to start it, which twelve shards of a million rows pay for.
"""

ID, ROW, PLACE = "id", "row", "place"


def join_ids(ids: pa.ChunkedArray, layers: Mapping[str, pa.ChunkedArray], join: Join = "auto") -> dict[str, np.ndarray]:
    """Return which row of each layer each metadata row gets.

    Args:
        ids: Of the metadata's rows, as text. Of rows that repeat an id the first one counts; a null is no id.
        layers: The ids of each layer's rows, as text, each there once.
        join: What finds them; the places are the same.

    Returns:
        By layer, (rows of the metadata,) int64: the layer's row, or -1.
    """
    if chosen_join(join, len(ids)) == "cudf":
        return join_frames(ids, layers, "cudf")
    return join_arrow(ids, layers)


def chosen_join(join: Join, rows: int) -> Join:
    """Return what joins a shard of so many rows in this process: "arrow" or "cudf"."""
    if join == "arrow" or (join == "auto" and rows < CUDF_ROWS):
        return "arrow"
    if importlib.util.find_spec("cudf") is None:
        if join == "cudf":
            logger.warning("cuDF is not installed; joining with Arrow")
        return "arrow"
    return "cudf" if join == "cudf" or count_gpus() else "arrow"


def join_arrow(ids: pa.ChunkedArray, layers: Mapping[str, pa.ChunkedArray]) -> dict[str, np.ndarray]:
    """Find the places with Arrow; see `join_ids`."""
    again: np.ndarray | None = None
    found = {}
    for name, layer_ids in layers.items():
        if ids.equals(layer_ids):  # the usual case: nothing to look up, and nothing is there twice
            found[name] = np.arange(len(ids), dtype=np.int64)
            continue
        again = repeated(ids) if again is None else again
        places = pc.index_in(ids, value_set=layer_ids, skip_nulls=True).combine_chunks()
        found[name] = np.array(places.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)
        found[name][again] = -1
    return found


def join_frames(ids: pa.ChunkedArray, layers: Mapping[str, pa.ChunkedArray], backend: Backend) -> dict[str, np.ndarray]:
    """Find the places with Dask DataFrames on cuDF or pandas; see `join_ids`."""
    import dask

    rows = _frame(ids, ROW, backend)
    merged = [rows.merge(_frame(layer_ids, PLACE, backend), on=ID, how="inner") for layer_ids in layers.values()]
    frames = dask.compute(*(frame[[ROW, PLACE]] for frame in merged), scheduler="synchronous")
    found = {}
    for name, frame in zip(layers, frames, strict=True):
        row, place = (_to_table(frame).column(column).to_numpy() for column in (ROW, PLACE))
        found[name] = np.full(len(ids), -1, np.int64)
        found[name][row] = place
    return found


def _frame(ids: pa.ChunkedArray, number: str, backend: Backend) -> Any:
    """Return ids with the numbers of their rows as a Dask DataFrame of one partition."""
    import dask.dataframe as dd

    table = pa.table({ID: ids, number: pa.array(np.arange(len(ids)))})
    return dd.from_map(_first_rows, [table], backend=backend, meta=_to_frame(table.slice(0, 0), backend))


def _first_rows(table: pa.Table, backend: Backend) -> Any:
    """Return the rows that have an id, of those that repeat one the first, as a frame."""
    return _to_frame(table, backend).dropna(subset=[ID]).drop_duplicates(subset=[ID], keep="first")


def _to_frame(table: pa.Table, backend: Backend) -> Any:
    """Return a table as a frame whose columns keep their Arrow types."""
    if backend == "cudf":
        import cudf
        import dask_cudf  # noqa: F401  # teaches Dask what to do with cuDF's frames

        return cudf.DataFrame.from_arrow(table)
    import pandas as pd

    return table.to_pandas(types_mapper=pd.ArrowDtype)


def _to_table(frame: Any) -> pa.Table:
    return frame.to_arrow() if hasattr(frame, "to_arrow") else pa.Table.from_pandas(frame, preserve_index=False)
