"""Which shards are a part's, and which texts name one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from embedders.errors import InputError
from flows.config import EmbedConfig
from flows.errors import explain
from tasks.run_part import RunPart


def test_each_shard_is_in_one_part() -> None:
    shards = [f"{number:05}" for number in range(10)]
    parts = [RunPart.parse(f"{number}/4").of(shards) for number in range(4)]
    assert parts[1] == ["00001", "00005", "00009"]
    assert sorted(name for part in parts for name in part) == shards
    assert RunPart.parse("12/16").of(shards) == []


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("16/16", "--part: give a part from 0/16 to 15/16, counted from 0, not '16/16'"),
        ("0/0", "--part: give a part of at least one, such as 0/1, not '0/0'"),
        ("3", "--part: give a part such as 3/16, which is counted from 0/16 to 15/16, not '3'"),
        ("-1/4", "--part: give a part such as 3/16, which is counted from 0/16 to 15/16, not '-1/4'"),
        ("/4", "--part: give a part such as 3/16, which is counted from 0/16 to 15/16, not '/4'"),
    ],
)
def test_what_is_no_part_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(ValidationError) as refused:
        EmbedConfig(dataset="data", output="out", part=text)
    assert explain(refused.value) == said


def test_a_part_stays_in_the_command_that_finishes_it() -> None:
    config = EmbedConfig(dataset="data", output="out", part="03/16")
    assert config.run_part == RunPart(3, 16)
    assert config.command() == "python -m flows.embed data --output out --part 3/16"


def test_parts_have_in_common_what_the_dataset_depends_on() -> None:
    config = EmbedConfig(dataset="data", output="out", part="3/16")
    same = EmbedConfig(dataset="/mnt/data", output="out", part="4/16", workers=2, batch_size=8)
    assert same.common_to_parts == config.common_to_parts
    for other in ({"on_error": "null"}, {"id_col": "uid"}, {"model_name": "resnet50"}, {"embedding_dtype": "float16"}):
        changed = EmbedConfig(dataset="data", output="out", part="3/16", **other)
        assert changed.common_to_parts != config.common_to_parts, other


def test_files_of_an_even_size_are_not_made_in_parts() -> None:
    config = EmbedConfig(dataset="data", output="out", part="3/16", rows_per_file=1000)
    with pytest.raises(InputError, match="then once with --rows-per-file and without --part"):
        config.merge_options()
