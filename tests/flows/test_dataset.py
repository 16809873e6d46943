"""Custom embedders and the form that users of NeMo Curator bring along, as scripts of their own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedders.errors import InputError
from flows import ImageTextPairDataset, get_client
from flows.demo_data import BROKEN

ROOT = Path(__file__).parents[2]

NEMO = """
from embedders import TimmImageEmbedder
from flows import get_client, ImageTextPairDataset

client = get_client(cluster_type="cpu")
dataset = ImageTextPairDataset.from_webdataset(path="data", id_col="key")
embedder = TimmImageEmbedder(
    "test_vit.r160_in1k",
    pretrained=False,
    batch_size=32,
    num_threads_per_worker=2,
    normalize_embeddings=True,
    autocast=False,
)
with_embeddings = embedder(dataset)
with_embeddings.save_metadata()
"""

CUSTOM = '''
import io
import tarfile

import numpy as np
from PIL import Image

from embedders import ImageEmbedder
from flows.embed import embed_dataset


class MeanColour(ImageEmbedder):
    """Embeds an image as its mean colour, from batches that are lists of PIL images."""

    def load_dataset_shard(self, tar_path):
        with tarfile.open(tar_path) as tar:
            for member in tar:
                if not member.name.endswith((".jpg", ".jpeg", ".png")):
                    continue
                try:
                    image = Image.open(tar.extractfile(member)).convert("RGB")
                except OSError:
                    continue
                yield [image], [{"key": member.name.partition(".")[0]}]

    def load_embedding_model(self, device):
        return lambda images: np.stack([np.asarray(image).mean((0, 1)) for image in images])
'''


@pytest.fixture
def folder(demo_dataset: Path, tmp_path: Path) -> Path:
    """A working folder with a copy of the demo's dataset in data/."""
    (tmp_path / "data").mkdir()
    for path in [*demo_dataset.glob("*.tar"), *demo_dataset.glob("*.parquet")]:
        shutil.copy2(path, tmp_path / "data")
    return tmp_path


def run_script(folder: Path, text: str) -> None:
    """Run a script as its author would: by name, without a `__main__` guard."""
    (folder / "script.py").write_text(text)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]


def test_the_form_from_nemo_curator_adds_the_column_beside_the_tars(server: str, folder: Path) -> None:
    before = {path.name: pq.read_table(path) for path in (folder / "data").glob("*.parquet")}
    run_script(folder, NEMO)
    missing = 0
    for name, table in before.items():
        after = pq.read_table(folder / "data" / name)
        assert after.drop_columns("image_embedding").replace_schema_metadata(None) == table
        missing += after["image_embedding"].null_count
    assert missing == len(BROKEN)
    assert not list((folder / "data").rglob("metadata"))  # the Parquets beside the tars are all there is


def test_a_custom_embedder_defined_in_a_script(server: str, folder: Path) -> None:
    run_script(folder, CUSTOM + '\nassert embed_dataset("data", "out", embedder=MeanColour(), workers=2).shards == 4\n')
    table = pq.read_table(folder / "out/metadata")
    assert len(table) == 254
    assert np.stack(table["image_embedding"].to_numpy()).shape == (254, 3)
    reasons = {row["reason"] for row in pq.read_table(folder / "out/quarantine").to_pylist()}
    assert reasons == {"not_embedded"}


def test_a_custom_embedder_by_name_on_the_command_line(server: str, folder: Path) -> None:
    (folder / "colours.py").write_text(CUSTOM)
    done = subprocess.run(
        [sys.executable, "-m", "flows.embed", "data", "--output", "out", "--embedder", "colours:MeanColour"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "256 samples = 254 embedded + 2 quarantined (2 not_embedded)" in done.stderr


def test_columns_in_place_are_refused(folder: Path) -> None:
    from embedders import TimmImageEmbedder

    get_client("cpu")
    dataset = TimmImageEmbedder("test_vit.r160_in1k", pretrained=False)(
        ImageTextPairDataset.from_webdataset(folder / "data", "key")
    )
    with pytest.raises(InputError, match="give a path"):
        dataset.save_metadata(columns=["key"])
    with pytest.raises(InputError, match="no column nothing"):
        dataset.save_metadata(folder / "elsewhere", columns=["nothing"])
    assert not (folder / "elsewhere").exists()


def test_a_gpu_that_is_not_there_is_missed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="no GPU is visible here; give cluster_type='cpu'"):
        get_client("gpu")
    get_client("gpu", scheduler_address="tcp://127.0.0.1:8786")  # its workers may have some
    get_client("cpu")


@pytest.mark.parametrize(
    ("name", "instead"),
    [("metadata", "read_parquet"), ("tar_files", "glob"), ("to_webdataset", "ShardWriter"), ("other", "'other'$")],
)
def test_what_the_dataset_of_nemo_curator_has_and_this_has_not_is_named(name: str, instead: str) -> None:
    with pytest.raises(AttributeError, match=f"ImageTextPairDataset has no attribute '{name}'|{instead}") as raised:
        getattr(ImageTextPairDataset.from_webdataset("data", "key"), name)
    assert instead.rstrip("$") in str(raised.value)
