"""Tars as Python, GNU tar and damage make them: what is in them, and what is said of them."""

from __future__ import annotations

import io
import json
import random
import string
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from embedders.errors import MalformedShard
from embedders.loader import Reason
from embedders.webdataset import (
    BLOCK,
    Component,
    Sample,
    TarIndex,
    canonical_id,
    format_index,
    open_shard,
    parse_index,
    read_tar,
)

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
LONG = {name: {f"{'d' * 60}/{'k' * 90}.jpg": b"1"} for name in FORMATS}
LONG["gnu"] |= {f"{'e' * 200}/{'k' * 300}.jpg": b"22", "übergröße/日本.png": b"333"}
LONG["pax"] |= LONG["gnu"]
MEMBERS = {
    "000.jpg": b"a" * 700,
    "000.json": b"{}",
    "a/b/001.jpg": b"b" * 512,
    "a/b/001.seg.v2.png": b"",
    "./002.jpg": b"c",
}


def make_tar(members: Mapping[str, bytes], format: int = tarfile.USTAR_FORMAT, encoding: str = "utf-8") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format, encoding=encoding) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def tar_of(*infos: tarfile.TarInfo) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for info in infos:
            tar.addfile(info, io.BytesIO(bytes(info.size)))
    return buffer.getvalue()


def entry(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info


def signed(header: bytes) -> bytes:
    """A header with its checksum made right."""
    blank = header[:148] + b" " * 8 + header[156:]
    return header[:148] + f"{sum(blank):06o}\0 ".encode() + header[156:]


def names_and_places(index: TarIndex) -> list[tuple[str, int, int]]:
    return sorted((c.name, c.offset, c.size) for sample in index.samples for c in sample.components)


def pythons(data: bytes) -> list[tuple[str, int, int]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return sorted((m.name, m.offset_data, m.size) for m in tar if m.isreg())


def reading(data: bytes) -> TarIndex | None:
    """The index, or None for a shard that is called malformed; any other error is a bug."""
    try:
        return read_tar(data, "00000.tar")
    except MalformedShard as error:
        assert "00000.tar" in str(error)  # noqa: PT017
        return None


@pytest.mark.parametrize("format", FORMATS)
def test_members_lie_where_python_finds_them(format: str) -> None:
    data = make_tar(MEMBERS | LONG[format], FORMATS[format])
    assert names_and_places(read_tar(data)) == pythons(data)


def test_v7_has_no_magic_and_its_directories_end_in_a_slash() -> None:
    data = bytearray(make_tar({"d.x/": b"", "d.x/0.jpg": b"123"}))
    for at in (0, BLOCK):
        data[at : at + BLOCK] = signed(bytes(data[at : at + 156]) + bytes(BLOCK - 156))
    index = read_tar(bytes(data))
    assert names_and_places(index) == pythons(bytes(data)) == [("d.x/0.jpg", 2 * BLOCK, 3)]
    assert index.ignored == ()


def test_names_that_are_not_utf8_come_through() -> None:
    data = make_tar({"caf\xe9.jpg": b"1"}, encoding="latin-1")
    assert names_and_places(read_tar(data))[0][0].encode("utf-8", "surrogateescape") == b"caf\xe9.jpg"


def test_a_size_in_base_256_is_read() -> None:
    huge = entry("0.jpg", size=9 << 30).tobuf(tarfile.GNU_FORMAT)
    assert huge[124] == 0x80
    with pytest.raises(MalformedShard, match="needs 9,663,676,928 bytes"):
        read_tar(huge + bytes(2 * BLOCK))


def test_a_size_in_a_pax_header_counts() -> None:
    info = entry("0.jpg", size=600)
    info.pax_headers = {"size": "600"}
    header = bytearray(info.tobuf(tarfile.PAX_FORMAT))
    header[-BLOCK:] = signed(bytes(header[-BLOCK:-388]) + b"00000000000\0" + bytes(header[-376:]))
    data = bytes(header) + bytes(1024 + 2 * BLOCK)
    assert names_and_places(read_tar(data)) == pythons(data) == [("0.jpg", len(header), 600)]


@pytest.mark.parametrize("size", ["²", "9" * 5000, "-1", ""])
def test_a_pax_size_that_is_no_number_is_damage(size: str) -> None:
    info = entry("0.jpg")
    info.pax_headers = {"size": size, "comment": "x"}
    with pytest.raises(MalformedShard, match="PAX"):
        read_tar(info.tobuf(tarfile.PAX_FORMAT) + bytes(2 * BLOCK))


def test_many_small_pax_records_take_no_time() -> None:
    records = b"5 a=\n" * 200_000
    data = entry("p", tarfile.XHDTYPE, len(records)).tobuf() + records + bytes(-len(records) % BLOCK)
    assert read_tar(data + make_tar({"0.jpg": b"1"})).samples[0].key == "0"


def test_links_devices_and_macos_files_are_ignored_by_name_and_directories_silently() -> None:
    link, hard = entry("1.jpg", tarfile.SYMTYPE, link="0.jpg"), entry("2.jpg", tarfile.LNKTYPE, link="0.jpg")
    others = [link, hard, entry("3.jpg", tarfile.FIFOTYPE), entry("._0.jpg", size=9), entry("README", size=4)]
    index = read_tar(tar_of(entry("d.jpg", tarfile.DIRTYPE), entry("0.jpg", size=700), *others))
    assert [sample.key for sample in index.samples] == ["0"]
    assert index.ignored == ("1.jpg", "2.jpg", "3.jpg", "._0.jpg", "README")


def test_the_key_ends_at_the_first_dot_of_the_file_name() -> None:
    (sample,) = read_tar(make_tar({"v1.2/0.seg.v2.png": b"", "v1.2/0.JPG": b"1"})).samples
    assert sample.key == "v1.2/0"
    assert [c.extension for c in sample.components] == ["seg.v2.png", "JPG"]


def test_members_of_a_sample_may_lie_apart() -> None:
    index = read_tar(make_tar({"1.json": b"{}", "0.jpg": b"", "1.jpg": b"", "0.json": b"{}"}))
    assert [(s.key, [c.extension for c in s.components]) for s in index.samples] == [
        ("1", ["json", "jpg"]),
        ("0", ["jpg", "json"]),
    ]


def test_an_empty_tar_has_no_samples() -> None:
    assert read_tar(make_tar({})) == TarIndex(())


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"x" * 4096], ids=["empty", "short", "foreign"])
def test_a_file_that_is_no_tar_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "00007.tar"
    path.write_bytes(data)
    with pytest.raises(MalformedShard, match=r"00007\.tar"):
        open_shard(path)


