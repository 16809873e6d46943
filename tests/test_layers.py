"""Imports go one way, flows → tasks → embedders, and no file imports another that imports it back."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("embedders", "tasks", "flows")
"""From the lowest to the highest: a file imports from its own layer and from those before it."""
ON_TOP = ("deployments", "examples", "benchmarks")
"""Import what they like. Nothing imports them."""


def module_name(file: Path) -> str:
    """Return the dotted name of a file: `embedders/timm.py` is `embedders.timm`."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(file): file for package in (*LAYERS, *ON_TOP) for file in sorted((ROOT / package).rglob("*.py"))}


def imported(source: str, modules: frozenset[str]) -> Iterator[str]:
    """Yield those of `modules` that a source imports anywhere: at the top, in functions, and for types only."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "name the whole path: this test follows no relative import"
            for alias in node.names:
                inside = f"{node.module}.{alias.name}"  # `from tasks import plan` imports a file, not a name
                yield from [name for name in (inside, node.module) if name in modules][:1]


def import_graph() -> dict[str, set[str]]:
    """Return the files that each file imports, by module name."""
    modules = frozenset(FILES)
    return {name: set(imported(file.read_text(), modules)) - {name} for name, file in FILES.items()}


def find_circle(graph: dict[str, set[str]]) -> list[str]:
    """Return the modules of a circle in the order of their imports, the first one again at the end; [] if none."""
    done: set[str] = set()

    def follow(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for next_name in sorted(graph.get(name, ())):
            if circle := follow(next_name, [*path, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := follow(name, []):
            return circle
    return []


def test_no_circle_between_files() -> None:
    assert find_circle(import_graph()) == []


@pytest.mark.parametrize("layer", [*LAYERS, *ON_TOP])
def test_imports_go_one_way(layer: str) -> None:
    allowed = {*LAYERS, layer} if layer in ON_TOP else set(LAYERS[: LAYERS.index(layer) + 1])
    graph = import_graph()
    wrong = {
        f"{name} -> {other}"
        for name in graph
        for other in graph[name]
        if name.partition(".")[0] == layer and other.partition(".")[0] not in allowed
    }
    assert wrong == set()


def test_a_circle_is_found_wherever_the_import_stands() -> None:
    files = {
        "flows.a": "import os\nfrom tasks import b\n",
        "tasks.b": "def later():\n    from tasks.c import something\n",
        "tasks.c": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import flows.a\n",
        "tasks.d": "from tasks.b import later\n",
    }
    graph = {name: set(imported(source, frozenset(files))) for name, source in files.items()}
    assert find_circle(graph) == ["flows.a", "tasks.b", "tasks.c", "flows.a"]
    assert find_circle(graph | {"tasks.c": set()}) == []
