"""Exports hold the dataset's own rows in their order, in little memory, whole or not at all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import faiss
import lance
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.export import main
from tasks.dataset.description import describe, footer
from tasks.dataset.export import faiss_index
from tasks.dataset.vectors import vector_array, write_vectors
from tasks.merge_options import MergedColumn, MergeOptions

from .conftest import ROOT


def write_output(folder: Path, rows: int, dimensions: int, *, null: int | None = None, files: int = 1) -> np.ndarray:
    """An output with a merged dataset of so many rows in each file; its vectors in their order."""
    (folder / "metadata").mkdir(parents=True)
    rng, column = np.random.default_rng(0), "image_embedding"
    written = []
    for number in range(files):
        vectors = rng.standard_normal((rows, dimensions), np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        valid = np.arange(rows) != (-1 if null is None else null)
        keys = [f"{number:02}{row:06}" for row in range(rows)]
        array = vector_array(vectors[valid], valid)
        table = pa.table({"key": keys, "n": list(range(rows)), column: array})
        merged = MergedColumn(column, column, "float32", (dimensions,))
        options = MergeOptions("key", (column,), (merged,), made_of={column: {"model": "m"}})
        notes = footer(table.schema, describe(options, {}))
        write_vectors(table.replace_schema_metadata(notes), str(folder / f"metadata/{number:05}.parquet"), column)
        written.append(vectors[valid])
    return np.concatenate(written)


def fails(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a call that cannot work; its one line."""
    capsys.readouterr()
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


def test_npy_is_what_clip_retrieval_writes(tmp_path: Path) -> None:
    vectors = write_output(tmp_path, 10, 8, null=3, files=2)
    assert main([str(tmp_path), "--format", "npy"]) == 0
    folder = tmp_path / "export/npy"
    mapped = np.load(folder / "img_emb/img_emb_0.npy", mmap_mode="r")
    assert (mapped.dtype, mapped.shape) == (np.float32, (18, 8))
    assert np.array_equal(mapped, vectors)
    metadata = pq.read_table(folder / "metadata/metadata_0.parquet")
    assert metadata.column_names == ["key", "n"]
    assert metadata["key"].to_pylist() == [f"{file:02}{row:06}" for file in (0, 1) for row in range(10) if row != 3]
    assert [path.name for path in (folder / "img_emb").iterdir()] == ["img_emb_0.npy"]


def test_npy_in_several_files_and_float16(tmp_path: Path) -> None:
    vectors = write_output(tmp_path, 25, 8, null=3, files=3)
    call = [str(tmp_path), "--format", "npy", "--to", str(tmp_path / "elsewhere"), "--dtype", "float16"]
    assert main([*call, "--rows-per-file", "7"]) == 0
    arrays = [np.load(path) for path in sorted((tmp_path / "elsewhere/img_emb").iterdir())]
    assert [len(array) for array in arrays] == [7] * 10 + [2]
    assert sorted(path.name for path in (tmp_path / "elsewhere/img_emb").iterdir())[:2] == [
        "img_emb_00.npy",
        "img_emb_01.npy",
    ]
    assert np.array_equal(np.concatenate(arrays), vectors.astype(np.float16))
    tables = [pq.read_table(path) for path in sorted((tmp_path / "elsewhere/metadata").iterdir())]
    assert [len(table) for table in tables] == [7] * 10 + [2]