def test_a_tar_cut_anywhere_is_called_cut_short() -> None:
    whole = make_tar({"0.jpg": b"1" * 700, "0.json": b"{}", "1.jpg": b"2" * 100})
    end = whole.rindex(b"2") + 1
    for length in [*range(0, end, 37), *range(BLOCK, end + BLOCK, BLOCK), end]:
        assert reading(whole[:length]) is None, length


def test_sparse_files_are_refused() -> None:
    with pytest.raises(MalformedShard, match="type 'S'"):
        read_tar(tar_of(entry("0.jpg", tarfile.GNUTYPE_SPARSE)))
    info = entry("GNUSparseFile.0/0.jpg")
    info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.name": "0.jpg"}
    with pytest.raises(MalformedShard, match="sparse"):
        read_tar(info.tobuf(tarfile.PAX_FORMAT) + bytes(2 * BLOCK))


@settings(deadline=1000)
@given(st.binary(max_size=4096))
def test_any_bytes_give_an_index_or_a_malformed_shard(data: bytes) -> None:
    reading(data)


@settings(deadline=1000)
@given(
    st.dictionaries(st.integers(0, 499), st.integers(0, 255), max_size=8),
    st.binary(max_size=600),
    st.sampled_from(b"0\x00125SLKgx7A"),
)
def test_a_signed_header_may_hold_anything(bytes_at: dict[int, int], body: bytes, kind: int) -> None:
    header = bytearray(entry("0.jpg", size=len(body)).tobuf())
    for at, value in bytes_at.items():
        header[at] = value
    header[156] = kind
    padded = body + bytes(-len(body) % BLOCK)
    reading(signed(bytes(header)) + padded + make_tar({"1.jpg": b"1"}))


