"""A run that is told to stop; `make chaos` does it in the middle of the work too."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .conftest import ROOT, processes_with

TINY = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_run_that_is_told_to_stop_does(
    demo_dataset: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    output, mark = tmp_path / "out", f"PREFECT_HOME={tmp_path / 'prefect'}"
    environment = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"}
    process = subprocess.Popen(
        [sys.executable, "-m", "flows.embed", str(demo_dataset), "--output", str(output), *TINY],
        cwd=ROOT,
        env=environment | {"PREFECT_HOME": str(tmp_path / "prefect")},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not any("spawn_main" in command for _, command in processes_with(mark)):  # the first worker comes up
        assert time.monotonic() < until
        time.sleep(0.05)
    begun = time.monotonic()
    os.killpg(process.pid, number)
    _, said = process.communicate(timeout=20)
    assert time.monotonic() - begun < 10
    assert process.returncode == status
    assert said.splitlines()[-1].startswith("stopped: 0 of 4 shards"), said
    assert f"python -m flows.embed {demo_dataset} --output {output}" in said
    assert not (output / "run.locks").exists()
    assert not processes_with(mark)
