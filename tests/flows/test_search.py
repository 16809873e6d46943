"""Searching an output: a photograph of the dataset finds itself, through the very way that its vector took."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from embedders import TimmImageEmbedder
from embedders.webdataset import open_shard
from flows.search import embed_image, embed_query, main, rebuild
from tasks.dataset.nearest import nearest
from tasks.manifest import Timing, account, read_manifest, write_manifest
from tasks.shards import find_shards
from tasks.storage.folder import Folder
from tests.layers import LAYER, embed_all, plan_of

PLACE = ("00000", 5)


@pytest.fixture(scope="module")
def made(demo_dataset: Path, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two of the demo's shards, an output of the trained model, and a photograph of a shard."""
    folder = tmp_path_factory.mktemp("search")
    (folder / "data").mkdir()
    for name in ("00000", "00001"):
        shutil.copy(demo_dataset / f"{name}.tar", folder / "data")
    embedder = TimmImageEmbedder("tf_efficientnet_lite0", checkpoint=checkpoint)
    shards = find_shards(str(folder / "data"), str(folder / "out"))
    embed_all(shards, embedder)
    write_manifest(account(plan_of(shards, embedder), 0, (), Timing(1.0), 128))
    shard = open_shard(folder / "data/00000.tar")
    image = shard.images[PLACE[1]]
    assert image is not None
    (folder / "photo.jpg").write_bytes(shard.bytes_of(image).tobytes())
    return folder


@pytest.mark.parametrize("with_faiss", [True, False])
def test_a_photograph_finds_itself(
    made: Path,
    checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    with_faiss: bool,
) -> None:
    if not with_faiss:
        monkeypatch.setitem(sys.modules, "faiss", None)  # an import of it fails as where it is not installed
    call = [str(made / "out"), "--image", str(made / "photo.jpg"), "--checkpoint", str(checkpoint)]
    assert main(call) == 0
    first = next(line for line in capsys.readouterr().out.splitlines() if ".tar/" in line)
    assert "00000.tar/000000005.jpg" in first
    assert float(re.findall(r"\d\.\d{4}", first)[0]) > 0.9999
    page = max((made / "out").glob("search*.html"), key=lambda page: page.stat().st_mtime).read_text()
    assert page.count("data:image/webp") == 13  # the query and twelve found
    assert "000000005.jpg" in page


def test_an_id_finds_the_same_as_a_product_of_all_vectors(made: Path, tmp_path: Path) -> None:
    assert main([str(made / "out"), "--id", "000000005", "--count", "7", "--sheet", str(tmp_path / "s.html")]) == 0
    tables = [pq.read_table(made / f"out/layers/image_embedding/{name}.parquet") for name in ("00000", "00001")]
    ids = [i for table in tables for i in table["id"].to_pylist()]
    vectors = np.stack([v for table in tables for v in table["image_embedding"].to_numpy()])
    query = vectors[ids.index("000000005")]
    scores = vectors @ query
    expected = np.argsort(-scores)[:7]
    found = nearest(Folder(str(made / "out")), LAYER, query, 7)
    assert [one.id for one in found] == [ids[i] for i in expected]
    assert np.allclose([one.score for one in found], scores[expected], atol=1e-6)
    assert all(one.id in (tmp_path / "s.html").read_text() for one in found)


def test_the_query_has_the_datasets_vector(made: Path, checkpoint: Path) -> None:
    vector = embed_image(made / "photo.jpg", TimmImageEmbedder("tf_efficientnet_lite0", checkpoint=checkpoint))
    row = pq.read_table(made / "out/layers/image_embedding/00000.parquet").slice(5, 1)
    assert float(vector @ row["image_embedding"].to_numpy()[0]) > 0.99999


