"""The locks hold every dependency that pyproject.toml names, and nothing of the machine they were made on."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = {
    "base": [],
    "s3": ["s3"],
    "demo": ["demo"],
    "export": ["export"],
    "dev": ["s3", "demo", "export", "dev"],
    "gpu": ["gpu", "s3"],
    "gpu-cu13": ["gpu-cu13", "s3"],
}
PIN = re.compile(r"^([a-z0-9][a-z0-9-]*)==([a-z0-9.+!]+)( ; [\w.*<>=!' ()-]+)?(  # via .*)?$")


def pins(name: str) -> dict[str, str]:
    """Return the version of every package in a lock."""
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    matches = [PIN.match(line) for line in lines if not line.startswith("#")]
    return {match[1]: match[2] for match in matches if match}


def package(requirement: str) -> str:
    """Return the normalised name of the package that a requirement asks for."""
    return re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~; ]", requirement, maxsplit=1)[0]).lower()


def test_every_extra_has_a_lock() -> None:
    assert {path.stem for path in (ROOT / "locks").glob("*.txt")} == {"base", *PROJECT["optional-dependencies"]}


@pytest.mark.parametrize("name", EXTRAS)
def test_lock_is_plain_pins(name: str) -> None:
    lines = (ROOT / "locks" / f"{name}.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#") and not PIN.match(line)] == []
    assert [line for line in lines if "://" in line or re.search(r"(^|\s)/", line) or "--" in line] == []


@pytest.mark.parametrize("name", EXTRAS)
def test_lock_holds_what_the_project_asks_for(name: str) -> None:
    asked = PROJECT["dependencies"] + [r for e in EXTRAS[name] for r in PROJECT["optional-dependencies"][e]]
    assert {package(requirement) for requirement in asked} - pins(name).keys() == set()


@pytest.mark.parametrize("name", ["base", "s3", "demo", "export"])
def test_sets_are_parts_of_the_tested_one(name: str) -> None:
    assert pins(name).items() <= pins("dev").items()


def test_dask_cuda_agrees_with_dask() -> None:
    for name in ("gpu", "gpu-cu13"):
        assert pins(name)["dask"] == pins(name)["distributed"]
        assert pins(name)["rapids-dask-dependency"].split(".")[:2] == pins(name)["dask-cuda"].split(".")[:2]
