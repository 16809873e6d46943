"""Tars as Python, GNU tar and damage make them: what is in them, and what is said of them."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import random
import string
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nvidia.dali import fn, pipeline_def

from embedders.errors import MalformedShard
from embedders.ids import canonical_id
from embedders.quarantine import Reason
from embedders.samples import Component, Ignored, Sample, TarIndex, image_extensions
from embedders.tar import BLOCK, read_tar
from embedders.tar_index import format_index, parse_index
from embedders.webdataset import open_shard

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


def tar_of(*infos: tarfile.TarInfo, format: int = tarfile.GNU_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=format) as tar:
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
    assert index.ignored.total == 0


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


def test_devices_and_macos_files_are_ignored_by_name_and_directories_silently() -> None:
    others = [entry("3.jpg", tarfile.FIFOTYPE), entry("._0.jpg", size=9), entry("README", size=4)]
    index = read_tar(tar_of(entry("d.jpg", tarfile.DIRTYPE), entry("0.jpg", size=700), *others))
    assert [sample.key for sample in index.samples] == ["0"]
    assert index.ignored == Ignored(3, ("3.jpg", "._0.jpg", "README"))
    many = read_tar(tar_of(*(entry(f"{number}", size=1) for number in range(20))))
    assert (many.ignored.total, len(many.ignored.examples)) == (20, 5)


def test_links_within_the_tar_are_the_members_they_point_to(tmp_path: Path) -> None:
    far = f"d/{'x' * 120}/0.jpg"  # a long link, in an entry of its own
    links = [
        entry("1.jpg", tarfile.LNKTYPE, link="./a/0.jpg"),
        entry("b/2.jpg", tarfile.SYMTYPE, link="../a/0.jpg"),
        entry("b/3.jpg", tarfile.SYMTYPE, link="2.jpg"),
        entry("4.jpg", tarfile.LNKTYPE, link=far),
        entry("5.jpg", tarfile.SYMTYPE, link="/etc/0.jpg"),
        entry("6.jpg", tarfile.SYMTYPE, link="6.jpg"),
        entry("7.txt", tarfile.SYMTYPE, link="nothing"),
    ]
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        members = [entry(far, size=3), entry("a/0.jpg", size=700), entry("7.jpg", size=9), *links]
        (tmp_path / "0.tar").write_bytes(tar_of(*members, format=form))
        shard = open_shard(tmp_path / "0.tar")
        places = {sample.key: sample.components[0][1:3] for sample in shard.index.samples}
        assert places["1"] == places["b/2"] == places["b/3"] == places["a/0"]
        assert places["4"] == places[far[:-4]]
        assert {shard.ids[i]: why for i, why in shard.unusable.items()} == {
            key: (Reason.MISSING_IMAGE, f"{key}.jpg is a link to what the tar does not hold") for key in "56"
        }
        assert shard.index.ignored.total == 0


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
    assert read_tar(make_tar({})) == TarIndex.of(())


@pytest.mark.parametrize("data", [b"", b"<html>404</html>", b"x" * 4096], ids=["empty", "short", "foreign"])
def test_a_file_that_is_no_tar_is_named(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "00007.tar"
    path.write_bytes(data)
    with pytest.raises(MalformedShard, match=r"00007\.tar"):
        open_shard(path)


def whole_samples(length: int, ends: list[int]) -> int | None:
    """How many members of a tar that was cut are whole, given where their data end; None if one is cut."""
    padded = [-(-end // BLOCK) * BLOCK for end in ends]
    return next((i + 1 for i in range(len(ends)) if ends[i] <= length <= padded[i]), None)


def test_a_tar_cut_within_a_member_is_malformed_and_one_cut_between_them_is_in_doubt() -> None:
    whole = make_tar({"0.jpg": b"1" * 700, "1.json": b"{}", "2.jpg": b"2" * 100})
    ends = [place + size for _, place, size in names_and_places(read_tar(whole))]
    padded = -(-ends[-1] // BLOCK) * BLOCK
    for length in [*range(0, padded, 37), *range(BLOCK, padded + BLOCK, BLOCK), *ends]:
        index, members = reading(whole[:length]), whole_samples(length, ends)
        if length > padded:
            members = 3
        assert (index and len(index.samples)) == members, length
        assert index is None or index.doubt == "it has no end-of-archive mark"
    assert read_tar(whole).doubt == read_tar(whole[: padded + 2 * BLOCK]).doubt == ""


def hundred() -> bytes:
    return make_tar({f"{number:03}.jpg": bytes([number + 1]) * 700 for number in range(100)})


def places_of(data: bytes) -> list[int]:
    return [sample.components[0].offset for sample in read_tar(data).samples]


def test_a_zeroed_header_is_malformed_and_says_where_and_after_how_many_samples() -> None:
    whole = hundred()
    at = places_of(whole)[50] - BLOCK
    for damaged in (
        whole[:at] + bytes(BLOCK) + whole[at + BLOCK :],
        whole[:at] + bytes(16 << 10) + whole[at + (16 << 10) :],
        whole[:at] + bytes(2 * BLOCK) + whole[at:],
    ):
        with pytest.raises(MalformedShard, match=rf"^s\.tar: after 50 samples: zeros at byte {at:,}, .* at byte"):
            read_tar(damaged, "s.tar")


def test_two_tars_in_one_file_are_malformed() -> None:
    one = make_tar({"0.jpg": b"1", "1.jpg": b"2"})
    with pytest.raises(MalformedShard, match=rf"after 2 samples: .* more data at byte {len(one):,}: .*--ignore-zeros"):
        read_tar(one + make_tar({"2.jpg": b"1"}))
    with pytest.raises(MalformedShard, match="after 2 samples"):
        read_tar(one + b"x")


def test_a_long_tail_of_zeros_is_in_doubt(tmp_path: Path) -> None:
    whole = hundred()
    at = places_of(whole)[50] - BLOCK
    tail = whole[:at] + bytes(len(whole) - at)
    index = read_tar(tail)
    assert (len(index.samples), index.doubt) == (50, f"it ends in {len(tail) - at:,} zero bytes")
    with pytest.raises(MalformedShard, match="nothing but 40,000 zero bytes"):
        read_tar(bytes(40_000))
    for record in (BLOCK, 2 * BLOCK, 20 * BLOCK):  # as Go, others, and tar and Python fill up the last record
        data = whole[: places_of(whole)[-1] + 2 * BLOCK] + bytes(2 * BLOCK)
        assert read_tar(data + bytes(-len(data) % record)).doubt == ""


def test_a_name_that_waits_for_its_member_is_malformed() -> None:
    info = entry("k" * 150 + ".jpg")
    for form in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        header = info.tobuf(form)
        for end in (b"", bytes(2 * BLOCK)):
            with pytest.raises(MalformedShard, match="after 1 samples: cut short: the member whose name"):
                read_tar(make_tar({"0.jpg": b"1"})[: 2 * BLOCK] + header[:-BLOCK] + end)


@pytest.mark.parametrize(
    ("pack", "says"),
    [
        (gzip.compress, "gzip data, not a tar.*gunzip"),
        (bz2.compress, "bzip2 data"),
        (lzma.compress, "xz data"),
        (lambda data: b"PK\x03\x04" + data, "a zip archive, not a tar"),
    ],
)
def test_an_archive_of_another_kind_is_called_by_its_name(pack: Callable[[bytes], bytes], says: str) -> None:
    with pytest.raises(MalformedShard, match=rf"^00000\.tar: {says}"):
        read_tar(pack(hundred()), "00000.tar")
    with pytest.raises(MalformedShard, match=rf"^00000\.tar: {says}"):
        read_tar(pack(b"")[:40], "00000.tar")


def test_keys_of_a_packed_folder_have_no_dot_before_them() -> None:
    members = {"./0.jpg": b"1", "./a/1.jpg": b"2", "./a/1.json": b"{}"}
    index = read_tar(make_tar(members))
    assert index == read_tar(bytearray(make_tar(members)))
    assert [sample.key for sample in index.samples] == ["0", "a/1"]
    assert parse_index(format_index(index, "f"), "f") == index


def test_keys_by_the_last_dot_on_request(tmp_path: Path) -> None:
    names = ("at 10.13.22.jpeg", "at 10.14.01.jpeg", "at 10.14.01.json", "v1.2/.hidden.jpg")
    data = make_tar(dict.fromkeys(names, b"1"))
    (tmp_path / "0.tar").write_bytes(data)
    first, last = (open_shard(tmp_path / "0.tar", key_dot=dot) for dot in ("first", "last"))
    assert first.unusable[0][0] == Reason.AMBIGUOUS_IMAGE
    assert "--key-dot last" in first.unusable[0][1]
    assert last.ids == ("at 10.13.22", "at 10.14.01")
    assert last.unusable == {}
    assert last.index == read_tar(bytearray(data), key_dot="last") == read_tar(data, key_dot="last")
    text = format_index(last.index, "f", "last")
    assert parse_index(text, "f", "last") == last.index
    assert parse_index(text, "f") is None
    ordinary = make_tar({"0.1.jpg": b"1", "0.2.jpg": b"1", "._0.3.jpg": b"1"})
    assert read_tar(ordinary, key_dot="last") == read_tar(bytearray(ordinary), key_dot="last")


def test_a_member_that_is_there_twice_costs_its_sample(tmp_path: Path) -> None:
    data = tar_of(*(entry(name, size=5) for name in ("0.jpg", "1.jpg", "0.jpg", "2.jpg", "2.json", "./2.json")))
    (tmp_path / "0.tar").write_bytes(data)
    for component in (None, "jpg"):
        assert open_shard(tmp_path / "0.tar", image_component=component).unusable == {
            0: (Reason.AMBIGUOUS_IMAGE, "0.jpg is in the tar twice; repack it with one of the two"),
            2: (Reason.AMBIGUOUS_IMAGE, "./2.json is in the tar twice; repack it with one of the two"),
        }


def test_every_extension_that_pillow_or_webdataset_knows_is_an_image() -> None:
    from webdataset.autodecode import IMAGE_EXTENSIONS

    others = {"mpg", "mpeg", "hdf", "h5", "pdf", "bufr", "grib"}
    assert set(IMAGE_EXTENSIONS) - others <= image_extensions()
    some = {"jfif", "jpe", "apng", "tga", "psd", "pgm", "pbm", "pnm", "j2k", "img"}
    assert some <= image_extensions()
    assert not {*others, "json", "txt", "cls", "npy"} & image_extensions()


def test_of_several_image_components_the_first_that_a_sample_has_is_taken(tmp_path: Path) -> None:
    names = ("0.left.jpg", "0.right.jpg", "1.RIGHT.jpg", "1.depth.png", "2.depth.png")
    (tmp_path / "0.tar").write_bytes(make_tar(dict.fromkeys(names, b"1")))
    shard = open_shard(tmp_path / "0.tar", image_component="left.jpg, .right.jpg")
    assert [shard.member_of(i) for i in range(3)] == ["0.left.jpg", "1.RIGHT.jpg", "2.depth.png"]
    assert shard.unusable == {2: (Reason.MISSING_IMAGE, "only depth.png")}


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
    index = TarIndex.of(
        (*samples, Sample("k", (Component("a b.json", 0, 2, "k.a b.json"), Component("txt", 1, 1, "k.txt")))),
        Ignored(7, ("READ ME", "100%", "日本")),
        "it ends in 12,345 zero bytes",
    )
    text = format_index(index, "12-1.5 %")
    assert text.isascii()
    assert parse_index(text, "12-1.5 %") == index


@given(st.lists(st.text(min_size=1).filter(lambda key: not key.startswith("./")), unique=True))
def test_an_index_comes_back_with_any_text(keys: list[str]) -> None:
    index = TarIndex.of(tuple(Sample(key, (Component("jpg", 0, 1, f"{key}.jpg"),)) for key in keys))
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
