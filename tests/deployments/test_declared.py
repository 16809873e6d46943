"""What prefect.yaml declares, without a server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from prefect.flows import load_flow_from_entrypoint

from deployments.automations import OURS, zombies
from deployments.declared import DECLARED, FLOWS, declared
from deployments.serve import deployments
from embedders.errors import InputError
from flows.embed import embed
from flows.sensor import start_for_new_shards

BY_NAME = {flow.name: flow for flow in (embed, start_for_new_shards)}
ANOTHER = "- {name: laion, dataset: s3://crawl/laion, output: s3://out, timezone: Europe/Berlin}"


@pytest.fixture
def datasets(tmp_path: Path) -> Path:
    """A datasets.yaml with one entry."""
    (tmp_path / "datasets.yaml").write_text(ANOTHER)
    return tmp_path / "datasets.yaml"


def test_the_flows_take_the_parameters(datasets: Path) -> None:
    for one in declared(datasets=datasets):
        given = {"dataset": "asked for", "output": "asked for"} | one.entry.get("parameters", {})
        flow: Any = BY_NAME[one.flow]
        flow.validate_parameters(given)


def test_entry_points_are_importable_and_of_the_flows_that_they_say() -> None:
    for entrypoint, name in FLOWS.items():
        assert load_flow_from_entrypoint(entrypoint).name == name


def test_a_second_dataset_is_one_entry(datasets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARD_EMBED_CRON", "0 5 * * *")
    found = {one.name: one.entry for one in declared(datasets=datasets)}
    assert found.keys() == {
        *("embed/nightly", "new-shards/new-shards", "embed/on-demand", "embed/smoke"),
        *("embed/laion", "new-shards/laion"),
    }
    run, sensor = found["embed/laion"], found["new-shards/laion"]
    assert run["schedules"] == [{"cron": "0 5 * * *", "timezone": "Europe/Berlin", "active": False}]
    assert run["parameters"]["dataset"] == sensor["parameters"]["dataset"] == "s3://crawl/laion"
    assert sensor["parameters"]["deployment"] == "embed/laion"
    assert found["embed/nightly"]["schedules"][0]["timezone"] == "UTC"


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ("- {name: laion, output: out}", "each entry has dataset, name, output"),
        ("- {name: a, dataset: d, output: o, modle: resnet50}", "not {'name': 'a'"),
        ("- {name: nightly, dataset: d, output: o}", "two deployments would be called embed/nightly"),
    ],
)
def test_a_wrong_entry_is_one_line(entry: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "datasets.yaml").write_text(entry)
    with pytest.raises(InputError, match=re.escape(words)) as error:
        declared(datasets=tmp_path / "datasets.yaml")
    assert "\n" not in str(error.value)


def test_no_password_is_declared() -> None:
    text = DECLARED.read_text()
    assert not re.search("(?i)(password|token|secret|api_key) *:", text)


def test_what_is_served_is_what_is_declared(datasets: Path) -> None:
    served = deployments(datasets=datasets)
    names = {deployment.name: deployment for queue in served.values() for deployment in queue}
    assert names.keys() == {"nightly", "new-shards", "on-demand", "smoke", "laion"}
    assert {deployment.name for deployment in served["sensors"]} == {"new-shards", "laion"}
    nightly = names["nightly"]
    assert nightly.entrypoint == "flows.embed.embed"
    assert (nightly.concurrency_limit, nightly.concurrency_options.collision_strategy) == (1, "ENQUEUE")
    assert (nightly.schedules[0].schedule.cron, nightly.schedules[0].schedule.timezone) == ("30 2 * * *", "UTC")


def test_automations_match_runs_of_this_project_only() -> None:
    assert zombies().trigger.model_dump()["match_related"] == OURS
    assert {"prefect.tag.shard-embed"} == {one["prefect.resource.id"] for one in OURS if "prefect.resource.id" in one}
    assert all("shard-embed" in one.entry["tags"] for one in declared())


def test_the_form_has_groups_descriptions_limits_and_choices() -> None:
    schema = embed.parameters.model_dump()
    groups = {name: field for name, field in schema["properties"].items() if "$ref" in field}
    assert list(groups) == ["model", "images", "table", "work"]
    assert all(schema["properties"][name]["description"] for name in ("dataset", "output"))
    assert all(definition["description"] for definition in schema["definitions"].values())
    options: dict[str, Any] = {}
    for definition in schema["definitions"].values():
        options |= definition.get("properties", {})
    assert [name for name, option in options.items() if not option.get("description")] == []
    assert options["decode"]["enum"] == ["auto", "exact", "fast"]
    assert options["max_pixels"]["minimum"] == 1
