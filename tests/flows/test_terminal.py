"""What a person sees of a run in a terminal, in a notebook and from a script, by runs there."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flows.progress import CONSOLE_LEVEL
from tests.flows.conftest import ROOT, TINY

SCRIPT = """
from embedders import TimmImageEmbedder
from flows.embed import embed_dataset

embedder = TimmImageEmbedder({model!r}, pretrained=False)
print(embed_dataset({dataset!r}, {output!r}, embedder, workers=1, device="cpu").embedded)
"""


def in_a_terminal(call: list[str]) -> tuple[int, bytes, str]:
    """Run a command whose standard error is a terminal: its status, its output, and what the terminal got."""
    master, slave = pty.openpty()
    environment = {**os.environ, "TERM": "xterm-256color", "DO_NOT_TRACK": "1", "COLUMNS": "120", "LINES": "40"}
    process = subprocess.Popen(call, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=slave)
    os.close(slave)
    shown = b""
    while True:
        try:
            read = os.read(master, 65536)
        except OSError:  # the other end is closed
            break
        if not read:
            break
        shown += read
    out, _ = process.communicate(timeout=60)
    os.close(master)
    return process.returncode, out, shown.decode()


def check_live_view(text: str) -> None:
    """Prove that a terminal has shown shards, images, both rates, the time left and quarantined images by reason."""
    assert "\x1b[" in text  # it is drawn over, not scrolled
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for said in ("4 shards: 4 to embed", "of 4", "images/s", "now", "on average", "starting", "4 of 4", "256 images"):
        assert said in plain, said
    assert re.search(r"2 quarantined \(1 \w+, 1 \w+\)", plain)
    assert "distributed" not in plain  # Dask's and Prefect's own words
    assert "prefect" not in plain.lower()


def test_a_run_in_a_terminal(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    call = [sys.executable, "-m", "flows.embed", str(demo_dataset), "--output", str(tmp_path / "out")]
    call += ["--model-name", TINY, "--no-pretrained", "--device", "cpu", "--workers", "1", "--json"]
    status, out, text = in_a_terminal(call)
    assert status == 0, text
    assert out.startswith(b"{")
    check_live_view(text)


def test_a_script_in_a_terminal_shows_the_same(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    script = SCRIPT.format(model=TINY, dataset=str(demo_dataset), output=str(tmp_path / "out"))
    status, out, text = in_a_terminal([sys.executable, "-c", script])
    assert (status, out) == (0, b"254\n"), text
    check_live_view(text)


def test_a_script_elsewhere_is_quiet(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    """Also where the script has set up logging for itself, whose own lines stay."""
    script = "import logging; logging.basicConfig(level=logging.INFO)\n"
    script += SCRIPT.format(model=TINY, dataset=str(demo_dataset), output=str(tmp_path / "out"))
    script += "logging.info('my own line')\n"
    # The command line, which other tests call in this process, leaves its own choice there.
    unset = {name: value for name, value in os.environ.items() if name != CONSOLE_LEVEL}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=ROOT, env=unset, capture_output=True, text=True, timeout=200)
    assert (done.returncode, done.stdout) == (0, "254\n"), done.stderr
    assert [line for line in done.stderr.splitlines() if "distributed" in line or "prefect" in line.lower()] == []
    assert "my own line" in done.stderr


def test_a_notebook_shows_the_same(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    """In one output, which is updated; in a real kernel."""
    pytest.importorskip("ipykernel")
    from jupyter_client.manager import start_new_kernel

    messages: list[dict[str, Any]] = []
    manager, client = start_new_kernel(cwd=str(ROOT))
    try:
        script = SCRIPT.format(model=TINY, dataset=str(demo_dataset), output=str(tmp_path / "out"))
        reply = client.execute_interactive(script, timeout=200, output_hook=messages.append)
    finally:
        client.stop_channels()
        manager.shutdown_kernel()
    assert reply["content"]["status"] == "ok", reply["content"]
    pages = [m["content"]["data"].get("text/html", "") for m in messages if m["msg_type"] == "update_display_data"]
    plain = re.sub(r"<[^>]*>", "", pages[-1])
    for said in ("4 of 4", "256 images", "on average", "2 quarantined"):
        assert said in plain, plain
    said = "".join(m["content"]["text"] for m in messages if m["msg_type"] == "stream")
    assert said.splitlines()[-1] == "254"
    assert "distributed" not in said
    assert "prefect" not in said.lower()
