"""The Docker image's layers, without Docker."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

DEPLOYMENTS = Path(__file__).parents[2] / "deployments"


def instructions() -> list[tuple[str, str]]:
    """The instructions of the Dockerfile and what follows each."""
    text = re.sub(r"(?m)^#.*\n", "", (DEPLOYMENTS / "Dockerfile").read_text()).replace("\\\n", "")
    return [(name, rest) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def test_a_change_of_code_installs_no_package_again() -> None:
    """What stands before the installation of the packages copies only the files that name them."""
    steps = instructions()
    (packages,) = [i for i, (name, rest) in enumerate(steps) if name == "RUN" and "locks/gpu.txt '.[gpu,s3]'" in rest]
    copied = [source for name, rest in steps[:packages] if name == "COPY" for source in rest.split()[1:-1]]
    assert copied == ["pyproject.toml", "locks"]
    after = [rest for name, rest in steps[packages + 1 :] if name == "RUN"]
    assert len(after) == 1
    assert "pip install" in after[0]
    assert {"--no-deps", "--no-build-isolation"} <= set(after[0].split())


def test_the_worker_is_no_root() -> None:
    steps = dict(instructions())
    assert steps["USER"] == "10001"
    assert json.loads(steps["ENTRYPOINT"]) == ["python", "-m"]


@pytest.mark.parametrize("service", ["server", "worker"])
def test_the_server_asks_for_a_password(service: str) -> None:
    compose: dict[str, Any] = yaml.safe_load((DEPLOYMENTS / "compose.yaml").read_text())
    environment = compose["services"][service]["environment"]
    name = "PREFECT_SERVER_API_AUTH_STRING" if service == "server" else "PREFECT_API_AUTH_STRING"
    assert environment[name].startswith("${PREFECT_API_AUTH_STRING:?")  # without one, compose refuses to start
