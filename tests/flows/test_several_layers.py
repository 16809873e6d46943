"""One output with several layers: two models, tokens, a layer that is dropped; each step does only what is missing."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from distributed import LocalCluster

from embedders import ImageEmbedder, TimmImageEmbedder
from embedders.errors import InputError
from embedders.webdataset import open_shard
from flows.demo_data import load_photograph
from flows.embed import embed_dataset, main
from flows.export import main as export
from flows.report import main as report
from flows.search import main as search
from tasks.manifest import Manifest
from tests.layers import run_engine

from .conftest import IMG2DATASET, Finished, img2dataset

VIT, EFFICIENT = "test_vit.r160_in1k", "test_efficientnet.r160_in1k"


def timm(name: str, column: str, **parameters: Any) -> TimmImageEmbedder:
    return TimmImageEmbedder(name, pretrained=False, image_embedding_column=column, **parameters)


Embed = Callable[..., Manifest]


@pytest.fixture(scope="module")
def embed() -> Iterator[Embed]:
    """Embed the data/ of a folder into its out/; one Dask cluster for all runs saves each the start of its own."""
    with LocalCluster(n_workers=1, threads_per_worker=2, dashboard_address=":0") as cluster:

        def run(folder: Path, *embedders: ImageEmbedder, **parameters: Any) -> Manifest:
            dataset, output = str(folder / "data"), str(folder / "out")
            return embed_dataset(dataset, output, embedders, scheduler=cluster.scheduler_address, **parameters)

        yield run


def written(folder: Path, pattern: str) -> dict[str, tuple[int, int]]:
    """What tells whether files were written again: inode and time of each."""
    found = {str(path.relative_to(folder)): path.stat() for path in sorted((folder / "out").glob(pattern))}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in found.items()}


@pytest.fixture(scope="module")
def two(server: str, tmp_path_factory: pytest.TempPathFactory, embed: Embed) -> tuple[Path, Manifest]:
    """A dataset in data/, embedded with two models into out/; not to be changed."""
    folder = tmp_path_factory.mktemp("two")
    img2dataset(folder / "data")
    return folder, embed(folder, timm(VIT, "b_vit"), timm(EFFICIENT, "a_efficient"))


@pytest.fixture
def copied(two: tuple[Path, Manifest], tmp_path: Path) -> Path:
    """The same, to be changed."""
    for name in ("data", "out"):
        shutil.copytree(two[0] / name, tmp_path / name, copy_function=shutil.copy2)
    return tmp_path


def test_each_model_has_its_own_layer_and_column(two: tuple[Path, Manifest]) -> None:
    folder, manifest = two
    assert manifest.column == "b_vit"  # the first that was asked for
    for layer in ("a_efficient", "b_vit"):
        account = manifest.layers[layer]
        assert (account.shards, account.samples, account.embedded, account.quarantined) == (2, 16, 16, 0)
    table = pq.read_table(folder / "out/metadata")
    assert table.column_names == [*IMG2DATASET, "a_efficient", "b_vit"]
    assert len(table) == 16
    for name, column in ((EFFICIENT, "a_efficient"), (VIT, "b_vit")):
        alone = run_engine(timm(name, column), [open_shard(folder / f"data/{i:05}.tar") for i in range(2)])
        vectors = np.stack(table.column(column).to_numpy())
        assert table.column("key").to_pylist() == [i for shard in alone for i in shard.ids]
        np.testing.assert_allclose(vectors, np.concatenate([shard.vectors for shard in alone]), atol=1e-5)


def test_nothing_is_done_twice(copied: Path, embed: Embed) -> None:
    before = written(copied, "**/*.parquet")
    again = embed(copied, timm(VIT, "b_vit"), timm(EFFICIENT, "a_efficient"))
    assert (again.shards_cached, again.embedded) == (2, 16)
    assert written(copied, "**/*.parquet") == before


def test_only_the_layer_that_a_shard_lacks_is_computed(copied: Path, embed: Embed) -> None:
    (copied / "out/layers/a_efficient/00001.parquet").unlink()
    before = written(copied, "layers/**/*.parquet")
    again = embed(copied, timm(VIT, "b_vit"), timm(EFFICIENT, "a_efficient"))
    after = written(copied, "layers/**/*.parquet")
    assert again.shards_cached == 1
    assert {name: found for name, found in after.items() if name in before} == before
    assert set(after) - set(before) == {"out/layers/a_efficient/00001.parquet"}


def test_tokens_are_a_layer_that_numpy_reads_in_one_line(copied: Path, embed: Embed) -> None:
    before = written(copied, "layers/**/*.parquet")
    manifest = embed(copied, timm(VIT, "b_vit", output_tokens=True))
    after = written(copied, "layers/**/*.parquet")
    assert {name: found for name, found in after.items() if name in before} == before  # the vectors are there
    layer = pq.read_table(copied / "out/layers/b_vit_tokens/00000.parquet")
    tokens = layer["b_vit_tokens"].combine_chunks().to_numpy_ndarray()
    assert tokens.dtype == np.float32
    with torch.inference_mode():
        model: Any = timm(VIT, "b_vit").create_model().eval()
        shape = model.forward_features(torch.zeros(1, 3, 160, 160)).shape
    assert tokens.shape == (8, *shape[1:])
    assert manifest.layers["b_vit_tokens"].columns["b_vit_tokens"] == {"dtype": "float32", "shape": list(shape[1:])}
    table = pq.read_table(copied / "out/metadata")
    assert table.column_names == [*IMG2DATASET, "a_efficient", "b_vit"]  # tokens stay in their layer


def test_a_dropped_layer_leaves_the_dataset_and_embeds_nothing(
    copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(copied / "out/layers/a_efficient")
    before = written(copied, "layers/**/*.parquet")
    call = [str(copied / "data"), "--output", str(copied / "out"), "--model-name", VIT, "--no-pretrained"]
    assert main([*call, "--image-embedding-column", "b_vit", "--device", "cpu", "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert "2 shards: 0 to embed, 2 done already" in said
    assert "a_efficient" not in said
    assert written(copied, "layers/**/*.parquet") == before
    assert pq.read_table(copied / "out/metadata").column_names == [*IMG2DATASET, "b_vit"]
    assert main([*call, "--image-embedding-column", "b_vit", "--device", "cpu", "--workers", "1"]) == 0
    assert "nothing to embed, nothing to merge" in capsys.readouterr().err


def test_an_added_layer_keeps_the_others(copied: Path, command: Callable[..., Finished]) -> None:
    before = written(copied, "layers/**/*.parquet")
    again = command(
        *(copied / "data", "--output", copied / "out", "--model-name", "test_resnet.r160_in1k", "--no-pretrained"),
        *("--image-embedding-column", "c_resnet", "--device", "cpu", "--workers", "1", "--json"),
    )
    assert again.status == 0, again.stderr
    assert sorted(again.manifest["layers"]) == ["a_efficient", "b_vit", "c_resnet"]
    assert written(copied, "layers/[ab]_*/*.parquet") == before
    assert pq.read_table(copied / "out/metadata").column_names == [*IMG2DATASET, "a_efficient", "b_vit", "c_resnet"]


def test_search_export_and_report_take_any_of_the_layers(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output, photograph = str(copied / "out"), str(copied / "cat.png")
    load_photograph("skimage", "data/chelsea.png").save(photograph)
    lengths = {}
    for layer in ("a_efficient", "b_vit"):
        assert search([output, "--image", photograph, "--layer", layer]) == 0
        assert search([output, "--id", "000000000", "--layer", layer, "--count", "1"]) == 0
        assert "1.000" in capsys.readouterr().out
        assert export([output, "--format", "npy", "--layer", layer, "--to", str(copied / layer)]) == 0
        assert report([output, "--layer", layer]) == 0
        lengths[layer] = np.load(copied / layer / "img_emb/img_emb_0.npy").shape[1]
        assert f"<th>dimensions<td>{lengths[layer]}" in (copied / "out/report.html").read_text()
    assert lengths == {"a_efficient": 256, "b_vit": 64}
    for command in (search, report):
        assert command([output, "--layer", "c", *(["--id", "000000000"] if command is search else [])]) == 2
        assert "no layer of vectors is called 'c'; give one of: a_efficient, b_vit" in capsys.readouterr().err
    assert export([output, "--format", "npy", "--layer", "caption"]) == 2
    assert "has no vectors 'caption'" in capsys.readouterr().err


def test_the_summary_names_each_layer(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call = [str(copied / "data"), "--output", str(copied / "new"), "--model-name", VIT, "--model-name", EFFICIENT]
    assert main([*call, "--no-pretrained", "--device", "cpu", "--workers", "1"]) == 0
    said = capsys.readouterr().err
    assert "16 samples = 16 embedded + 0 quarantined" in said
    assert "layer image_embedding_test_efficientnet: 16 samples = 16 embedded + 0 quarantined" in said
    account = json.loads((copied / "new/manifest.json").read_text())
    assert list(account["layers"]) == ["image_embedding", "image_embedding_test_efficientnet"]


def test_models_that_cannot_share_go_one_after_the_other(
    copied: Path, capsys: pytest.CaptureFixture[str], embed: Embed
) -> None:
    from flows.progress import Terminal

    shutil.rmtree(copied / "out")
    reference = timm(VIT, "b_vit", loader="reference")
    manifest = embed(copied, timm(EFFICIENT, "a_efficient"), reference, progress=Terminal())
    assert {name: layer.embedded for name, layer in manifest.layers.items()} == {"a_efficient": 16, "b_vit": 16}
    assert manifest.layers["b_vit"].decoders == {"reference": 2}
    said = capsys.readouterr().err
    assert "4 of 4 passes over shards, 32 images" in said


@pytest.mark.parametrize(
    ("embedders", "line"),
    [
        ([timm(VIT, "v"), timm(EFFICIENT, "v")], "two columns would be called 'v'"),
        ([timm(VIT, "v", output_tokens=True), timm(EFFICIENT, "v_tokens")], "two columns would be called 'v_tokens'"),
        ([timm(VIT, "caption")], "has a column 'caption' that shard-embed did not write"),
        ([timm(VIT, "key")], "a new column cannot be called 'key'"),
        ([timm(VIT, "part")], "a new column cannot be called 'part'"),
        ([timm(EFFICIENT, "b_vit")], "layer 'b_vit' was made by another model or setting"),
    ],
)
@pytest.mark.parametrize("in_place", [False, True])
def test_names_that_are_taken_are_refused_before_any_work(
    two: tuple[Path, Manifest], embedders: list[ImageEmbedder], line: str, in_place: bool, embed: Embed
) -> None:
    before = written(two[0], "**/*")
    with pytest.raises(InputError, match=line) as refused:
        embed(two[0], *embedders, in_place=in_place)
    assert "\n" not in str(refused.value)
    assert written(two[0], "**/*") == before


class Colour(ImageEmbedder):
    """Gives the mean colour as the vector, and its brightness and first row as further columns."""

    extra_columns = ("brightness", "bright", "rows")

    def load_dataset_shard(self, tar_path: str) -> Any:
        shard = open_shard(tar_path)
        for sample, data, _ in shard.encoded():
            yield np.full((1, 3), len(data), np.float32), [{"key": shard.id_of(sample)}]

    def load_embedding_model(self, device: str) -> Callable[[Any], Mapping[str, np.ndarray]]:
        return lambda images: {
            "image_embedding": images,
            "brightness": images.mean(axis=1),
            "bright": images.mean(axis=1) > 0,
            "rows": np.zeros((len(images), 2, 3), np.int16),
        }


def test_an_empty_tar_among_tokens_stops_nothing(copied: Path, embed: Embed) -> None:
    (copied / "data/00002.tar").write_bytes(bytes(1024))
    (copied / "data/00002.parquet").unlink(missing_ok=True)
    manifest = embed(copied, timm(VIT, "b_vit", output_tokens=True))
    assert (manifest.shards, manifest.shards_failed, manifest.rows) == (3, 0, 16)
    assert manifest.layers["b_vit_tokens"].columns["b_vit_tokens"]["shape"][1:] == [64]


def test_a_layer_whose_quarantine_is_gone_is_null_and_said_to_be_missing(copied: Path, embed: Embed) -> None:
    first = copied / "data/00000.tar"
    first.write_bytes(first.read_bytes().replace(b"JFIF", b"JFI\0", 1)[:-1024] + bytes(1024))
    with tarfile.open(first, "a") as tar:
        member = tarfile.TarInfo("bad.jpg")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"bad"))
    both = timm(VIT, "b_vit"), timm(EFFICIENT, "a_efficient")
    manifest = embed(copied, *both)
    assert manifest.layers["a_efficient"].quarantined_by_reason == {"not_an_image": 1}
    (copied / "out/quarantine/a_efficient/00000.parquet").unlink()
    manifest = embed(copied, both[0])
    assert manifest.shards_failed == 0
    assert [
        line for line in manifest.warnings if "layer a_efficient is missing or older than its tar in 1 shard" in line
    ]
    table = pq.read_table(copied / "out/metadata/00000.parquet")
    assert table["a_efficient"].null_count == len(table)
    again = embed(copied, *both)
    assert again.layers["a_efficient"].quarantined == 1
    assert pq.read_table(copied / "out/metadata/00000.parquet")["a_efficient"].null_count == 0


def test_a_renamed_layer_is_made_again_under_its_new_name(copied: Path, embed: Embed) -> None:
    (copied / "out/layers/a_efficient").rename(copied / "out/layers/c")
    manifest = embed(copied, timm(EFFICIENT, "c"))
    assert manifest.layers["c"].embedded == 16
    assert manifest.shards_cached == 0


def test_columns_of_one_name_in_two_layers_are_refused_before_any_work(copied: Path, embed: Embed) -> None:
    embed(copied, Colour())
    before = written(copied, "**/*.parquet")
    other = Colour(image_embedding_column="more")
    with pytest.raises(InputError, match="layers 'image_embedding' and 'more' both have a column 'brightness'"):
        embed(copied, other)
    with pytest.raises(InputError, match="two columns would be called 'brightness'"):
        embed(copied, Colour(), other)
    with pytest.raises(InputError, match="has a column 'caption' that shard-embed did not write"):
        embed(copied, Captions(image_embedding_column="captioned"))
    assert written(copied, "**/*.parquet") == before


class Captions(ImageEmbedder):
    """Would give a column that the user has."""

    extra_columns = ("caption",)

    def load_dataset_shard(self, tar_path: str) -> Any:
        raise AssertionError("it is refused before")

    def load_embedding_model(self, device: str) -> Any:
        raise AssertionError("it is refused before")


def test_a_mapping_of_arrays_becomes_columns_of_one_layer(copied: Path, embed: Embed) -> None:
    manifest = embed(copied, Colour())
    columns = manifest.layers["image_embedding"].columns
    assert columns == {
        "image_embedding": {"dtype": "float32", "shape": [3]},
        "brightness": {"dtype": "float32", "shape": []},
        "bright": {"dtype": "bool", "shape": []},
        "rows": {"dtype": "int16", "shape": [2, 3]},
    }
    layer = pq.read_table(copied / "out/layers/image_embedding/00001.parquet")
    assert layer["rows"].combine_chunks().to_numpy_ndarray().shape == (8, 2, 3)
    table = pq.read_table(copied / "out/metadata")
    assert table.column_names == [*IMG2DATASET, "a_efficient", "b_vit", "image_embedding", "brightness", "bright"]
    assert table["brightness"].to_pylist() == [vector[0] for vector in table["image_embedding"].to_pylist()]
