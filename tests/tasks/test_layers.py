"""Layer files: written in row groups as rows come, whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders.quarantine import QuarantinedSample
from tasks.dataset.vectors import LARGEST_GROUP_BYTES
from tasks.layers import LayerWriter
from tasks.records import Column, LayerRecord, layer_record, read_layer_record
from tasks.sample_account import Unbalanced
from tasks.shards import Shard


@pytest.fixture
def shard(tmp_path: Path) -> Shard:
    return Shard("00000", str(tmp_path / "data"), str(tmp_path / "out"), 0, "tar", None)


def ids(samples: np.ndarray) -> pa.Array:
    return pa.array([f"{sample:09}" for sample in samples.tolist()])


def written(shard: Shard) -> list[str]:
    return [str(p.relative_to(shard.output)) for p in sorted(Path(shard.output).rglob("*")) if p.is_file()]


def record(samples: int, bad: int, columns: dict[str, Column]) -> LayerRecord:
    reasons = {"truncated": bad} if bad else {}
    return LayerRecord("key", "x", "recipe", samples, samples - bad, reasons, samples - bad, columns)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((), np.float32), ((3,), np.float32), ((3,), np.uint8), ((2, 3), np.float32), ((), np.bool_)]
)
def test_what_was_added_is_read_back(shard: Shard, shape: tuple[int, ...], dtype: type) -> None:
    values: Any = np.random.default_rng(0).integers(0, 2, (5000, *shape)).astype(dtype)
    with LayerWriter(shard, "x") as writer:
        for start in range(0, 5000, 999):
            samples = np.arange(start, min(start + 999, 5000))
            writer.add(samples, ids(samples), {"x": values[samples]})
        bad = [QuarantinedSample("bad", "bad.jpg", "truncated", "half of it")]
        writer.finish(record(5001, 1, writer.columns), bad)
    table = pq.read_table(Path(shard.output, "layers/x/00000.parquet"))
    assert table["id"].to_pylist() == ids(np.arange(5000)).to_pylist()
    column = table["x"].combine_chunks()
    read = column.to_numpy_ndarray() if len(shape) > 1 else np.array(column.to_pylist(), dtype)
    np.testing.assert_array_equal(read, values)
    assert pq.read_table(Path(shard.output, "quarantine/x/00000.parquet")).to_pylist() == [bad[0]._asdict()]
    found = layer_record(pq.read_metadata(Path(shard.output, "layers/x/00000.parquet")))
    assert found is not None
    assert (found.columns, found.rows) == ({"x": Column(np.dtype(dtype).name, shape)}, 5000)


@pytest.mark.parametrize("shape", [(768,), (257, 768)])
def test_a_row_group_is_small_whatever_a_batch_has(shard: Shard, shape: tuple[int, ...]) -> None:
    row = 4 * int(np.prod(shape))
    samples = np.arange((200 << 20) // row)
    with LayerWriter(shard, "x") as writer:
        writer.add(samples, ids(samples), {"x": np.zeros((len(samples), *shape), np.float32)})
        writer.finish(record(len(samples), 0, writer.columns), [])
    footer = pq.read_metadata(Path(shard.output, "layers/x/00000.parquet"))
    groups = [footer.row_group(number).num_rows for number in range(footer.num_row_groups)]
    assert sum(groups) == len(samples)
    assert max(groups) * row <= LARGEST_GROUP_BYTES


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(1 << 19,), (512, 1024)])
def test_a_column_may_hold_more_than_two_to_the_31_values(shard: Shard, shape: tuple[int, ...]) -> None:
    rows, batch = (1 << 12) + 8, np.zeros((8, *shape), np.uint8)
    with LayerWriter(shard, "x") as writer:
        for start in range(0, rows, 8):
            samples = np.arange(start, start + 8)
            batch[-1].flat[-1] = start % 251
            writer.add(samples, ids(samples), {"x": batch.copy()})
        writer.finish(record(rows, 0, writer.columns), [])
    parquet = pq.ParquetFile(Path(shard.output, "layers/x/00000.parquet"))
    assert parquet.metadata.num_rows * (1 << 19) > 2**31
    last = parquet.read_row_group(parquet.num_row_groups - 1)["x"].chunk(0)
    values = last.to_numpy_ndarray() if len(shape) > 1 else last.flatten().to_numpy()
    assert values.reshape(-1)[-1] == (rows - 8) % 251


def test_any_bit_of_the_footer_that_is_flipped_is_noticed(shard: Shard) -> None:
    samples = np.arange(10)
    with LayerWriter(shard, "x") as writer:
        writer.add(samples, ids(samples), {"x": np.ones((10, 7), np.float32)})
        writer.finish(record(10, 0, writer.columns), [])
    path = Path(shard.output, "layers/x/00000.parquet")
    whole = path.read_bytes()
    assert read_layer_record(shard.target, "layers/x/00000.parquet") is not None
    length = int.from_bytes(whole[-8:-4], "little")
    for at in range(len(whole) - 8 - length, len(whole)):
        flipped = bytearray(whole)
        flipped[at] ^= 1 << at % 8
        path.write_bytes(flipped)
        assert read_layer_record(shard.target, "layers/x/00000.parquet") is None, at - len(whole)


def test_what_is_not_finished_leaves_nothing(shard: Shard) -> None:
    samples = np.arange(5000)
    with LayerWriter(shard, "x") as writer:
        writer.add(samples, ids(samples), {"x": np.zeros((5000, 700), np.float32)})
    assert written(shard) == []


def test_an_account_that_does_not_balance_leaves_nothing(shard: Shard) -> None:
    samples = np.arange(10)
    with LayerWriter(shard, "x") as writer:
        writer.add(samples, ids(samples), {"x": np.zeros((10, 7), np.float32)})
        with pytest.raises(Unbalanced, match="11 samples, but 10 embedded and 0 quarantined"):
            writer.finish(LayerRecord("key", "x", "recipe", 11, 10, {}, 10, writer.columns), [])
    assert written(shard) == []


def test_rows_in_another_order_than_the_tar_are_noted(shard: Shard) -> None:
    with LayerWriter(shard, "x") as writer:
        for samples in (np.arange(5, 10), np.arange(5)):
            writer.add(samples, ids(samples), {"x": np.zeros((5, 7), np.float32)})
        assert not writer.in_order
