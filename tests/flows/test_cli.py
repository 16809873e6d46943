"""The command line: what it prints, what it leaves, how it ends."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort

from embedders import ImageEmbedder
from embedders.webdataset import open_shard
from flows.cli import COMMON
from flows.config import EmbedConfig
from flows.demo_data import load_photograph
from flows.embed import main

from .conftest import processes_with

TINY = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu")


def fails(capsys: pytest.CaptureFixture[str], output: Path, *arguments: object) -> str:
    """Run a wrong call in this process; its one line, once it has left nothing behind."""
    assert main([*map(str, arguments), "--output", str(output)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert not output.exists()
    return captured.err


@pytest.fixture
def dataset(demo_dataset: Path, tmp_path: Path) -> Path:
    """A copy of two of the demo's shards, to be spoilt."""
    folder = tmp_path / "data"
    folder.mkdir()
    for name in ("00000", "00001"):
        shutil.copy(demo_dataset / f"{name}.tar", folder)
        shutil.copy(demo_dataset / f"{name}.parquet", folder)
    return folder


def test_no_such_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such folder" in fails(capsys, tmp_path / "out", tmp_path / "nothing")


def test_no_tars(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    assert "no .tar files" in fails(capsys, tmp_path / "out", tmp_path / "data")


def test_a_folder_of_pictures_says_how_to_pack_them(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/cat.jpg").write_bytes(b"x")
    line = fails(capsys, tmp_path / "out", tmp_path / "photos")
    assert "no .tar files, but pictures such as cat.jpg (1 in all); pack them: mkdir shards && tar -C " in line


@pytest.mark.parametrize(("ending", "command"), [(".tar.gz", "gunzip"), (".tar.zst", "zstd -d")])
def test_compressed_shards_say_how_to_unpack(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path, ending: str, command: str
) -> None:
    (dataset / f"00002{ending}").write_bytes(b"compressed")
    line = fails(capsys, tmp_path / "out", dataset, *TINY)
    assert f"00002{ending}" in line
    assert command in line


def test_unknown_model_names_the_closest(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path) -> None:
    line = fails(capsys, tmp_path / "out", dataset, "--model-name", "tf_efficientnet_lite")
    assert "tf_efficientnet_lite0" in line or "tf_efficientnet_lite4" in line


def test_weights_out_of_reach_name_the_ways_out(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    line = fails(capsys, tmp_path / "out", dataset, "--model-name", f"local-dir:{tmp_path}")
    assert "local-dir" in line
    line = fails(capsys, tmp_path / "out", dataset, "--checkpoint", tmp_path / "no.safetensors")
    assert "no checkpoint file" in line


def test_a_checkpoint_of_another_model_is_refused(
    capsys: pytest.CaptureFixture[str], dataset: Path, checkpoint: Path, tmp_path: Path
) -> None:
    call = ["--model-name", "tf_efficientnet_lite1", "--device", "cpu", "--checkpoint", checkpoint]
    assert "does not fit 'tf_efficientnet_lite1'" in fails(capsys, tmp_path / "out", dataset, *call)


def test_missing_id_column_names_the_columns(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path) -> None:
    line = fails(capsys, tmp_path / "out", dataset, *TINY, "--id-col", "uid")
    assert "'uid'" in line
    assert "key, caption, source" in line


def test_repeated_id_is_named(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path) -> None:
    table = pq.read_table(dataset / "00001.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(5, 1)]), dataset / "00001.parquet")
    line = fails(capsys, tmp_path / "out", dataset, *TINY)
    assert repr(table["key"][5].as_py()) in line
    assert "00001.parquet" in line


def test_ids_of_another_dataset_are_refused(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path) -> None:
    table = pq.read_table(dataset / "00000.parquet")
    others = pa.array([f"other-{i}" for i in range(len(table))])
    pq.write_table(table.set_column(0, "key", others), dataset / "00000.parquet")
    assert "none of its ids" in fails(capsys, tmp_path / "out", dataset, *TINY)


def test_metadata_that_is_no_parquet(capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path) -> None:
    (dataset / "00000.parquet").write_text("no Parquet")
    assert "not readable as Parquet" in fails(capsys, tmp_path / "out", dataset, *TINY)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--batch-size", "0"], "--batch-size"),
        (["--on-error", "ignore"], "'quarantine', 'null' or 'raise'"),
        (["--wrokers", "2"], "--workers"),
        (["--embedder", "no_such_module:Class"], "no_such_module"),
        (["--staging-space", "lots"], "--staging-space: give a size such as 20GB or 500MiB, not 'lots'"),
        (["--device", "gpu"], "no GPU"),
        (["--no-pretrained", "--device", "cpu", "--precision", "float8"], "float8 needs a GPU"),
    ],
)
def test_wrong_options(
    capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path, arguments: list[str], says: str
) -> None:
    assert says in fails(capsys, tmp_path / "out", dataset, *arguments)


def test_json_is_all_there_is_on_stdout(command: Callable[..., Any], dataset: Path, tmp_path: Path) -> None:
    """A run with no server configured: it starts one, and leaves neither it nor a worker behind."""
    output = tmp_path / "out"
    done = command(dataset, "--output", output, *TINY, "--json", "--workers", 2, PREFECT_HOME=str(tmp_path / "prefect"))
    assert done.status == 0, done.stderr
    assert {
        "samples": 128,
        "embedded": 127,
        "quarantined": 1,
        "shards": 2,
        "shards_cached": 0,
        "shards_failed": 0,
        "dimensions": 64,
        "model": "test_vit.r160_in1k",
        "output": str(output),
    }.items() <= done.manifest.items()
    assert done.manifest["images_per_second"] > 0
    assert not processes_with(f"PREFECT_HOME={tmp_path / 'prefect'}")
    again = command(dataset, "--output", output, *TINY, "--json")
    assert (again.status, again.manifest["shards_cached"]) == (0, 2)


def test_another_model_is_refused_unless_told(
    server: str, capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    call = [str(dataset), "--output", str(tmp_path / "out"), "--no-pretrained", "--device", "cpu", "--quiet"]
    assert main([*call, "--model-name", "test_vit.r160_in1k"]) == 0
    other = [*call, "--model-name", "test_efficientnet.r160_in1k"]
    capsys.readouterr()
    assert main(other) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert main([*other, "--overwrite"]) == 0
    column = pq.read_table(tmp_path / "out/metadata")["image_embedding"]
    assert len(column[0]) == 256


def test_what_is_said_of_a_failed_shard(
    server: str, capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    call = [str(dataset), "--output", str(output), *TINY]
    assert main(call) == 0
    said = capsys.readouterr().err
    assert "quarantined: 00000.tar 000000017.jpg: truncated" in said
    for name in ("metadata/*.parquet", "quarantine/*/*.parquet", "manifest.json", "report.html"):
        assert f" {output}/{name}\n" in said
    manifest = json.loads((output / "manifest.json").read_text())
    assert manifest["computed"] == {"float32 on a CPU": 2}
    assert manifest["images_per_second"] > 1.1 * 128 / manifest["seconds"]  # the workers' start is no part of it
    assert "float16" not in (output / "report.html").read_text().partition("<body>")[2]
    assert "float16" not in (output / "README.md").read_text()
    footer = pq.read_metadata(output / "metadata/00000.parquet").metadata[b"embeddings"]
    assert json.loads(footer)[0]["precision"] == "float32 on a CPU"
    (dataset / "00000.tar").write_bytes(b"no tar" * 1000)
    (output / "report.html").unlink()
    (output / "report.html").mkdir()
    assert main(call) == 1
    said = capsys.readouterr().err
    assert "\n1 shard failed; this does only what failed: python -m flows.embed " in said
    assert "64 samples = 64 embedded + 0 quarantined\n" in said
    assert "quarantined: 00000.tar" not in said  # an earlier run's row, of a tar that is gone
    assert "warning: no report.html: " in said


def pairs(folder: Path) -> Path:
    """A dataset of one shard whose samples have two images each."""
    folder.mkdir()
    photograph = load_photograph("skimage", "data/chelsea.png")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(4):
            for extension, image in (("left.jpg", photograph), ("RIGHT.PNG", photograph.rotate(90))):
                out = io.BytesIO()
                image.save(out, extension.rpartition(".")[2].upper().replace("JPG", "JPEG"))
                member = tarfile.TarInfo(f"nested/{number:03}.{extension}")
                member.size = len(out.getvalue())
                tar.addfile(member, io.BytesIO(out.getvalue()))
    return folder


def test_several_images_need_a_choice(server: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    dataset = pairs(tmp_path / "data")
    line = fails(capsys, tmp_path / "out", dataset, *TINY)
    assert "several images among left.jpg, RIGHT.PNG" in line
    assert "--image-component" in line
    assert "no sample has a .middle.jpg" in fails(
        capsys, tmp_path / "out", dataset, *TINY, "--image-component", "middle.jpg"
    )
    call = [str(dataset), "--output", str(tmp_path / "out"), *TINY, "--quiet"]
    assert main([*call, "--image-component", "right.png"]) == 0
    rows = pq.read_table(tmp_path / "out/metadata").to_pylist()
    assert [row["key"] for row in rows] == [f"nested/{number:03}" for number in range(4)]


def test_a_few_ambiguous_samples_in_the_first_tar_are_quarantined(
    server: str, capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    """A stem twice and a member twice: the others are embedded, and the call fails only beyond its limit."""
    with tarfile.open(dataset / "00000.tar", "a") as tar:
        members = tar.getmembers()
        for name in (f"{members[0].name.partition('.')[0]}.jfif", members[-1].name):
            member = tarfile.TarInfo(name)
            member.size = 9
            tar.addfile(member, io.BytesIO(b"any bytes"))
        tar.addfile(tarfile.TarInfo("README"))
    call = [str(dataset), "--output", str(tmp_path / "out"), *TINY]
    assert main(call) == 0
    told = capsys.readouterr().err
    assert "125 embedded + 3 quarantined (2 ambiguous_image, 1 " in told
    assert "is in the tar twice" in told
    assert "part of no sample: 1 of the tars' members, such as 00000.tar/README" in told
    assert main([*call, "--max-quarantined", "2.4%"]) == 0
    capsys.readouterr()
    assert main([*call, "--quiet", "--max-quarantined", "2.3%"]) == 1
    assert capsys.readouterr().err == (
        "failed: 3 of 128 samples (2.3%) are quarantined, more than 2.3% (--max-quarantined)\n"
    )
    fails(capsys, tmp_path / "other", dataset, *TINY, "--max-quarantined", "5")


def test_a_run_beyond_its_limit_fails_and_warns_in_the_report(
    server: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "data").mkdir()
    with tarfile.open(tmp_path / "data/00000.tar", "w") as tar:
        for name in ("0.jpg", "1.txt", "pictures/0002"):
            member = tarfile.TarInfo(name)
            member.size = 9
            tar.addfile(member, io.BytesIO(b"no image "))
    call = [str(tmp_path / "data"), "--output", str(tmp_path / "out"), *TINY, "--quiet"]
    assert main([*call, "--max-quarantined", "99%"]) == 1
    told = capsys.readouterr().err
    warning = "NOTHING WAS EMBEDDED: 2 of 2, 1 of them "
    assert f"warning: {warning}" in told
    assert "failed: 2 of 2 samples (100.0%) are quarantined, more than 99%" in told
    assert warning in (tmp_path / "out/report.html").read_text()
    assert "pictures/0002" in (tmp_path / "out/report.html").read_text()
    with get_client(sync_client=True) as client:
        newest = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)[0]
    assert newest.state_type == StateType.FAILED
    assert main(call) == 0


class Constant(ImageEmbedder):
    """Gives every image one and the same vector, as a model without weights may."""

    def load_dataset_shard(self, tar_path: str) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        ids = open_shard(tar_path).ids
        yield len(ids), [{"key": sample_id} for sample_id in ids]

    def load_embedding_model(self, device: str) -> Callable[[int], np.ndarray]:
        return lambda count: np.ones((count, 8), np.float32)


def test_vectors_that_are_all_alike_end_with_1_every_time(
    server: str, capsys: pytest.CaptureFixture[str], dataset: Path, tmp_path: Path
) -> None:
    call = [str(dataset), "--output", str(tmp_path / "out"), "--embedder", f"{__name__}:Constant", "--device", "cpu"]
    call.append("--quiet")
    for _ in range(2):
        assert main(call) == 1
        assert "all vectors of a shard are alike" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out/manifest.json").read_text())
    assert manifest["shards_failed"] == 0
    assert len(manifest["wrong"]) == 1


def test_help_fits_a_screen(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["--help"]) == 0
    short = capsys.readouterr().out
    assert len(short.splitlines()) <= 45
    assert [line for line in short.splitlines() if len(line) > 80] == []
    assert short.count("  python -m flows.embed ") == 3
    assert [option for option in COMMON - {"--dataset"} if option not in short] == []
    assert main(["--help-all"]) == 0
    every = capsys.readouterr().out
    assert "--no-pretrained            Random weights from a fixed seed" in every
    words = " ".join(every.split())
    for said in (
        "default: quarantine",
        "default: 178,000,000",
        "default: 8.0GiB",
        "(default: key)",
        "exact, fast; default",
    ):
        assert said in words
    names = [name.replace("_", "-") for name in EmbedConfig.model_fields]
    assert [name for name in names if f"--{name}" not in every and f"--no-{name}" not in every] == ["dataset"]


def test_an_unknown_option_is_told_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--output", "out", "--decod", "fast"]) == 2
    assert capsys.readouterr().err == "error: Unknown option: --decod. Did you mean --decode?\n"
