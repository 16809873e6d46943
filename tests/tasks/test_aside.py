"""The side process does what it is told, says what went wrong, and never outlives the process it belongs to."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from embedders.errors import MalformedShard
from embedders.webdataset import describe, map_tar, read_tar
from tasks.aside import SIDES, SideProcess, aside
from tasks.index import describe_local

from .conftest import MakeShard


def slow_pid() -> int:
    """The id of the process that it runs in, after a while."""
    time.sleep(0.05)
    return os.getpid()


def wait_until_ready(side: SideProcess) -> int:
    """The side process's id, once calls go there."""
    for _ in range(600):
        if (pid := side.call(os.getpid)) != os.getpid():
            return pid
        time.sleep(0.1)
    raise AssertionError("the side process did not come up in a minute")


@pytest.fixture(scope="module")
def side() -> Iterator[SideProcess]:
    side = SideProcess()
    yield side
    side.close()


def test_calls_are_made_here_until_the_other_process_is_up_and_then_there(side: SideProcess) -> None:
    here, there = side.call(os.getpid), wait_until_ready(side)
    assert here in (os.getpid(), there)
    assert side.call(os.getppid) == os.getpid()
    assert side.call(print, "no answer") is None


def test_errors_come_back_as_they_were_raised(side: SideProcess, tmp_path: Path, make_shard: MakeShard) -> None:
    wait_until_ready(side)
    shard = make_shard()
    path = tmp_path / "data/00000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MalformedShard, match="cut short"):
        side.call(describe_local, shard, str(path), "key", False, None)


def test_a_shard_is_described_there_as_here(side: SideProcess, make_shard: MakeShard) -> None:
    wait_until_ready(side)
    shard = make_shard(keys=("a", "b", "c"), json_of={"b": {"key": "B"}}, d__jpg=b"", e__txt=b"alone")
    path = shard.source.path(shard.tar)
    there = side.call(describe_local, shard, path, "key", False, None)
    data = map_tar(path)
    here = describe(data, read_tar(data), "key", headers=True)
    assert there.ids == here.ids == ("a", "B", "c", "d", "e")
    assert there.members == here.members
    assert there.unusable == here.unusable
    assert there.unusable.keys() == {3, 4}
    assert (there.places == here.places).all()
    assert there.headers is not None
    assert there.headers.tolist() == [[96, 64, 1, 0]] * 3 + [[0, 0, 0, 0]] * 2


def test_the_death_of_the_process_is_an_error_that_can_be_tried_again() -> None:
    side = SideProcess()
    os.kill(wait_until_ready(side), signal.SIGKILL)
    with pytest.raises(OSError, match="died"):
        side.call(os.getpid)
    assert not side.alive


def test_calls_at_the_same_time_are_made_in_a_few_processes() -> None:
    with ThreadPoolExecutor(6) as pool:
        for _ in range(600):
            pids = set(pool.map(aside, [slow_pid] * 12))
            if os.getpid() not in pids and len(pids) == SIDES:
                return
    raise AssertionError(f"{pids}, this is {os.getpid()}")


def test_it_ends_when_its_parent_is_killed() -> None:
    code = (
        "import os, time; from tasks.aside import SideProcess\n"
        "side = SideProcess(); print(side._child.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    for _ in range(300):
        state = Path(f"/proc/{child}/stat")
        if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.1)
    raise AssertionError("the side process outlived its parent")
