"""The columns of an opened shard say what its samples say one by one."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from embedders import byte_columns
from embedders.ids import canonical_id
from embedders.quarantine import Reason
from embedders.samples import Component, KeyDot, Sample
from embedders.tar import BLOCK, read_tar
from embedders.tar_index import format_index, parse_index
from embedders.webdataset import OpenShard, open_shard, sample_json

from .test_webdataset import entry, make_tar, tar_of

NAMES = st.builds(
    "{}{}.{}".format,
    st.sampled_from(["", "", "./", "d.x/", ".", "d/"]),
    st.sampled_from(["a", "b", "\u00e9", "v.1", ""]),
    st.sampled_from(["jpg", "JPG", "left.jpg", "png", "json", "Json", "txt", ""]),
)
CHOSEN = st.sampled_from([None, "jpg", "left.jpg,.PNG", "txt", ""])
DOTS: st.SearchStrategy[KeyDot] = st.sampled_from(["first", "last"])


def split(name: str, key_dot: KeyDot) -> tuple[str, str] | None:
    """The key and the extension of a member's name."""
    start = name.rfind("/") + 1
    dot = name.find(".", start) if key_dot == "first" else name.rfind(".", start)
    if dot <= start or dot == len(name) - 1 or name[start] == ".":
        return None
    return name[:dot].removeprefix("./"), name[dot + 1 :]


def one_by_one(names: list[str], key_dot: KeyDot) -> tuple[list[Sample], list[str]]:
    """The samples of empty members in a tar, and the members that are part of none."""
    grouped: dict[str, list[Component]] = {}
    ignored = []
    for number, name in enumerate(names):
        if parts := split(name, key_dot):
            grouped.setdefault(parts[0], []).append(Component(parts[1], BLOCK * (number + 1), 0, name))
        elif not name.endswith("/"):
            ignored.append(name)
    return [Sample(key, tuple(components)) for key, components in grouped.items()], ignored


@pytest.fixture(autouse=True, scope="module", params=[2, byte_columns.BLOCK_ROWS])
def block(request: pytest.FixtureRequest) -> object:
    """Columns are worked on in blocks: of two rows, and of as many as in earnest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(byte_columns, "BLOCK_ROWS", request.param)
        yield


@given(st.lists(NAMES.filter(bool), max_size=9), DOTS)
def test_members_are_grouped_as_one_by_one(names: list[str], key_dot: KeyDot) -> None:
    samples, ignored = one_by_one(names, key_dot)
    data = tar_of(*map(entry, names))
    for index in (read_tar(data, key_dot=key_dot), read_tar(bytearray(data), key_dot=key_dot)):
        assert list(index.samples) == samples == [index.samples[i] for i in range(len(samples))]
        assert index.samples[1:3] == tuple(samples[1:3])
        assert (index.ignored.total, index.ignored.examples) == (len(ignored), tuple(ignored[:5]))
        text = format_index(index, "f", key_dot)
        assert parse_index(text, "f", key_dot) == index
        lines = text.split("\n")[1:-1]
        assert [line.split(" ")[0::4] for line in lines] == [[c.extension for c in s.components] for s in samples]


def tar_with(members: list[tuple[tarfile.TarInfo, str]]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for info, text in members:
            tar.addfile(info, io.BytesIO(text.encode()))
    return buffer.getvalue()


def expected_why(samples: list[Sample], ids: list[str], i: int, chosen: str | None) -> Reason | None:
    images, extensions = samples[i].images(chosen), [c.extension for c in samples[i].components]
    if ids[i] in ids[:i]:
        return Reason.DUPLICATE_ID
    if len({*extensions}) < len(extensions) or len(images) > 1:
        return Reason.AMBIGUOUS_IMAGE
    return None if len(images) == 1 and images[0].size else Reason.EMPTY if images else Reason.MISSING_IMAGE


@given(
    members=st.lists(
        st.tuples(NAMES.filter(bool), st.sampled_from(["", "x", '{"id": 1}', '{"id": "2"}', "{}"])), max_size=9
    ),
    chosen=CHOSEN,
)
def test_ids_images_and_reasons_are_those_of_each_sample(
    members: list[tuple[str, str]], chosen: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "columns.tar"
    named = [(entry(name, size=len(text)), text) for name, text in members]  # a name may be there twice
    path.write_bytes(tar_with(named))
    shard = open_shard(path, "id", image_component=chosen)
    samples = list(shard.index.samples)
    found = [sample_json(sample, shard.data).get("id") for sample in samples]
    ids = [canonical_id(s.key if value is None else value) for s, value in zip(samples, found, strict=True)]
    assert (list(shard.ids), shard.count) == (ids, len(samples))
    reasons = {i: why for i in range(len(ids)) if (why := expected_why(samples, ids, i, chosen)) is not None}
    assert {i: why for i, (why, _) in shard.unusable.items()} == reasons
    for i, (sample, image) in enumerate(zip(samples, shard.images, strict=True)):
        assert shard.member_of(i) == (image or sample.components[0]).name
        assert shard.samples.places[i].tolist() == ([image.offset, image.size] if image else [0, 0])
    assert [i for i, _, _ in shard.encoded()] == [i for i in range(len(ids)) if i not in reasons]


def opened(path: Path, members: Mapping[str, bytes], id_col: str = "key") -> OpenShard:
    path.write_bytes(make_tar(members, encoding="latin-1"))
    return open_shard(path, id_col)


def test_ids_are_given_by_position(tmp_path: Path) -> None:
    shard = opened(tmp_path / "0.tar", {"a.jpg": b"1", "\xe9.jpg": b"1", "c.jpg": b"1"})
    assert shard.ids_at(np.array([2, 0, 2, 1])).equals(pa.array(["c", "a", "c", "\\udce9"]))
    assert shard.ids_at(np.array([], np.int64)).type == pa.string()
    assert [shard.id_of(i) for i in range(shard.count)] == list(shard.ids) == ["a", "\\udce9", "c"]
    assert shard.member_of(1) == "\udce9.jpg"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("key", ["id", "n\u00fcmber", 'a"b'])
@pytest.mark.parametrize("ascii", [True, False])
def test_an_id_is_found_however_the_json_is_encoded(encoding: str, key: str, ascii: bool, tmp_path: Path) -> None:
    text = json.dumps({"other": "id", key: "x"}, ensure_ascii=ascii)
    shard = opened(tmp_path / "0.tar", {"k.jpg": b"1", "k.json": text.encode(encoding)}, key)
    assert shard.ids == ("x",)
    escaped = "".join(f"\\u{ord(letter):04x}" for letter in key)
    shard = opened(tmp_path / "1.tar", {"k.jpg": b"1", "k.json": f'{{"{escaped}": "y"}}'.encode(encoding)}, key)
    assert shard.ids == ("y",)


def test_what_is_kept_of_a_sample_is_small(tmp_path: Path) -> None:
    members = {f"{number:09}.{kind}": b"1" for number in range(2000) for kind in ("jpg", "json")}
    samples = opened(tmp_path / "0.tar", members).samples
    assert len(pickle.dumps(samples)) < 80 * 2000
