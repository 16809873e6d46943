"""What `make` and the demo's command line call is there, and asking for help does nothing else."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tomllib
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from benchmarks.__main__ import ON_A_CPU, ON_A_GPU, sized
from benchmarks.throughput import parse
from flows.__main__ import COMMANDS, main
from tasks.wording import counted

from .conftest import ROOT

MODULES = sorted(set(re.findall(r"\$\(BIN\)/python -m ([\w.]+)", (ROOT / "Makefile").read_text())))


@pytest.mark.parametrize("module", MODULES)
def test_every_module_that_make_runs_can_be_run(module: str) -> None:
    found = importlib.util.find_spec(module)
    assert found is not None
    if found.submodule_search_locations is not None:
        assert importlib.util.find_spec(f"{module}.__main__") is not None


@pytest.mark.parametrize("module", ["benchmarks", "flows.demo", "flows.report", "flows.search", "flows.export"])
def test_help_is_all_that_help_does(module: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.lower().startswith("usage: python -m ")
    assert not list(tmp_path.glob("demo-*"))


@pytest.mark.parametrize("command", COMMANDS)
def test_the_installed_command_has_every_command(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    shard_embed = EntryPoint("shard-embed", scripts["shard-embed"], "console_scripts").load()
    assert shard_embed([command, "--help"]) == 0
    assert capsys.readouterr().out.lower().startswith(f"usage: python -m flows.{command}")


def test_an_unknown_command_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.count("\n  ") == len(COMMANDS)
    assert main(["embedd"]) == 2
    assert "no command 'embedd'; give one of: embed, search" in capsys.readouterr().err


def test_the_benchmark_without_arguments_needs_no_network() -> None:
    assert sized(["--shards", "1"]) == ["--shards", "1"]
    for arguments in (ON_A_CPU, ON_A_GPU):
        assert not parse(arguments)[1].pretrained


@pytest.mark.parametrize(
    ("count", "said"), [(0, "0 shards"), (1, "1 shard"), (2, "2 shards"), (1234567, "1,234,567 shards")]
)
def test_a_count_has_its_noun(count: int, said: str) -> None:
    assert counted(count, "shard") == said
    assert counted(2, "index", "indices") == "2 indices"
