"""The documentation's code, run as it stands, and its messages, compared with those in the code."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted(str(page.relative_to(ROOT)) for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
FENCE = re.compile(
    r"(?:^<!-- (?P<note>[^\n]*) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
INDENTED = re.compile(r"(?<=\n\n)((?:    [^\n]*\n)+)")


class Block(NamedTuple):
    """A fenced block, and the comment in front of it."""

    language: str
    code: str
    note: str


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found = FENCE.finditer((ROOT / page).read_text())
    return [Block(match["language"], match["code"], match["note"] or "") for match in found]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder where the demo was run: demo-data and demo-out, to be changed."""
    folder = tmp_path_factory.mktemp("docs")
    run(folder, [sys.executable, "-m", "flows.demo"])
    return folder


def run(folder: Path, command: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def runnable(page: str) -> Iterator[Block]:
    """The blocks that are to be run."""
    for block in blocks(page):
        if not block.note.startswith("not run: "):
            yield block


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if any(b.language in {"python", "sh"} for b in runnable(page))]
)
def test_code_runs(place: Path, page: str) -> None:
    for block in runnable(page):
        if block.note.startswith("file: "):
            (place / block.note.removeprefix("file: ")).write_text(block.code)
        elif block.language == "python":
            run(place, [sys.executable, "-c", block.code])
        elif block.language == "sh":
            run(place, ["bash", "-euo", "pipefail", "-c", block.code])
    if page == "docs/custom-embedders.md":
        vectors = np.stack(pq.read_table(place / "colours-out/metadata")["image_embedding"].to_numpy())
        assert vectors.shape == (254, 64)
        assert np.allclose(vectors.sum(1), 1)


@pytest.mark.parametrize("page", PAGES)
def test_no_code_is_left_out_without_a_reason(page: str) -> None:
    for block in blocks(page):
        assert block.language in {"python", "sh", "text", "mermaid"} or block.note.startswith("not run: "), block.code
    text = (ROOT / page).read_text()
    without = FENCE.sub("", text)
    for match in INDENTED.finditer(without):
        before = without[: match.start()].rstrip().rpartition("\n")[2]
        assert before.startswith("<!-- not run: "), f"{page}: {match[0]}"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert "://" in link or (ROOT / page).parent.joinpath(link).exists(), link


def templates() -> set[str]:
    """Every text in the code, with … for what is filled in."""
    found = set()
    for folder in ("embedders", "tasks", "flows"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.add("".join(str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.add(node.value)
    return found


def test_messages_that_are_explained_exist() -> None:
    known = templates()
    messages = re.findall(r"^### `(.*)`$", (ROOT / "docs/troubleshooting.md").read_text(), re.MULTILINE)
    assert len(messages) > 10
    missing = [message for message in messages if not any(message in template for template in known)]
    assert not missing


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "README.md" or f"({page.name})" in index
    assert shutil.which("bash")
