"""What a run leaves as the dataset: its layouts, what has no partner, and every reader that the README names."""

from __future__ import annotations

import json
import os
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders import TimmImageEmbedder
from embedders.errors import InputError
from flows.embed import embed_dataset
from tasks.dataset.card import CARD
from tasks.dataset.schema import SCHEMA
from tasks.manifest import Manifest
from tasks.run_lock import only_run

from .conftest import IMG2DATASET, TINY, embed
from .test_embed import written


@pytest.fixture
def copied(crawl: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A copy of it that a test may change: the dataset and the output."""
    shutil.copytree(crawl, tmp_path, dirs_exist_ok=True)
    return tmp_path / "data", tmp_path / "out"


def unmatched(output: Path) -> list[dict[str, Any]]:
    return [row for path in sorted(output.glob("unmatched/*.parquet")) for row in pq.read_table(path).to_pylist()]


# --- what has no partner ----------------------------------------------------------------------------------------------


def test_a_dataset_of_img2dataset_works_as_it_stands(crawl: Path) -> None:
    table = pq.read_table(crawl / "out/metadata")
    assert table.column_names == [*IMG2DATASET, "image_embedding"]
    assert set(table["status"].to_pylist()) == {"success"}
    left = unmatched(crawl / "out")
    assert len(left) == 8
    assert left[0] == {
        "id": "000000002",
        "member": "",
        "reason": "no_image",
        "detail": "row 2 of 00000.parquet: status failed_to_download",
    }
    manifest = json.loads((crawl / "out/manifest.json").read_text())
    assert (manifest["rows_without_image"], manifest["rows_without_embedding"]) == (8, 8)
    assert Manifest(**manifest).told_rows == "16; 8 more have no embedding and are left out"
    assert manifest["warnings"] == []  # a download that failed is no mismatch of ids


def test_ids_without_a_partner_are_warned_of_with_examples(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    table = pq.read_table(dataset / "00001.parquet")
    keys = ["other" if key == "000010000" else key for key in table["key"].to_pylist()]
    pq.write_table(table.set_column(2, "key", pa.array(keys)), dataset / "00001.parquet")
    manifest = embed(dataset, output)
    assert (manifest.embeddings_without_row, manifest.rows_without_image) == (1, 9)
    (warning,) = manifest.warnings
    assert "1 of 16 images have no metadata row" in warning
    assert "'000010000'" in warning
    assert {row["reason"] for row in unmatched(output)} == {"no_image", "no_metadata_row"}
    assert embed(dataset, output).warnings == manifest.warnings


def test_a_repeated_id_is_refused_or_set_aside_as_told(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    table = pq.read_table(dataset / "00000.parquet")
    pq.write_table(pa.concat_tables([table, table.slice(3, 1)]), dataset / "00000.parquet")
    before = written(output)
    manifest = embed(dataset, output)
    assert "id '000000003' is there twice, again in row 12" in manifest.failures["00000"]
    assert written(output)["metadata/00000.parquet"] == before["metadata/00000.parquet"]
    manifest = embed(dataset, output, repeated_ids="quarantine")
    assert (manifest.rows, manifest.rows_repeated, manifest.shards_failed) == (16, 1, 0)
    assert [row["detail"] for row in unmatched(output) if row["reason"] == "duplicate_id"] == [
        "row 12 of 00000.parquet repeats the id"
    ]


# --- one schema -------------------------------------------------------------------------------------------------------


def test_a_new_column_in_one_shard_reaches_all_files(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    table = pq.read_table(dataset / "00001.parquet")
    table = table.set_column(5, "width", table["width"].cast(pa.float64())).append_column("nsfw", pa.array(["no"] * 12))
    pq.write_table(table, dataset / "00001.parquet")
    before = written(output)
    assert embed(dataset, output).shards_cached == 2
    assert written(output)["layers/image_embedding/00000.parquet"] == before["layers/image_embedding/00000.parquet"]
    files = sorted((output / "metadata").glob("*.parquet"))
    schemas = {pq.read_schema(path).remove_metadata() for path in files}
    assert len(schemas) == 1
    (schema,) = schemas
    assert pq.read_schema(output / SCHEMA).remove_metadata() == schema
    assert schema.field("width").type == pa.float64()
    assert pq.read_table(output / "metadata")["nsfw"].null_count == 8
    again = written(output)
    assert embed(dataset, output).shards_cached == 2
    assert {name for name in again if written(output)[name] != again[name]} == {"manifest.json"}


def test_types_that_contradict_each_other_are_refused_before_anything_is_written(crawl: Path, tmp_path: Path) -> None:
    shutil.copytree(crawl / "data", tmp_path / "data")
    table = pq.read_table(tmp_path / "data/00001.parquet")
    pq.write_table(table.set_column(5, "width", pa.array(["wide"] * 12)), tmp_path / "data/00001.parquet")
    with pytest.raises(InputError, match=r"00001\.parquet: column 'width' is string, and int32 in .*00000\.parquet"):
        embed(tmp_path / "data", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- layouts ----------------------------------------------------------------------------------------------------------


def test_the_footer_and_the_card_say_what_the_vectors_are(crawl: Path) -> None:
    for name in ("metadata/00000.parquet", "metadata/00001.parquet", SCHEMA):
        (told,) = json.loads(pq.read_schema(crawl / "out" / name).metadata[b"embeddings"])
        assert (told["model"], told["weights"], told["normalized"]) == (TINY, "random, seed 0", True)
        assert (told["dimensions"], told["dtype"], told["type"]) == (64, "float32", "list")
        assert told["preprocessing"]["input_size"] == [3, 160, 160]
        assert {"torch", "timm", "pyarrow"} <= told["versions"].keys()
    column = pq.ParquetFile(crawl / "out/metadata/00000.parquet").metadata.row_group(0).column(11)
    assert (column.compression, column.statistics, column.has_dictionary_page) == ("UNCOMPRESSED", None, False)
    assert f"# Image embeddings by {TINY}" in (crawl / "out" / CARD).read_text()


def test_a_card_of_the_users_own_stays(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    (output / CARD).write_text("mine\n")
    embed(dataset, output)
    assert (output / CARD).read_text() == "mine\n"


def test_null_rows_in_another_type_merge_again_and_embed_nothing(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    before, files = pq.read_table(output / "metadata")["image_embedding"], written(output)
    form = {
        "embedding_type": "fixed_size_list",
        "embedding_dtype": "float16",
        "embedding_encoding": "byte_stream_split",
    }
    manifest = embed(dataset, output, on_error="null", **form)
    assert (manifest.shards_cached, manifest.rows, manifest.rows_without_image) == (2, 24, 8)
    assert manifest.told_rows == "24, 8 of them without an embedding"
    assert written(output)["layers/image_embedding/00000.parquet"] == files["layers/image_embedding/00000.parquet"]
    column = pq.read_table(output / "metadata")["image_embedding"]
    assert str(column.type) == "fixed_size_list<element: halffloat not null>[64]"
    assert column.null_count == 8
    vectors = np.array([vector for vector in column.to_pylist() if vector is not None])
    assert np.abs(vectors - np.array(before.to_pylist())).max() < 1e-3
    encodings = pq.ParquetFile(output / "metadata/00000.parquet").metadata.row_group(0).column(11).encodings
    assert "BYTE_STREAM_SPLIT" in encodings


def test_rows_a_file_and_back(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    whole = pq.read_table(output / "metadata")
    (output / "unmatched/00001.parquet").unlink()  # a list that went away is made again
    embed(dataset, output, rows_per_file=6)
    parts = sorted(path.name for path in (output / "metadata").glob("*.parquet"))
    assert parts == ["part-00000.parquet", "part-00001.parquet", "part-00002.parquet"]
    assert [pq.read_metadata(output / "metadata" / name).num_rows for name in parts] == [6, 6, 4]
    assert pq.read_table(output / "metadata").equals(whole)
    assert len(unmatched(output)) == 8
    before = written(output)
    (output / "metadata/part-00001.parquet").write_bytes(b"cut")
    assert embed(dataset, output, rows_per_file=6).rows == 16
    changed = {name for name in before if written(output)[name] != before[name]}
    assert changed == {"manifest.json", "report.html", "metadata/part-00001.parquet"}
    embed(dataset, output)
    assert sorted(path.name for path in (output / "metadata").glob("*.parquet")) == ["00000.parquet", "00001.parquet"]
    assert pq.read_table(output / "metadata").equals(whole)


def test_in_place_adds_the_column_and_keeps_everything_else(crawl: Path, copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    shutil.rmtree(output / "metadata")
    before = {path.name: pq.read_table(path) for path in dataset.glob("*.parquet")}
    os.chmod(dataset / "00000.parquet", 0o640)
    manifest = embed(dataset, output, in_place=True)
    assert (manifest.rows, manifest.rows_without_image) == (24, 8)
    assert not (output / "metadata").exists()
    assert stat.S_IMODE((dataset / "00000.parquet").stat().st_mode) == 0o640
    for name, table in before.items():
        after = pq.read_table(dataset / name)
        assert after.drop_columns("image_embedding").equals(table)
        fetched = [status == "success" for status in table["status"].to_pylist()]
        assert after["image_embedding"].is_valid().to_pylist() == fetched
    kept = written(dataset)
    assert embed(dataset, output, in_place=True).shards_cached == 2
    assert written(dataset) == kept
    assert sorted(path.name for path in dataset.iterdir()) == sorted(path.name for path in (crawl / "data").iterdir())


def test_in_place_a_column_of_the_users_own_is_refused_before_anything_is_embedded(crawl: Path, tmp_path: Path) -> None:
    shutil.copytree(crawl / "data", tmp_path / "data")
    table = pq.read_table(tmp_path / "data/00001.parquet")
    pq.write_table(table.append_column("image_embedding", table["caption"]), tmp_path / "data/00001.parquet")
    before = written(tmp_path / "data")
    for in_place in (True, False):
        with pytest.raises(
            InputError, match=r"00001\.parquet: has a column 'image_embedding' that shard-embed did not"
        ):
            embed(tmp_path / "data", tmp_path / "out", in_place=in_place)
    assert written(tmp_path / "data") == before
    assert not (tmp_path / "out").exists()


def test_in_place_two_runs_over_one_dataset_exclude_each_other(copied: tuple[Path, Path]) -> None:
    """They read a file, add a column and replace it: the column of the one would be lost."""
    dataset, output = copied
    with (
        only_run(str(dataset), "another", lost=print),
        pytest.raises(InputError, match=r"another run writes here: 'another'.* or leave out --in-place"),
    ):
        embed(dataset, output.with_name("other"), in_place=True)
    assert not output.with_name("other").exists()


def test_in_place_what_a_killed_writer_left_beside_the_tars_is_removed(copied: tuple[Path, Path]) -> None:
    dataset, output = copied
    before = sorted(path.name for path in dataset.iterdir())
    (dataset / f".00000.parquet.{'0' * 32}.tmp").write_bytes(b"half")
    embed(dataset, output)
    assert len(list(dataset.iterdir())) == len(before) + 1  # nothing of the user's folder is touched otherwise
    embed(dataset, output, in_place=True)
    assert sorted(path.name for path in dataset.iterdir()) == before


@pytest.mark.parametrize("column", ["id", "key"])
def test_the_embedding_column_cannot_be_the_ids(crawl: Path, tmp_path: Path, column: str) -> None:
    embedder = TimmImageEmbedder(TINY, pretrained=False, image_embedding_column=column)
    with pytest.raises(InputError, match=f"a new column cannot be called '{column}'"):
        embed_dataset(str(crawl / "data"), str(tmp_path / "out"), embedder, device="cpu")
    assert not (tmp_path / "out").exists()


def test_json_members_with_the_embedding_column_are_refused_at_planning(crawl: Path, tmp_path: Path) -> None:
    shutil.copytree(crawl / "data", tmp_path / "data")
    for path in (tmp_path / "data").glob("*.parquet"):
        path.unlink()
    embedder = TimmImageEmbedder(TINY, pretrained=False, image_embedding_column="caption")
    with pytest.raises(InputError, match=r"00000\.tar, json members: has a column 'caption'"):
        embed_dataset(str(tmp_path / "data"), str(tmp_path / "out"), embedder, device="cpu")


def test_in_place_and_rows_per_file_exclude_each_other(crawl: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="--in-place and --rows-per-file exclude each other"):
        embed(crawl / "data", tmp_path / "out", in_place=True, rows_per_file=5)
