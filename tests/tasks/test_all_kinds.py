"""One shard of every kind of image, good and bad, embedded by both loaders: no sample ends another, none is lost."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from embedders import TimmImageEmbedder
from embedders.quarantine import Reason
from tasks.records import LayerRecord
from tasks.shards import find_shards
from tests.kinds import damaged, photograph, saved, whole
from tests.layers import embed_all

from .conftest import write_tar

TINY = "test_vit.r160_in1k"


def embed(dataset: Path, output: Path, **parameters: object) -> LayerRecord:
    embedder = TimmImageEmbedder(TINY, pretrained=False, batch_size=16, **parameters)  # type: ignore[arg-type]
    (record,) = embed_all(find_shards(str(dataset), str(output)), embedder)
    return record


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_the_account_of_a_shard_of_all_kinds(tmp_path: Path, loader: str) -> None:
    good, bad = [make() for make in whole().values()], [data for data, _ in damaged().values()]
    members: dict[str, bytes] = {}
    for number, data in enumerate([*good, *bad]):
        members[f"{number:03}.jpg" if number % 2 else f"{number:03}.IMG"] = data  # the name lies as often as not
    members |= {"no-image.txt": b"a caption", "no-bytes.jpg": b"", "two.jpg": good[0], "two.png": good[10]}
    write_tar(tmp_path / "data/00000.tar", members)
    record = embed(tmp_path / "data", tmp_path / loader, loader=loader)
    embedded = pq.read_table(tmp_path / loader / "layers/image_embedding/00000.parquet")["id"].to_pylist()
    quarantined = {
        r["id"]: r["reason"]
        for r in pq.read_table(tmp_path / loader / "quarantine/image_embedding/00000.parquet").to_pylist()
    }
    assert embedded == [f"{number:03}" for number in range(len(good))]
    named = {"no-image": Reason.MISSING_IMAGE, "no-bytes": Reason.EMPTY, "two": Reason.AMBIGUOUS_IMAGE}
    assert named.items() <= quarantined.items()
    assert quarantined.keys() - named.keys() == {f"{len(good) + number:03}" for number in range(len(bad))}
    assert record.samples == len(good) + len(bad) + 3 == record.embedded + sum(record.quarantined.values())


@pytest.mark.parametrize("loader", ["dali", "reference"])
def test_exif_turns_images_only_when_asked(tmp_path: Path, loader: str) -> None:
    turned = photograph().transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    out = io.BytesIO()
    turned.save(out, "PNG", exif=exif)
    members = {
        "marked.png": out.getvalue(),
        "upright.png": saved(photograph(), "PNG"),
        "turned.png": saved(turned, "PNG"),
    }
    write_tar(tmp_path / "data/00000.tar", members)
    for exif_rule, same_as in (("ignore", "turned"), ("apply", "upright")):
        embed(tmp_path / "data", tmp_path / exif_rule, loader=loader, exif=exif_rule)
        table = pq.read_table(tmp_path / exif_rule / "layers/image_embedding/00000.parquet")
        vector = dict(zip(table["id"].to_pylist(), table["image_embedding"].to_pylist(), strict=True))
        assert sum(a * b for a, b in zip(vector["marked"], vector[same_as], strict=True)) > 0.9999


def test_the_pixel_limit_is_the_callers(tmp_path: Path) -> None:
    write_tar(tmp_path / "data/00000.tar", {"a.jpg": saved(photograph().resize((400, 300)), "JPEG")})
    assert embed(tmp_path / "data", tmp_path / "out", max_pixels=400 * 300 - 1).quarantined == {"too_large": 1}
    assert embed(tmp_path / "data", tmp_path / "out", max_pixels=400 * 300).embedded == 1


def test_a_quarantine_that_went_away_is_made_again(tmp_path: Path) -> None:
    write_tar(tmp_path / "data/00000.tar", {"a.jpg": saved(photograph(), "JPEG"), "b.jpg": b""})
    embed(tmp_path / "data", tmp_path / "out")
    quarantine = tmp_path / "out/quarantine/image_embedding/00000.parquet"
    before = quarantine.read_bytes()
    quarantine.unlink()
    embed(tmp_path / "data", tmp_path / "out")
    assert quarantine.read_bytes() == before
