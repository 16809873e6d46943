"""The page that shows an output: made from the files that the stages write, and opened in a browser."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

import embedders
import flows
import tasks
from embedders import TimmImageEmbedder
from embedders.webdataset import open_shard
from flows.report import main, write_report
from tasks.dataset.sampling import sample_vectors
from tasks.dataset.thumbnails import Pictures, data_url
from tasks.manifest import Timing, account, write_manifest
from tasks.shards import find_shards
from tasks.storage.folder import Folder
from tests.layers import LAYER, embed_all, plan_of

TRUNCATED = ("00000", "000000017")


@pytest.fixture(scope="session")
def made(demo_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo's shards and an output of a small model; not to be changed."""
    folder = tmp_path_factory.mktemp("report")
    shutil.copytree(demo_dataset, folder / "data")
    embedder = TimmImageEmbedder("test_vit.r160_in1k", pretrained=False, loader="reference")
    shards = find_shards(str(folder / "data"), str(folder / "out"))
    embed_all(shards, embedder)
    write_manifest(account(plan_of(shards, embedder), 0, (), Timing(1.0), 256))
    return folder


@pytest.fixture
def copied(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, to be changed; its manifest names the dataset where it was."""
    shutil.copytree(made / "out", tmp_path / "out")
    return tmp_path / "out"


def test_one_page_shows_all_there_is(made: Path, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(copied)]) == 0
    assert capsys.readouterr().out.strip() == f"{copied}/report.html"
    page = (copied / "report.html").read_text()
    assert len(page) < 10_000_000
    for said in ("256 = 254 embedded + 2 quarantined", "test_vit.r160_in1k", "truncated", "Map", "Near duplicates"):
        assert said in page
    own = page.replace(re.findall(r"<script>.*?</script>", page, re.DOTALL)[0], "")  # plotly's bundle names its maps
    assert not re.search(r"(src|href)=.?(https?:)?//", own)
    assert own.count("data:image/webp") > 254  # on the map, beside their neighbours, and what was quarantined
    assert "class=wrong" not in page
    heads, cells = (re.findall(rf"<{tag}>([^<]*)", page.partition("Where the time went")[2]) for tag in ("th", "td"))
    assert heads[:5] == ["worker", "read", "decode", "model", "write"]
    assert sum(int(cell.removesuffix(" %")) for cell in cells[:4]) == pytest.approx(100, abs=2)


def test_thumbnails_are_of_the_samples_that_they_stand_for(made: Path) -> None:
    pictures = Pictures(str(made / "data"), str(made / "out"), LAYER)
    shard = open_shard(made / "data/00000.tar")
    places = [("00000", shard.ids[i]) for i in (0, 16, 18, 63)]
    urls = pictures.of(places, 64)
    for i, place in zip((0, 16, 18, 63), places, strict=True):
        image = shard.images[i]
        assert image is not None
        assert urls[place] == data_url(shard.bytes_of(image).tobytes(), 64)
    assert TRUNCATED in pictures.of([TRUNCATED], 64)


def test_a_thumbnail_starts_no_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow gives PostScript to the gs that it finds; here that would leave a file."""
    from PIL import EpsImagePlugin

    (tmp_path / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    (tmp_path / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with contextlib.suppress(OSError):
        Image.open(io.BytesIO(eps)).load()
    assert (tmp_path / "started").exists()  # or this tests nothing
    (tmp_path / "started").unlink()
    assert data_url(eps, 64) is None
    assert not (tmp_path / "started").exists()


def test_a_thumbnail_keeps_to_the_pixel_limit_and_shows_a_cut_jpeg() -> None:
    def saved(kind: str) -> bytes:
        out = io.BytesIO()
        Image.effect_noise((300, 200), 90).save(out, kind)
        return out.getvalue()

    assert data_url(saved("PNG"), 64, max_pixels=60_000)
    assert data_url(saved("PNG"), 64, max_pixels=59_999) is None
    assert data_url(saved("JPEG")[:4000], 64)
    assert data_url(saved("PNG")[:4000], 64) is None
    assert data_url(b"", 64) is None


def test_other_peoples_images_are_opened_in_one_place() -> None:
    """The one that says which formats; the demo's photographs are its own."""
    folders = [Path(package.__path__[0]) for package in (embedders, flows, tasks)]
    files = [
        file
        for folder in folders
        for file in folder.rglob("*.py")
        if re.search(r"(?<!`PIL\.)Image\.open\(", file.read_text())
    ]
    assert {file.name for file in files} == {"images.py", "demo_data.py"}


def test_a_sample_holds_the_vectors_of_its_ids(made: Path) -> None:
    sampled = sample_vectors(Folder(str(made / "out")), LAYER, 40, np.random.default_rng(0))
    assert len(set(sampled.places)) == len(sampled.vectors) == 40
    for place, vector in zip(sampled.places, sampled.vectors, strict=True):
        rows = pq.read_table(made / f"out/layers/image_embedding/{place[0]}.parquet").to_pylist()
        assert np.array_equal(next(row["image_embedding"] for row in rows if row["id"] == place[1]), vector)


@pytest.mark.parametrize("change", ["gone", "another tar"])
def test_without_the_dataset_there_are_no_thumbnails(made: Path, tmp_path: Path, change: str) -> None:
    shutil.copytree(made, tmp_path / "all")
    data, output = tmp_path / "all/data", tmp_path / "all/out"
    text = (output / "manifest.json").read_text().replace(str(made / "data"), str(data))
    (output / "manifest.json").write_text(text)
    if change == "gone":
        shutil.rmtree(data)
    else:
        for tar in data.glob("*.tar"):
            tar.write_bytes(b"no tar")
    page = Path(write_report(str(output))).read_text()
    assert "data:image/webp" not in page
    assert "Nearest neighbours" in page


def test_what_is_no_output_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err


@pytest.mark.browser
def test_the_page_opens_hovers_and_logs_no_error(copied: Path) -> None:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    page = write_report(str(copied))
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1200,3000"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    try:
        driver.get(f"file://{page}")
        WebDriverWait(driver, 30).until(lambda d: d.find_elements(By.CSS_SELECTOR, "#map .points path"))
        point = driver.find_element(By.CSS_SELECTOR, "#map .points path")
        driver.execute_script("arguments[0].scrollIntoView({block: 'center'})", point)
        webdriver.ActionChains(driver).move_to_element(point).pause(0.5).perform()
        hover = driver.find_element(By.ID, "hover")
        WebDriverWait(driver, 10).until(lambda d: hover.is_displayed())
        assert int(str(hover.find_element(By.TAG_NAME, "img").get_property("naturalWidth"))) > 0
        errors = [entry for entry in driver.get_log("browser") if entry["level"] in {"SEVERE", "WARNING"}]
        assert not errors
    finally:
        driver.quit()
