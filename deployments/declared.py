"""The deployments that prefect.yaml and datasets.yaml declare, with their variables filled in."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from embedders.errors import InputError

FOLDER = Path(__file__).parent
DECLARED, DATASETS = FOLDER / "prefect.yaml", FOLDER / "datasets.yaml"
PREFIX = "SHARD_EMBED_"
OF_A_DATASET = frozenset({"nightly", "new-shards"})
"""The deployments of prefect.yaml that each entry of datasets.yaml has one like."""
_PLACEHOLDER = re.compile(r"\{\{\s*\$(\w+)\s*\}\}")


@dataclass(frozen=True)
class Declared:
    """A deployment as it is declared.

    Attributes:
        flow: The flow's name on the server.
        entry: What prefect.yaml says of it, with the variables' values.
    """

    flow: str
    entry: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Return FLOW/DEPLOYMENT."""
        return f"{self.flow}/{self.entry['name']}"


FLOWS = {"flows.embed.embed": "embed", "flows.sensor.start_for_new_shards": "new-shards"}
"""The name of each of our flows by its entry point; their files take seconds to import."""


def declared(deployments: Path = DECLARED, datasets: Path = DATASETS) -> list[Declared]:
    """Return all deployments.

    Args:
        deployments: A prefect.yaml, this folder's by default.
        datasets: A datasets.yaml, this folder's by default.

    Raises:
        InputError: A variable has no value, or an entry of a dataset is wrong.
    """
    whole = yaml.safe_load(deployments.read_text())
    defaults: dict[str, str] = whole["definitions"]["variables"]
    values = {**defaults, **{name: os.environ[name] for name in defaults if name in os.environ}, "PWD": os.getcwd()}
    entries = [_filled(entry, values) for entry in whole["deployments"]]
    templates = [entry for entry in whole["deployments"] if entry["name"] in OF_A_DATASET]
    for dataset in yaml.safe_load(datasets.read_text()) or []:
        entries += _of_dataset(dataset, templates, values, datasets)
    found = [Declared(_flow_name(entry["entrypoint"]), entry) for entry in entries]
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"{datasets}: two deployments would be called {name}; rename an entry")
    return found


def _flow_name(entrypoint: str) -> str:
    if entrypoint in FLOWS:
        return FLOWS[entrypoint]
    from prefect.flows import load_flow_from_entrypoint

    return str(load_flow_from_entrypoint(entrypoint).name)


def _of_dataset(
    dataset: Any, templates: list[dict[str, Any]], values: Mapping[str, str], file: Path
) -> Iterator[dict[str, Any]]:
    """Yield what an entry of datasets.yaml declares: a run on a schedule, and a sensor that starts it."""
    known = {"name", *(name.removeprefix(PREFIX).lower() for name in values if name.startswith(PREFIX))}
    needed = {"name", "dataset", "output"}
    if not isinstance(dataset, dict) or not needed <= dataset.keys() <= known:
        raise InputError(
            f"{file}: each entry has {', '.join(sorted(needed))}, and may have {', '.join(sorted(known - needed))}; "
            f"not {dataset!r}"
        )
    name = str(dataset["name"])
    own = {f"{PREFIX}{key.upper()}": str(value) for key, value in dataset.items() if key != "name"}
    for template in templates:
        entry = _filled(template, {**values, **own})
        tags = [name if tag == "nightly" else tag for tag in entry["tags"]]
        parameters = dict(entry["parameters"])
        if "deployment" in parameters:
            parameters["deployment"] = f"embed/{name}"
        yield entry | {"name": name, "tags": tags, "parameters": parameters}


def _filled(value: Any, values: Mapping[str, str]) -> Any:
    """Return a piece of YAML with `{{ $NAME }}` replaced by values.

    Raises:
        InputError: A name has none.
    """
    if isinstance(value, dict):
        return {key: _filled(one, values) for key, one in value.items()}
    if isinstance(value, list):
        return [_filled(one, values) for one in value]
    if not isinstance(value, str):
        return value

    def replacement(found: re.Match[str]) -> str:
        if found[1] not in values:
            raise InputError(f"{DECLARED}: {found[0]} has no value; give it one under definitions, variables")
        return values[found[1]]

    return _PLACEHOLDER.sub(replacement, value)
