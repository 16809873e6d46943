"""One run at a time: who is refused, what is taken over, what is left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from embedders.errors import InputError
from tasks import run_lock
from tasks.run_lock import EXPIRED_AFTER, LOCK, Lease, only_run

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from tasks.run_lock import only_run
with only_run(sys.argv[1], "the other", print):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the output."""
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out")]
    process = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def take(output: Path | str) -> None:
    with only_run(str(output), "mine", print):
        pass


def rewrite(output: Path, **changes: object) -> None:
    lease = json.loads((output / LOCK).read_text())
    (output / LOCK).write_text(json.dumps(lease | changes))


def test_nothing_is_left(tmp_path: Path) -> None:
    with only_run(str(tmp_path / "new" / "out"), "mine", print):
        assert json.loads((tmp_path / "new/out" / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


def test_what_was_written_stays(tmp_path: Path) -> None:
    with only_run(str(tmp_path / "out"), "mine", print):
        (tmp_path / "out/file").touch()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["file"]


def test_the_second_is_told_who_the_first_is(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError, match=rf"'the other', process {holder.pid} on \S+, since .*--output"):
        take(tmp_path / "out")
    holder.communicate("")
    take(tmp_path / "out")


def test_a_killed_process_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    holder.kill()
    holder.wait()
    assert (tmp_path / "out" / LOCK).exists()
    take(tmp_path / "out")
    assert not (tmp_path / "out" / LOCK).exists()


def test_another_process_with_the_same_id_holds_nothing(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    rewrite(tmp_path / "out", born=1.0)
    take(tmp_path / "out")


def test_a_run_on_another_machine_holds_while_it_renews(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    rewrite(tmp_path / "out", machine="another", pid=1, renewed=time.time())
    with pytest.raises(InputError, match="another run writes here"):
        take(tmp_path / "out")
    rewrite(tmp_path / "out", renewed=time.time() - EXPIRED_AFTER - 1)
    take(tmp_path / "out")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"token": "1"}'])
def test_a_lock_that_says_nothing_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / LOCK).write_text(text)
    take(tmp_path)
    assert not (tmp_path / LOCK).exists()


def test_of_many_at_once_one_has_it(tmp_path: Path) -> None:
    rewrite_stale(tmp_path)
    have, refused = [], []
    together, done = threading.Barrier(8), threading.Event()

    def run(number: int) -> None:
        together.wait()
        try:
            with only_run(str(tmp_path), f"run {number}", print):
                have.append(number)
                done.wait(10)
        except InputError:
            refused.append(number)
            if len(refused) == 7:
                done.set()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(have), len(refused)) == (1, 7)


def rewrite_stale(output: Path) -> None:
    """A lease of a run that is gone."""
    lease = Lease("old", "gone", "gone", 1, 0.0, "old", 0.0, 0.0)
    (output / LOCK).write_text(json.dumps(lease.__dict__))


def test_a_lease_is_renewed_and_its_loss_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEWED_EVERY", 0.05)
    told = threading.Event()
    with only_run(str(tmp_path), "mine", lambda why: told.set()):
        first = json.loads((tmp_path / LOCK).read_text())["renewed"]
        until = time.monotonic() + 5
        while json.loads((tmp_path / LOCK).read_text())["renewed"] == first:
            assert time.monotonic() < until
            time.sleep(0.01)
        rewrite_stale(tmp_path)
        taken = told.wait(5)
    assert taken
    assert (tmp_path / LOCK).exists()  # it is the other's


def test_a_store_is_locked_too() -> None:
    output = "memory://locked/out"
    with (
        only_run(output, "mine", print),
        pytest.raises(InputError, match="another run writes here: 'mine'"),
        only_run(output, "other", print),
    ):
        pass
    take(output)


def test_an_output_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written to"):
        take(tmp_path / "file")
