"""Task runs are called by what they do and by the names of their group, unless a name is given."""

from __future__ import annotations

from typing import NamedTuple

from tasks.run_names import run_name, span_of


class File(NamedTuple):
    name: str


def test_a_group_is_named_by_its_first_and_last_member() -> None:
    assert span_of([File("00012"), File("00013"), File("00019")]) == "00012–00019"
    assert span_of([File("00012")]) == "00012"
    assert span_of(()) == "nothing"


def test_a_given_span_counts() -> None:
    assert run_name("embed")({"shards": [File("a"), File("b")]}) == "embed a–b"
    assert run_name("embed")({"shards": [File("a"), File("b")], "span": ""}) == "embed a–b"
    assert run_name("embed")({"shards": [File("a")], "span": "the first"}) == "embed the first"
    assert run_name("write", "parts")({"parts": [File("part-00000.parquet")]}) == "write part-00000.parquet"
