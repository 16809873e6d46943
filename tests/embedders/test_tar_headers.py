"""Headers read all at once say what headers read one by one say, or nothing."""

from __future__ import annotations

import io
import tarfile

from hypothesis import given
from hypothesis import strategies as st

from embedders.errors import MalformedShard
from embedders.samples import TarIndex
from embedders.tar import read_tar
from embedders.tar_headers import plain_members

NAMES = st.sampled_from(["a.jpg", "a.json", "b/c.left.jpg", "é.png", "x" * 95 + ".txt", "x" * 140 + ".jpg", ".hidden"])
NAMES |= st.text("ab./é", min_size=1, max_size=12)
KINDS = st.sampled_from([tarfile.REGTYPE] * 8 + [tarfile.AREGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE])


def write(members: list[tuple[str, int, bytes]], form: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, size, kind in members:
            info = tarfile.TarInfo(name[-90:] if form == tarfile.USTAR_FORMAT else name)
            info.type, info.size = kind, size if kind in tarfile.REGULAR_TYPES else 0
            tar.addfile(info, io.BytesIO(bytes(size)))
    return out.getvalue()


def indexed(data: bytes | bytearray) -> TarIndex | str:
    try:
        return read_tar(data)
    except MalformedShard as error:
        return str(error)


@given(
    st.lists(st.tuples(NAMES, st.integers(0, 2000), KINDS), max_size=8),
    st.sampled_from([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
    st.lists(st.tuples(st.integers(0, 20_000), st.integers(0, 255)), max_size=3),
    st.integers(0, 12_000) | st.none(),
)
def test_both_ways_agree_on_whole_and_damaged_tars(
    members: list[tuple[str, int, bytes]], form: int, flips: list[tuple[int, int]], cut: int | None
) -> None:
    data = bytearray(write(members, form))
    for at, value in flips:
        data[at % len(data)] = value
    del data[len(data) if cut is None else cut :]
    assert indexed(bytes(data)) == indexed(data)  # only bytes and maps are read all at once


def test_ordinary_tars_are_read_all_at_once() -> None:
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        names = [f"{n:05}.{extension}" for n in range(6000) for extension in ("jpg", "txt", "json")]
        data = write([(name, 3, tarfile.REGTYPE) for name in names], form)
        found = plain_members(lambda at, size, data=data: data[at : at + size], len(data))  # type: ignore[misc]
        assert found is not None
        assert found.names.to_pylist() == [name.encode() for name in names]
        assert found.sizes.tolist() == [3] * len(names)
        assert found.offsets.tolist() == [512 + 1024 * n for n in range(len(names))]
