"""What the sensor sees as new, and how it has it embedded; the deployments' tests run it on a server."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun, State
from prefect.states import Cancelled, Completed, Crashed, Failed, Running

from embedders.errors import InputError
from flows.config import GROUPS, EmbedConfig
from flows.embed import embed_dataset
from flows.new_shards import new_shards
from flows.parameters_of_output import manifest_of, parameters_of
from flows.prepare import prepare
from flows.sensor import digest_of, reason_not_to_start

from .conftest import TINY


@pytest.fixture
def one_shard(demo_dataset: Path, tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    for end in ("tar", "parquet"):
        shutil.copy(demo_dataset / f"00003.{end}", tmp_path / "data")
    return tmp_path / "data"


@pytest.mark.parametrize(
    "options",
    [
        {"model_name": (TINY, "test_resnet.r160_in1k"), "normalize_embeddings": False, "autocast": False},
        {"output_tokens": True, "precision": "bfloat16", "max_pixels": 10_000_000, "image_component": "jpg"}
        | {"in_place": True, "image_embedding_column": ("vector",)},
    ],
)
def test_new_shards_are_embedded_as_the_old_ones(
    options: dict[str, Any], server: str, one_shard: Path, tmp_path: Path
) -> None:
    dataset, output = str(one_shard), str(tmp_path / "out")
    given: dict[str, Any] = {"model_name": (TINY,), "pretrained": False, "device": "cpu", "workers": 1} | options
    assert embed_dataset(dataset, output, **given).shards_failed == 0
    manifest = manifest_of(output, dataset)
    assert manifest is not None
    found = parameters_of(manifest)
    groups = [kind.model_validate(found.get(name, {})) for name, kind in GROUPS.items()]
    assert not prepare(EmbedConfig.of(dataset, output, *groups)).anything
    assert not new_shards(dataset, output, merged="in_place" not in options)


def test_what_was_embedded_and_not_merged_is_new(server: str, one_shard: Path, tmp_path: Path) -> None:
    dataset, output = str(one_shard), tmp_path / "out"
    options: dict[str, Any] = {"model_name": (TINY,), "pretrained": False, "device": "cpu", "workers": 1}
    embed_dataset(dataset, str(output), rows_per_file=10, **options)
    assert not new_shards(dataset, str(output))
    manifest = manifest_of(str(output), dataset)
    assert manifest is not None
    with pytest.raises(InputError, match="made with --rows-per-file, so its manifest does not say how"):
        parameters_of(manifest)
    for kind in ("merged", "metadata"):
        shutil.rmtree(output / kind)
    assert [tar.name for tar in new_shards(dataset, str(output))] == ["00003.tar"]
    assert [tar.name for tar in new_shards(dataset, str(tmp_path / "nothing"))] == ["00003.tar"]


def runs(*states: State[Any]) -> list[FlowRun]:
    return [FlowRun(flow_id=uuid4(), name=f"run {i}", state=state) for i, state in enumerate(states)]


def test_a_run_is_started_for_what_none_is_on_and_none_has_done() -> None:
    failed: State[Any] = Failed(message="a full disk")
    crashed: State[Any] = Crashed(message="gone")
    assert reason_not_to_start([], 3) == ""
    assert reason_not_to_start(runs(failed, crashed), 3) == ""
    asked: list[tuple[list[State[Any]], str]] = [
        ([failed, Running()], "run 'run 1' is on them (Running)"),
        ([Completed()], "has completed without them"),
        ([failed, Cancelled()], "was cancelled"),
        ([crashed, crashed, failed], "3 runs failed, the last one with: a full disk"),
    ]
    for states, why in asked:
        assert why in reason_not_to_start(runs(*states), 3)


def test_other_shards_or_parameters_are_another_run() -> None:
    asked: list[tuple[dict[str, str], str, dict[str, Any]]] = [
        ({"0.tar": "1-2"}, "embed/a", {"x": 1}),
        ({"0.tar": "1-3"}, "embed/a", {"x": 1}),
        ({"0.tar": "1-2", "1.tar": "1-2"}, "embed/a", {"x": 1}),
        ({"0.tar": "1-2"}, "embed/b", {"x": 1}),
        ({"0.tar": "1-2"}, "embed/a", {"x": 2}),
    ]
    assert len({digest_of(*one) for one in asked}) == len(asked)
    assert digest_of({"a": "1", "b": "2"}, "d", {"x": 1, "y": 2}) == digest_of(
        {"b": "2", "a": "1"}, "d", {"y": 2, "x": 1}
    )
