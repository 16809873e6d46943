"""The side processes do what they are told, say what went wrong, and never outlive the process they belong to."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from embedders.errors import MalformedShard
from embedders.tar import map_tar, read_tar
from embedders.webdataset import describe
from tasks.index import describe_local
from tasks.worker.side_process import SIDES, SidePool, aside

from ..conftest import MakeShard


def slow_pid() -> int:
    """The id of the process that it runs in, after a while."""
    time.sleep(0.05)
    return os.getpid()


def wait_until_ready(side: SidePool) -> int:
    """The side process's id, once calls go there."""
    for _ in range(600):
        if (pid := side.call(os.getpid)) != os.getpid():
            return pid
        time.sleep(0.1)
    raise AssertionError("the side process did not come up in a minute")


@pytest.fixture(scope="module")
def side() -> Iterator[SidePool]:
    side = SidePool("tasks.index")
    yield side
    side.close()


def test_calls_are_made_here_until_the_other_process_is_up_and_then_there(side: SidePool) -> None:
    here, there = side.call(os.getpid), wait_until_ready(side)
    assert here in (os.getpid(), there)
    assert side.call(os.getppid) == os.getpid()
    assert side.call(print, "no answer") is None


def test_errors_come_back_as_they_were_raised(side: SidePool, tmp_path: Path, make_shard: MakeShard) -> None:
    wait_until_ready(side)
    shard = make_shard()
    path = tmp_path / "data/00000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(MalformedShard, match="cut short"):
        side.call(describe_local, shard, str(path), "key", False, None)


def test_a_shard_is_described_there_as_here(side: SidePool, make_shard: MakeShard) -> None:
    wait_until_ready(side)
    shard = make_shard(keys=("a", "b", "c"), json_of={"b": {"key": "B"}}, d__jpg=b"", e__txt=b"alone")
    path = shard.source.path(shard.tar)
    there = side.call(describe_local, shard, path, "key", False, None)
    data = map_tar(path)
    here = describe(data, read_tar(data), "key", headers=True)
    assert there.ids.to_pylist() == here.ids.to_pylist() == ["a", "B", "c", "d", "e"]
    assert there.members == here.members
    assert there.unusable == here.unusable
    assert there.unusable.keys() == {3, 4}
    assert (there.places == here.places).all()
    assert there.headers is not None
    assert there.headers.tolist() == [(96, 64, 1, 0)] * 3 + [(0, 0, 0, 0)] * 2


def die() -> None:
    """End this process as the system does where memory runs out."""
    os.kill(os.getpid(), signal.SIGKILL)


def unpicklable() -> Callable[[], None]:
    """Return what cannot be sent."""
    return lambda: None


class TwoWords(Exception):
    """Cannot be made again from its pickle."""

    def __init__(self, one: str, other: str) -> None:
        super().__init__(f"{one} {other}")


def raise_two_words() -> None:
    """Raise it."""
    raise TwoWords("malformed", "thing")


class DiesInParent:
    """Cannot be made from its pickle, as if half of it were missing."""

    def __reduce__(self) -> Any:
        return int, ("no number",)


def half_an_answer() -> DiesInParent:
    """Return it."""
    return DiesInParent()


def test_what_cannot_be_sent_fails_one_call_and_no_later_one(side: SidePool) -> None:
    there = wait_until_ready(side)
    with pytest.raises(Exception, match="pickle"):
        side.call(unpicklable)
    with pytest.raises(RuntimeError, match="TwoWords: malformed thing"):
        side.call(raise_two_words)
    assert side.call(os.getpid) == there
    assert not side.broken


@pytest.mark.parametrize("fault", [die, half_an_answer])
def test_the_death_of_a_process_is_an_error_that_can_be_tried_again(fault: Callable[[], None]) -> None:
    for _ in range(600):
        if aside(slow_pid) != os.getpid():
            break
        time.sleep(0.1)
    with pytest.raises(OSError, match="died"):
        aside(fault)
    for _ in range(600):
        if aside(slow_pid) != os.getpid():
            return
        time.sleep(0.1)
    raise AssertionError("no other process came up")


def test_calls_at_the_same_time_are_made_in_a_few_processes() -> None:
    with ThreadPoolExecutor(6) as pool:
        for _ in range(600):
            pids = set(pool.map(aside, [slow_pid] * 12))
            if os.getpid() not in pids and len(pids) == SIDES:
                return
    raise AssertionError(f"{pids}, this is {os.getpid()}")


def running(process: int) -> bool:
    """Whether a process is there and no zombie."""
    state = Path(f"/proc/{process}/stat")
    with contextlib.suppress(OSError):
        return state.read_text().rpartition(")")[2].split()[0] != "Z"
    return False


PARENT = """
import multiprocessing, os, sys, time
def work():
    from tasks.worker.side_process import SidePool
    pool = SidePool("tasks.index")
    while (child := pool.call(os.getpid)) == os.getpid():
        time.sleep(0.1)
    print(os.getpid(), child, flush=True)
    time.sleep(float(sys.argv[1]))
"""


@pytest.mark.parametrize("daemonic", [False, True])
@pytest.mark.parametrize("killed", [False, True])
def test_they_end_with_their_parent_a_daemonic_one_too(tmp_path: Path, daemonic: bool, killed: bool) -> None:
    """However that ends; Dask's workers are daemonic."""
    (tmp_path / "parent.py").write_text(PARENT)
    code = "import parent; parent.work()"
    if daemonic:
        code = (
            "import parent, multiprocessing as m\n"
            "p = m.get_context('spawn').Process(target=parent.work, daemon=True); p.start(); p.join(); exit(p.exitcode)"
        )
    command = [sys.executable, "-c", code, "600" if killed else "0"]
    path = os.pathsep.join([str(tmp_path), os.getcwd()])
    with subprocess.Popen(
        command, env=os.environ | {"PYTHONPATH": path}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        owner, child = map(int, parent.stdout.readline().split())
        if killed:
            os.kill(owner, signal.SIGKILL)
        _, errors = parent.communicate(timeout=60)
    assert killed or (parent.returncode, errors) == (0, "")
    deadline = time.monotonic() + 30
    while running(child):
        assert time.monotonic() < deadline, "the side process outlived its parent"
        time.sleep(0.1)
