"""What a person sees of a run in a terminal, by a run in one."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from tests.flows.conftest import ROOT, TINY


def test_a_run_in_a_terminal(server: str, demo_dataset: Path, tmp_path: Path) -> None:
    """The live view shows shards, images, both rates, the time left and quarantined images by reason."""
    master, slave = pty.openpty()
    call = [sys.executable, "-m", "flows.embed", str(demo_dataset), "--output", str(tmp_path / "out")]
    call += ["--model-name", TINY, "--no-pretrained", "--device", "cpu", "--workers", "1", "--json"]
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
    text = shown.decode()
    assert process.returncode == 0, text
    assert out.startswith(b"{")
    assert "\x1b[" in text  # it is drawn over, not scrolled
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text)
    for said in ("4 shards: 4 to embed", "of 4", "images/s", "now", "on average", "starting", "4 of 4", "256 images"):
        assert said in plain, said
    assert re.search(r"2 quarantined \(1 \w+, 1 \w+\)", plain)
    assert "distributed" not in plain  # Dask's and Prefect's own words
    assert "prefect" not in plain.lower()
