"""A function fits a screen: none is longer than 60 lines, its docstring included."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_LINES = 60
FILES = sorted(
    str(file.relative_to(ROOT))
    for package in ("embedders", "tasks", "flows", "deployments", "examples", "benchmarks")
    for file in (ROOT / package).rglob("*.py")
)


def long_functions(source: str) -> Iterator[str]:
    """Yield the names of a source's functions, methods and inner functions that have too many lines."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > MOST_LINES:
                yield node.name


@pytest.mark.parametrize("file", FILES)
def test_functions_fit_a_screen(file: str) -> None:
    assert set(long_functions((ROOT / file).read_text())) == set()


def test_the_last_line_counts() -> None:
    lines = MOST_LINES - 1
    assert not list(long_functions("def f():\n" + "    1\n" * lines))
    assert list(long_functions("class A:\n  async def f():\n" + "    1\n" * (lines + 1))) == ["f"]
