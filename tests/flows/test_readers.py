"""Every reader that the README names opens what a run leaves, by the README's own line."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import blocks

from .conftest import ROOT


def test_the_readers_of_the_readme(crawl: Path, tmp_path: Path) -> None:
    """Every line that opens the output does, and finds all its rows."""
    shutil.copytree(crawl / "out", tmp_path / "demo-out")
    (reading,) = [block.code for block in blocks("README.md") if "duckdb.sql" in block.code]
    (mapping,) = [block.code for block in blocks("README.md") if "mmap_mode" in block.code]
    check = """
import numpy as np
from flows.export import main
assert len(frame) == len(lazy) == len(table) == len(polars_frame) == len(relation) == len(rows) == 16
assert matrix.shape == (16, 64)
assert matrix.dtype == np.float32
assert len(pl.scan_parquet("demo-out/metadata").collect()) == 16
column = "image_embedding"
assert (np.stack(frame[column]) == matrix).all()
assert (np.stack(lazy.compute()[column]) == matrix).all()
assert (np.array(polars_frame[column].to_list(), np.float32) == matrix).all()
assert (np.array([row[0] for row in relation.select(column).fetchall()], np.float32) == matrix).all()
assert rows.features[column].feature.dtype == "float32"
assert (np.asarray(rows.with_format("numpy")[column]) == matrix).all()
assert main(["demo-out", "--format", "npy"]) == 0
"""
    code = f"{reading}\n{check}\n{mapping}\nassert (mapped == matrix).all()\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_embedding_reader(crawl: Path, tmp_path: Path) -> None:
    """In an environment of its own, which needs a package registry: it wants pandas 2."""
    code = f"""
from embedding_reader import EmbeddingReader
options = dict(file_format="parquet", embedding_column="image_embedding", meta_columns=["key"])
reader = EmbeddingReader({str(crawl / "out/metadata")!r}, **options)
batches = list(reader(batch_size=10, show_progress=False))
assert [len(vectors) for vectors, _ in batches] == [10, 6]
assert batches[0][0].shape == (10, 64)
"""
    uv = [sys.executable, "-m", "uv"]
    python = str(tmp_path / "env/bin/python")
    subprocess.run([*uv, "venv", "--quiet", "--python", sys.executable, str(tmp_path / "env")], check=True)
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", python, "embedding-reader", "pandas<3"], check=True)
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