@pytest.mark.parametrize("kind", ["flat", "ivf"])
def test_faiss_finds_every_row_by_its_own_vector(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(faiss_index, "BLOCK_BYTES", 40 * 16 * 4)
    vectors = write_output(tmp_path, 100, 16, null=5, files=3)
    assert main([str(tmp_path), "--format", "faiss", "--index", kind]) == 0
    folder = tmp_path / "export/faiss"
    index: Any = faiss.read_index(str(folder / "vectors.index"), faiss.IO_FLAG_ONDISK_SAME_DIR)
    if kind == "ivf":
        faiss.extract_index_ivf(index).nprobe = index.nlist
    assert index.ntotal == len(vectors) == 297
    similar, nearest = index.search(vectors, 1)
    assert nearest[:, 0].tolist() == list(range(297))
    assert np.allclose(similar, 1, atol=1e-5)
    assert pq.read_table(folder / "ids.parquet")["n"][5].as_py() == 6
    wanted = {"export.json", "ids.parquet", "vectors.index"} | ({"vectors.ivfdata"} if kind == "ivf" else set())
    assert {path.name for path in folder.iterdir()} == wanted


def test_lance_holds_columns_and_vectors(tmp_path: Path) -> None:
    vectors = write_output(tmp_path, 50, 8, null=0, files=2)
    assert main([str(tmp_path), "--format", "lance"]) == 0
    table = lance.dataset(str(tmp_path / "export/lance/data.lance")).to_table()
    assert table.column_names == ["key", "n", "image_embedding"]
    assert pa.types.is_fixed_size_list(table.schema.field("image_embedding").type)
    assert np.array_equal(np.array(table["image_embedding"].to_pylist(), np.float32), vectors)


def test_a_real_output_and_one_in_place(crawl: Path, tmp_path: Path) -> None:
    assert main([str(crawl / "out"), "--format", "npy", "--to", str(tmp_path / "npy")]) == 0
    table = pq.read_table(crawl / "out/metadata")
    mapped = np.load(tmp_path / "npy/img_emb/img_emb_0.npy", mmap_mode="r")
    assert np.array_equal(mapped, np.array(table["image_embedding"].to_pylist(), np.float32))
    assert pq.read_table(tmp_path / "npy/metadata/metadata_0.parquet").equals(table.drop_columns("image_embedding"))
    (tmp_path / "manifest.json").write_text(json.dumps({"metadata": str(crawl / "out/metadata")}))
    assert main([str(tmp_path), "--format", "lance"]) == 0


def test_an_export_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_output(tmp_path, 20, 8, files=2)
    assert main([str(tmp_path), "--format", "npy"]) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()}
    assert len(before) == 3
    (tmp_path / "export/.npy.999999999.tmp").mkdir()  # of a run that was killed
    damaged = tmp_path / "metadata/00001.parquet"
    whole = damaged.read_bytes()
    damaged.write_bytes(whole.replace(whole[100:140], bytes(40)))
    assert main([str(tmp_path), "--format", "npy", "--dtype", "float16"]) == 2
    assert {path: path.read_bytes() for path in (tmp_path / "export").rglob("*") if path.is_file()} == before
    assert [path.name for path in (tmp_path / "export").iterdir()] == ["npy"]
    damaged.write_bytes(whole)
    assert main([str(tmp_path), "--format", "npy", "--dtype", "float16"]) == 0
    assert np.load(tmp_path / "export/npy/img_emb/img_emb_0.npy").dtype == np.float16


def test_wrong_calls_are_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no merged dataset" in fails(capsys, tmp_path, "--format", "npy")
    write_output(tmp_path, 3, 8)
    assert "csv" in fails(capsys, tmp_path, "--format", "csv")
    assert "--rows-per-file" in fails(capsys, tmp_path, "--format", "npy", "--rows-per-file", 0)
    assert "give another --to" in fails(capsys, tmp_path, "--format", "npy", "--to", tmp_path / "metadata")
    for module, package in (("faiss", "faiss-cpu"), ("lance", "pylance")):
        monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install {package}" in fails(capsys, tmp_path, "--format", module)
    pq.write_table(pa.table({"key": ["a"]}), tmp_path / "metadata/other.parquet")
    assert "other.parquet: has no embeddings" in fails(capsys, tmp_path, "--format", "npy")


PEAK = """
import sys
from pathlib import Path
from flows.export import main
def memory(name):
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith(name)) // 1024
small, large, *options = sys.argv[1:]
assert main([small, *options]) == 0
Path("/proc/self/clear_refs").write_text("5")
before = memory("VmRSS")
assert main([large, *options]) == 0
print(memory("VmHWM") - before)
"""


@pytest.mark.parametrize(("kind", "limit"), [("npy", 150), ("lance", 220)])
def test_an_export_takes_little_memory(tmp_path: Path, kind: str, limit: int) -> None:
    """npy took 105 MB and lance 170, for 82 MB, 246 MB and 492 MB of vectors alike."""
    write_output(tmp_path / "small", 10, 512)
    write_output(tmp_path / "large", 75_000, 512, files=2)  # 307 MB
    command = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large"), "--format", kind]
    done = subprocess.run(command, cwd=ROOT, env=dict(os.environ), capture_output=True, text=True, check=True)
    assert int(done.stdout.splitlines()[-1]) < limit, done.stdout


def test_every_option_has_its_words() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "flows.export", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for word in ("--format", "--to", "--dtype", "--rows-per-file", "--index"):
        assert word in done.stdout
