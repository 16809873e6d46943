"""The complete examples of the documentation, run as they stand."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

ROOT = Path(__file__).parents[1]


def blocks(name: str, language: str) -> list[str]:
    """The code blocks of a page in one language."""
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / name).read_text(), re.DOTALL)


def test_the_custom_embedder_of_the_documentation(demo_dataset: Path, tmp_path: Path) -> None:
    (code,) = blocks("docs/custom-embedders.md", "python")
    (command,) = blocks("docs/custom-embedders.md", "sh")
    (tmp_path / "colours.py").write_text(code)
    shutil.copytree(demo_dataset, tmp_path / "demo-data")
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{tmp_path}"}
    arguments = shlex.split(command.replace("python", sys.executable, 1))
    done = subprocess.run(arguments, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    vectors = np.stack(pq.read_table(tmp_path / "colours-out/metadata")["image_embedding"].to_numpy())
    assert vectors.shape == (254, 64)
    assert np.allclose(vectors.sum(1), 1)
