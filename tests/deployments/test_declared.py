"""What prefect.yaml declares, without a server."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from deployments.serve import DECLARED, deployments
from flows.embed import embed
from flows.sensor import start_for_new_shards

DEPLOYMENTS: dict[str, Any] = {entry["name"]: entry for entry in yaml.safe_load(DECLARED.read_text())["deployments"]}


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_the_flow_takes_the_parameters(name: str) -> None:
    entry = DEPLOYMENTS[name]
    flow: Any = {"embed": embed, "start_for_new_shards": start_for_new_shards}[entry["entrypoint"].partition(":")[2]]
    given = {"dataset": "asked for", "output": "asked for"} | entry.get("parameters", {})
    flow.validate_parameters(given)


def test_what_is_served_is_what_is_declared() -> None:
    served = {deployment.name: deployment for deployment in deployments()}
    assert served.keys() == DEPLOYMENTS.keys()
    nightly = served["nightly"]
    assert nightly.parameters == DEPLOYMENTS["nightly"]["parameters"]
    assert (nightly.concurrency_limit, nightly.concurrency_options.collision_strategy) == (1, "ENQUEUE")
    assert (nightly.schedules[0].schedule.cron, nightly.schedules[0].schedule.timezone) == (
        "30 2 * * *",
        "Europe/Berlin",
    )


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