def fails(capsys: pytest.CaptureFixture[str], *call: object) -> str:
    """The one line that a wrong call is answered with."""
    assert main([*map(str, call)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_wrong_calls(made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, photo = made / "out", made / "photo.jpg"
    trained = ("--checkpoint", checkpoint)
    (tmp_path / "page.jpg").write_text("<html>")
    assert "either --image FILE or --id ID" in fails(capsys, out)
    assert "no embedded sample has the id 'x'" in fails(capsys, out, "--id", "x")
    assert "No such file" in fails(capsys, out, "--image", tmp_path / "none.jpg", *trained)
    assert "not_an_image" in fails(capsys, out, "--image", tmp_path / "page.jpg", *trained)
    assert "no manifest.json" in fails(capsys, tmp_path, "--image", photo)
    assert "--checkpoint" in fails(capsys, out, "--image", photo)


def name_checkpoint(output: Path, checkpoint: Path) -> None:
    """Write the manifest anew, with the weights file that the run was given."""
    manifest = read_manifest(str(output))
    write_manifest(manifest.model_copy(update={"checkpoint": str(checkpoint)}))


def test_the_checkpoint_is_the_one_that_the_record_names(
    made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "out", tmp_path / "was/out")
    shutil.copytree(made / "data", tmp_path / "was/data")
    weights = tmp_path / "was/data/weights.safetensors"
    shutil.copy(checkpoint, weights)
    name_checkpoint(tmp_path / "was/out", weights)
    call = ("--image", made / "photo.jpg")
    assert main([*map(str, (tmp_path / "was/out", *call))]) == 0
    (tmp_path / "was").rename(tmp_path / "now")
    assert main([*map(str, (tmp_path / "now/out", *call))]) == 0
    capsys.readouterr()
    now = tmp_path / "now/data/weights.safetensors"
    now.write_bytes(b"other weights")
    assert f"{now} is another file now; give the --checkpoint" in fails(capsys, tmp_path / "now/out", *call)
    now.unlink()
    said = fails(capsys, tmp_path / "now/out", *call)
    assert f"was embedded with {weights}, which no longer exists; give --checkpoint" in said


def test_a_hub_is_not_asked_for_what_is_on_this_machine(
    made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With weights in the hub's cache and a hub that takes connections and never answers."""
    from huggingface_hub import constants

    with socket.create_server(("127.0.0.1", 0)) as silent, pytest.MonkeyPatch.context() as patch:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(constants.ENDPOINT, endpoint)
        patch.setattr(constants, "ENDPOINT", endpoint)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert "give it with --checkpoint" in fails(capsys, made / "out", "--image", made / "photo.jpg")
        repository = tmp_path / "hub/models--timm--tf_efficientnet_lite0.in1k"
        for folder in ("blobs", "refs", "snapshots/abc"):
            (repository / folder).mkdir(parents=True)
        shutil.copy(checkpoint, repository / "blobs/etag")
        (repository / "refs/main").write_text("abc")
        (repository / "snapshots/abc/model.safetensors").symlink_to("../../blobs/etag")
        shutil.copytree(made / "out", tmp_path / "out")
        manifest = read_manifest(str(tmp_path / "out"))
        made_by = manifest.embedder | {"weights": "model.safetensors:etag"}
        query = embed_query(
            str(made / "photo.jpg"), manifest.model_copy(update={"embedder": made_by, "checkpoint": ""}), None, None
        )
        silent.setblocking(False)
        with pytest.raises(BlockingIOError):  # nobody has asked
            silent.accept()
    row = pq.read_table(made / "out/layers/image_embedding/00000.parquet").slice(5, 1)
    assert float(query @ row["image_embedding"].to_numpy()[0]) > 0.99999


def test_another_model_is_refused(
    made: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    manifest["embedder"]["normalized"] = False
    (tmp_path / "out/manifest.json").write_text(json.dumps(manifest))
    call = (tmp_path / "out", "--image", made / "photo.jpg", "--checkpoint", checkpoint)
    assert "made by another model" in fails(capsys, *call)


def test_the_embedder_of_a_layer_in_float8_is_rebuilt_without(made: Path, checkpoint: Path) -> None:
    manifest = read_manifest(str(made / "out"))
    eight = manifest.model_copy(update={"embedder": manifest.embedder | {"precision": "float8"}})
    rebuilt = rebuild(eight, str(checkpoint), None)
    assert isinstance(rebuilt, TimmImageEmbedder)
    assert rebuilt.precision == "auto"