@settings(deadline=1000)
@given(st.integers(0, 10 * BLOCK * 8 - 1))
def test_a_flipped_bit_of_a_header_is_noticed(bit: int) -> None:
    whole = make_tar(MEMBERS, tarfile.PAX_FORMAT)
    data = bytearray(whole)
    data[bit // 8] ^= 1 << bit % 8
    found, told = reading(bytes(data)), read_tar(whole)
    # In the checksum field itself a bit may not matter: a space for a NUL.
    assert found is None or found == told


ODD = [
    "0.jpg",
    "a b/c d.jpg",
    "100%.jpg",
    "%20.jpg",
    "new\nline.jpg",
    "tab\t\x0b\x0c\x1c\x85\u2028.jpg",
    "caf\udce9.jpg",
    "日本.jpg",
    "+&=#.jpg",
]


def test_an_index_comes_back_whatever_the_names() -> None:
    samples = [Sample(name[:-4], (Component("jpg", 512 * i, i, name),)) for i, name in enumerate(ODD)]
    index = TarIndex(
        (*samples, Sample("k", (Component("a b.json", 0, 2, "k.a b.json"), Component("txt", 1, 1, "k.txt"))))
    )
    text = format_index(index, "12-1.5 %")
    assert text.isascii()
    assert parse_index(text, "12-1.5 %") == index


@given(st.lists(st.text(min_size=1), unique=True))
def test_an_index_comes_back_with_any_text(keys: list[str]) -> None:
    index = TarIndex(tuple(Sample(key, (Component("jpg", 0, 1, f"{key}.jpg"),)) for key in keys))
    assert parse_index(format_index(index, "f"), "f") == index


def test_the_index_of_another_tar_or_a_damaged_one_is_none() -> None:
    text = format_index(read_tar(make_tar(MEMBERS)), "tar-1")
    assert parse_index(text, "tar-1") is not None
    assert parse_index(text, "tar-2") is None
    for length in range(len(text)):
        assert parse_index(text[:length], "tar-1") is None, length


@settings(max_examples=300)
@given(st.integers(0), st.text(alphabet=string.printable, max_size=9))
def test_garbage_in_an_index_raises_nothing(at: int, garbage: str) -> None:
    text = format_index(read_tar(make_tar(MEMBERS)), "f")
    parse_index(garbage, "f")
    parse_index(text[: at % len(text)] + garbage + text[at % len(text) + len(garbage) :], "f")


@pytest.mark.parametrize("format", FORMATS)
def test_dali_reads_the_index(format: str, tmp_path: Path) -> None:
    chance = random.Random(0)
    members = {f"d e/{i:03}.{kind}": chance.randbytes(1 + 99 * i) for i in range(7) for kind in ("jpg", "json")}
    (tmp_path / "0.tar").write_bytes(make_tar(members, FORMATS[format]))
    index = open_shard(tmp_path / "0.tar").index
    (tmp_path / "0.idx").write_text(format_index(index, "12-3.5"))

    @pipeline_def(batch_size=len(index.samples), num_threads=1, device_id=None)  # type: ignore[call-overload]
    def read() -> Any:
        tars, indexes = [str(tmp_path / "0.tar")], [str(tmp_path / "0.idx")]
        return tuple(fn.readers.webdataset(paths=tars, index_paths=indexes, ext=["jpg", "json"]))  # type: ignore[arg-type]

    pipeline = read()
    pipeline.build()
    for output, kind in zip(pipeline.run(), ("jpg", "json"), strict=True):
        found = [np.asarray(output.at(i)).tobytes() for i in range(len(index.samples))]
        assert found == [data for name, data in members.items() if name.endswith(kind)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"id": 12}', "12"),
        ('{"id": "0012"}', "0012"),
        ('{"id": 12.0}', "12"),
        ('{"id": 1.5}', "1.5"),
        ('{"id": null}', "k"),
        ('{"other": 1}', "k"),
        ('{"id": ', "k"),
        ("[1]", "k"),
        ("[" * 100_000, "k"),
        ('{"id": "\\ud800"}', "\\ud800"),
    ],
)
def test_an_id_is_the_json_column_else_the_key(text: str, expected: str, tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(make_tar({"k.jpg": b"1", "k.json": text.encode()}))
    assert open_shard(path, "id").ids == (expected,)


def test_ids_are_text_that_parquet_can_hold(tmp_path: Path) -> None:
    path = tmp_path / "0.tar"
    path.write_bytes(make_tar({"caf\xe9.jpg": b"1", "日本.jpg": b"1"}, encoding="utf-8"))
    assert open_shard(path).ids == ("café", "日本")
    path.write_bytes(make_tar({"caf\xe9.jpg": b"1"}, encoding="latin-1"))
    assert open_shard(path).ids == ("caf\\udce9",)


def test_equal_ids_are_equal_text() -> None:
    assert {canonical_id(value) for value in (12, 12.0, np.int64(12), np.float64(12), "12")} == {"12"}
    assert canonical_id("012") == "012"
    assert canonical_id(float("nan")) == "nan"


def test_samples_without_a_usable_image_say_why(tmp_path: Path) -> None:
    members = {"0.jpg": b"1", "1.txt": b"1", "2.png": b"", "3.jpg": b"1", "3.json": json.dumps({"id": 0}).encode()}
    (tmp_path / "0.tar").write_bytes(make_tar(members))
    assert open_shard(tmp_path / "0.tar", "id").unusable == {
        1: (Reason.MISSING_IMAGE, "only txt"),
        2: (Reason.EMPTY, "0 bytes"),
        3: (Reason.DUPLICATE_ID, "0.jpg has the id 0 too"),
    }
