"""search, report and export on outputs that were moved or copied, lie in a store, or cannot be written to."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import s3fs

from flows.export import main as export
from flows.report import main as report
from flows.search import main as search
from tests.servers import s3_server

from .conftest import embed, img2dataset

ID = "000000003"


@pytest.fixture(scope="module")
def bucket() -> Iterator[Any]:
    """A bucket of a real S3 server, which this process reaches as s3://bucket."""
    with s3_server() as url, pytest.MonkeyPatch.context() as environment:
        for name, value in {
            "AWS_ENDPOINT_URL": url,
            "AWS_ACCESS_KEY_ID": "testing",
            "AWS_SECRET_ACCESS_KEY": "testing",
            "AWS_DEFAULT_REGION": "us-east-1",
        }.items():
            environment.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        store = s3fs.S3FileSystem(use_listings_cache=False, skip_instance_cache=True)
        store.mkdir("bucket")
        yield store
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def place(crawl: Path, tmp_path: Path) -> Path:
    """A copy of a dataset (data/) and its output (out/), moved together."""
    shutil.copytree(crawl, tmp_path / "place")
    return tmp_path / "place"


def line(capsys: pytest.CaptureFixture[str], main: Callable[[Sequence[str]], int], *call: object) -> str:
    """The one line that a call that cannot work ends with."""
    capsys.readouterr()
    assert main([*map(str, call)]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def halved(output: Path) -> None:
    """Leave the first shard's rows only: what an export of this very output has."""
    (output / "metadata/00001.parquet").unlink()


def test_a_copy_is_exported_and_not_the_output_that_it_was_made_of(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", tmp_path / "copy")
    halved(tmp_path / "copy")
    assert export([str(tmp_path / "copy"), "--format", "npy"]) == 0
    assert len(np.load(tmp_path / "copy/export/npy/img_emb/img_emb_0.npy")) == 8
    assert not (place / "out/export").exists()


def test_relative_paths_hold_from_any_folder(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    img2dataset(Path("data"))
    assert embed(Path("data"), Path("out")).output == "out"
    monkeypatch.chdir("/")
    assert export([str(tmp_path / "out"), "--format", "npy"]) == 0
    assert search([str(tmp_path / "out"), "--id", ID, "--count", "3"]) == 0
    assert "warning" not in capsys.readouterr().err
    assert (tmp_path / "out/search.html").read_text().count("data:image/webp") == 3


def test_in_place_the_moved_dataset_is_exported(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "was").mkdir()
    img2dataset(tmp_path / "was/data")
    embed(tmp_path / "was/data", tmp_path / "was/out", in_place=True)
    (tmp_path / "was").rename(tmp_path / "now")
    assert export([str(tmp_path / "now/out"), "--format", "npy"]) == 0
    assert json.loads((tmp_path / "now/out/export/npy/export.json").read_text())["from"] == str(tmp_path / "now/data")
    assert search([str(tmp_path / "now/out"), "--id", ID, "--count", "1"]) == 0
    assert "cat 3" in capsys.readouterr().out
    (tmp_path / "now/data").rename(tmp_path / "data")
    said = line(capsys, export, tmp_path / "now/out", "--format", "npy")
    assert f"the dataset is not at {tmp_path / 'was/data'} any more; give --dataset FOLDER" in said
    assert export([str(tmp_path / "now/out"), "--format", "npy", "--dataset", str(tmp_path / "data")]) == 0


@pytest.mark.parametrize(("main", "call"), [(report, ()), (search, ("--id", ID))])
def test_a_dataset_that_is_gone_is_missed_aloud(
    crawl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], main: Any, call: tuple[str, ...]
) -> None:
    shutil.copytree(crawl / "out", tmp_path / "out")
    stored = json.loads((tmp_path / "out/manifest.json").read_text())
    (tmp_path / "out/manifest.json").write_text(json.dumps(stored | {"dataset": "/gone"}))
    assert main([str(tmp_path / "out"), *call]) == 0
    said = capsys.readouterr().err
    assert "warning: no pictures of 2 shards: the dataset is not at /gone any more; give --dataset FOLDER" in said
    assert main([str(tmp_path / "out"), *call, "--dataset", str(crawl / "data")]) == 0
    assert "warning" not in capsys.readouterr().err


def test_search_shows_the_users_columns(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert search([str(place / "out"), "--id", ID, "--count", "2"]) == 0
    printed = capsys.readouterr().out
    for word in ("url", "caption", "status", f"https://x.test/{ID}.jpg", "cat 3", "success"):
        assert word in printed
    assert "cat 3" in (place / "out/search.html").read_text()
    assert search([str(place / "out"), "--id", ID, "--column", "sha256", "--column", "width"]) == 0
    printed = capsys.readouterr().out
    assert "https" not in printed
    assert f"{3:064x}" in printed
    assert "cat 3" not in printed
    assert "no column nothing; there are url, caption" in line(
        capsys, search, place / "out", "--id", ID, "--column", "nothing"
    )


def test_columns_are_found_whatever_the_files_and_the_id_column_are(
    server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    img2dataset(tmp_path / "data")
    embed(tmp_path / "data", tmp_path / "out", rows_per_file=5, id_col="url")
    assert search([str(tmp_path / "out"), "--id", f"https://x.test/{ID}.jpg", "--count", "1"]) == 0
    assert "cat 3" in capsys.readouterr().out


def test_no_page_takes_the_place_of_an_earlier_one(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("search.html", "search-2.html", "search-3.html"):
        assert search([str(place / "out"), "--id", ID]) == 0
        assert f"pictures: {place}/out/{name}" in capsys.readouterr().err
        (place / "out" / name).write_text("kept")
    assert (place / "out/search.html").read_text() == "kept"


def named(path: str) -> str:
    """A path without the numbers by which Lance names its files anew every time."""
    return re.sub("[0-9a-f-]{20,}", "", path)


@pytest.mark.parametrize("kind", ["npy", "faiss", "lance"])
def test_an_export_to_a_store(
    bucket: Any,
    crawl: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    to = f"s3://bucket/exports/{kind}"
    assert export([str(crawl / "out"), "--format", kind, "--to", to]) == 0
    assert capsys.readouterr().err == f"{to}: 16 of 16 rows, those that have a vector\n"
    assert export([str(crawl / "out"), "--format", kind, "--to", str(tmp_path / "here")]) == 0
    written = {named(path.removeprefix(f"bucket/exports/{kind}/")) for path in bucket.find(f"bucket/exports/{kind}")}
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert written == {named(path.relative_to(tmp_path / "here").as_posix()) for path in files}
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert "unfinished" not in json.loads(bucket.cat(f"bucket/exports/{kind}/export.json"))
    if kind == "npy":
        whole = bucket.cat("bucket/exports/npy/img_emb/img_emb_0.npy")
        assert whole == (tmp_path / "here/img_emb/img_emb_0.npy").read_bytes()


def test_an_export_in_a_store_is_replaced_without_leftovers(
    bucket: Any, crawl: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    call = [str(crawl / "out"), "--format", "npy", "--to", "s3://bucket/again"]
    assert export([*call, "--rows-per-file", "3"]) == 0
    assert len(bucket.find("bucket/again")) == 13
    assert export(call) == 0
    assert len(bucket.find("bucket/again")) == 3
    bucket.pipe("bucket/other/theirs.txt", b"x")
    assert "s3://bucket/other: holds something that is no export" in line(
        capsys, export, crawl / "out", "--format", "npy", "--to", "s3://bucket/other"
    )


def test_an_output_in_a_store_keeps_its_scheme(
    bucket: Any, crawl: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bucket.put(str(crawl / "data"), "bucket/crawl/data", recursive=True)
    bucket.put(str(crawl / "out"), "bucket/crawl/out", recursive=True)
    out = "s3://bucket/crawl/out"
    assert search([out, "--id", ID]) == 0
    assert f"pictures: {out}/search.html\n" in capsys.readouterr().err
    assert bucket.exists("bucket/crawl/out/search.html")
    assert search([out, "--id", ID, "--sheet", "s3://bucket/sheets/one.html"]) == 0
    assert "pictures: s3://bucket/sheets/one.html\n" in capsys.readouterr().err
    assert bucket.exists("bucket/sheets/one.html")
    assert report([out]) == 0
    assert capsys.readouterr().out == f"{out}/report.html\n"
    assert export([out, "--format", "npy"]) == 0
    assert f"{out}/export/npy: 16 of 16 rows" in capsys.readouterr().err
    assert len(bucket.find("bucket/crawl/out/export/npy")) == 3


def test_what_cannot_be_written_is_one_line(
    bucket: Any, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "file").write_text("x")
    out = place / "out"
    for to in (place / "file", place / "file/below", "/proc/nothing/here", "s3://no-such-bucket/here"):
        said = line(capsys, export, out, "--format", "npy", "--to", to)
        assert f"{to}: " in said or "s3://no-such-bucket/here: " in said
    assert (place / "file").read_text() == "x"
    for sheet in (place / "file/below.html", "/proc/nothing/s.html", "s3://no-such-bucket/s.html", place / "data"):
        said = line(capsys, search, out, "--id", ID, "--sheet", sheet)
        assert said.startswith(f"error: {sheet}: cannot be written (")
        assert "give another --sheet FILE" in said
    (out / "report.html").unlink()
    (out / "report.html").mkdir()
    assert line(capsys, report, out).startswith(f"error: {out}/report.html: cannot be written (")


def test_a_damaged_dataset_is_not_called_an_unwritable_export(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    damaged = place / "out/metadata/00001.parquet"
    start = pq.read_metadata(damaged).row_group(0).column(1).data_page_offset
    content = bytearray(damaged.read_bytes())
    content[start + 40 : start + 60] = bytes(20)
    damaged.write_bytes(content)
    assert f"error: {damaged}: cannot be read" in line(capsys, export, place / "out", "--format", "npy")
    assert not list((place / "out/export").iterdir())
