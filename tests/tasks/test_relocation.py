"""A manifest leads to its dataset, its merged files and its weights wherever the output has been moved or copied."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tasks.relocation import RELATIVE, Places, as_stored, find_places, missing_dataset


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with data/ and out/ side by side, and the manifest's places in out/manifest.json."""
    for name in (
        "data/00000.tar",
        "data/model.pth",
        "out/layers/image_embedding/00000.parquet",
        "out/metadata/00000.parquet",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"x")
    output = str(tmp_path / "out")
    places = {"dataset": str(tmp_path / "data"), "metadata": f"{output}/metadata"}
    places["checkpoint"] = str(tmp_path / "data/model.pth")
    (tmp_path / "out/manifest.json").write_text(json.dumps(as_stored(output, places)))
    return tmp_path


def found(output: Path) -> Places:
    return find_places(str(output), json.loads((output / "manifest.json").read_text()))


def test_places_are_stored_as_they_were_and_relative(place: Path) -> None:
    stored = json.loads((place / "out/manifest.json").read_text())
    assert stored[RELATIVE] == {"dataset": "../data", "metadata": "metadata", "checkpoint": "../data/model.pth"}
    assert stored["dataset"] == str(place / "data")
    data = str(place / "data")
    assert found(place / "out") == Places(data, str(place / "out/metadata"), f"{data}/model.pth")


def test_relative_paths_are_stored_as_absolute_ones(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    stored = as_stored("out", {"dataset": "data", "metadata": "out/metadata", "checkpoint": ""})
    assert stored["dataset"] == str(place / "data")
    monkeypatch.chdir("/")
    assert find_places(str(place / "out"), stored) == Places(str(place / "data"), str(place / "out/metadata"))


def test_a_copied_output_has_its_own_rows_and_the_old_dataset(place: Path, tmp_path: Path) -> None:
    shutil.copytree(place / "out", place / "elsewhere/copy")
    assert found(place / "elsewhere/copy") == Places(
        str(place / "data"), str(place / "elsewhere/copy/metadata"), str(place / "data/model.pth")
    )


def test_moved_together_they_find_one_another(place: Path) -> None:
    (place / "moved").mkdir()
    for name in ("data", "out"):
        (place / name).rename(place / "moved" / name)
    moved = place / "moved"
    assert found(moved / "out") == Places(
        str(moved / "data"), str(moved / "out/metadata"), str(moved / "data/model.pth")
    )


def test_another_folder_in_the_datasets_place_is_not_taken_for_it(place: Path) -> None:
    shutil.copytree(place / "out", place / "elsewhere/out")
    (place / "elsewhere/data").mkdir()
    (place / "elsewhere/data/other.tar").write_bytes(b"x")
    assert found(place / "elsewhere/out").dataset == str(place / "data")


def test_in_place_the_rows_are_where_the_dataset_is(place: Path) -> None:
    data = str(place / "data")
    (place / "out/manifest.json").write_text(
        json.dumps(as_stored(str(place / "out"), {"dataset": data, "metadata": data, "checkpoint": ""}))
    )
    shutil.copytree(place, place.parent / "copy")
    copy = str(place.parent / "copy/data")
    assert found(place.parent / "copy/out") == Places(copy, copy)
    said = find_places(str(place / "out"), json.loads((place / "out/manifest.json").read_text()), "/said")
    assert said == Places("/said", "/said")


def test_a_manifest_of_an_earlier_version(place: Path) -> None:
    stored = {"output": "/was/out", "metadata": "/was/out/metadata", "dataset": "/was/data"}
    assert find_places(str(place / "out"), stored) == Places("/was/data", str(place / "out/metadata"))
    assert find_places("s3://bucket/out", {}) == Places(metadata="s3://bucket/out/metadata")


def test_a_store_and_a_disk() -> None:
    stored = as_stored("/out", {"dataset": "s3://bucket/data", "metadata": "/out/metadata", "checkpoint": ""})
    assert stored[RELATIVE] == {"metadata": "metadata"}
    stored = as_stored("memory://a/out", {"dataset": "memory://a/data", "metadata": "memory://a/out/metadata"})
    assert stored[RELATIVE] == {"dataset": "../data", "metadata": "metadata"}
    assert find_places("memory://b/out", stored) == Places("memory://a/data", "memory://b/out/metadata")


def test_a_dataset_that_is_gone_is_named(place: Path) -> None:
    assert missing_dataset(str(place / "data")) == ""
    assert missing_dataset(str(place / "gone")).startswith(f"the dataset is not at {place / 'gone'} any more; give")
