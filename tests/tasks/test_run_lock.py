"""One run at a time: who is refused, what is taken over, what is left."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import s3fs

from embedders.errors import InputError
from tasks import run_lock
from tasks.run_lock import EXPIRED_AFTER, LOCK, LOCKS, TURN, Lease, in_turn, only_run
from tasks.run_part import RunPart
from tasks.storage.conditional import ChangedMeanwhile, replace, version_of
from tasks.storage.folder import Folder
from tests.servers import s3_server

ROOT = Path(__file__).parents[2]
HOLD = """
import sys, time
from tasks.run_lock import only_run
from tasks.run_part import RunPart
part = RunPart.parse(sys.argv[2]) if sys.argv[2:] else None
with only_run(sys.argv[1], "the other", print, part=part):
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


@pytest.fixture
def part_holder(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds part 3 of 16."""
    command = [sys.executable, "-c", HOLD, str(tmp_path / "out"), "3/16"]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of a folder in a bucket of a real S3 server."""
    variables = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    with s3_server() as url, pytest.MonkeyPatch.context() as patch:
        for name, value in {**variables, "AWS_ENDPOINT_URL": url}.items():
            patch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # of servers that are gone
        s3fs.S3FileSystem(endpoint_url=url).mkdir("locks")
        yield "s3://locks/out"
        s3fs.S3FileSystem.clear_instance_cache()


class Told:
    """Notes the line that it is told."""

    def __init__(self) -> None:
        self.line, self.happened = "", threading.Event()

    def __call__(self, line: str) -> None:
        self.line = line
        self.happened.set()


def take(output: Path | str, part: str | None = None, settings: str = "") -> None:
    told = None if part is None else RunPart.parse(part)
    with only_run(str(output), "mine", print, part=told, settings=settings):
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
    (tmp_path / LOCKS).mkdir()
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
    (output / LOCKS).mkdir(exist_ok=True)
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


PART_LOCK = f"{LOCKS}/3-of-16.lock"


def test_parts_of_one_division_run_side_by_side(tmp_path: Path, part_holder: subprocess.Popen[str]) -> None:
    for part in ("2/16", "4/16", "15/16"):
        take(tmp_path / "out", part)
    assert [path.name for path in (tmp_path / "out" / LOCKS).iterdir()] == ["3-of-16.lock"]
    part_holder.communicate("")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "settings", "said"),
    [
        (None, "", "another run writes here: 'the other' \\(part 3/16\\), process"),
        ("3/16", "", "this part runs already: 'the other' \\(part 3/16\\), process"),
        ("3/8", "", "parts of another division, or with other settings, write here: 'the other'"),
        ("4/16", "other", "parts of another division, or with other settings, write here: 'the other'"),
    ],
)
def test_what_is_refused_beside_a_part(
    tmp_path: Path, part_holder: subprocess.Popen[str], part: str | None, settings: str, said: str
) -> None:
    with pytest.raises(InputError, match=said) as refused:
        take(tmp_path / "out", part, settings)
    assert f"remove {tmp_path / 'out' / PART_LOCK}" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.*")] == ["out/run.locks", f"out/{PART_LOCK}"]


def test_no_part_runs_beside_a_whole_run(tmp_path: Path, holder: subprocess.Popen[str]) -> None:
    with pytest.raises(InputError, match="another run writes here: 'the other', process"):
        take(tmp_path / "out", "0/2")
    assert list((tmp_path / "out").rglob("*.lock")) == [tmp_path / "out" / LOCK]


@pytest.mark.parametrize("part", [None, "3/16", "1/2"])
def test_a_killed_part_holds_nothing(tmp_path: Path, part_holder: subprocess.Popen[str], part: str | None) -> None:
    part_holder.kill()
    part_holder.wait()
    assert (tmp_path / "out" / PART_LOCK).exists()
    take(tmp_path / "out", part)
    assert not (tmp_path / "out" / LOCKS).exists()


def test_a_part_knows_whether_it_is_alone(tmp_path: Path, part_holder: subprocess.Popen[str]) -> None:
    with only_run(str(tmp_path / "out"), "mine", print, part=RunPart(0, 16)) as alone:
        assert not alone()
        part_holder.communicate("")
        assert alone()


def test_of_two_divisions_and_a_whole_run_at_once_one_remains(tmp_path: Path) -> None:
    parts = [None, RunPart(0, 2), RunPart(0, 3)] * 3
    have, refused, together = [], [], threading.Barrier(len(parts))
    done = threading.Event()

    def run(part: RunPart | None) -> None:
        together.wait()
        try:
            with only_run(str(tmp_path), "run", print, part=part):
                have.append(part)
                done.wait(5)
        except InputError:
            refused.append(part)
            if len(refused) == len(parts) - 1:
                done.set()

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(have), len(refused)) == (1, len(parts) - 1)


def test_a_part_that_stood_still_sees_who_began_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease was not renewed for so long that a whole run began, which has removed it."""
    monkeypatch.setattr(run_lock, "RENEWED_EVERY", 0.05)
    told = Told()
    with only_run(str(tmp_path), "mine", told, part=RunPart(3, 16)):
        monkeypatch.setattr(run_lock, "EXPIRED_AFTER", -1.0)  # as if each renewal came too late
        (tmp_path / PART_LOCK).unlink()
        whole = Lease.of_this_process("the whole")
        (tmp_path / LOCK).write_text(json.dumps(whole.__dict__))
        assert told.happened.wait(5)
    assert "stood still, and another run began: 'the whole'" in told.line


def test_turns_do_not_overlap_and_the_last_one_reads_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of 16 adds a file and writes down, slowly, which there are; who waited is spared if another one saw it."""
    monkeypatch.setattr(run_lock, "TURN_ASKED_EVERY", 0.02)
    inside, overlaps, spared = [0], [], []
    expected = " ".join(sorted(f"{number}.file" for number in range(16)))

    def found() -> str:
        return " ".join(sorted(path.name for path in tmp_path.glob("*.file")))

    def run(number: int) -> None:
        (tmp_path / f"{number}.file").touch()

        def write() -> None:
            inside[0] += 1
            overlaps.append(inside[0] > 1)
            there = found()
            time.sleep(0.2)
            (tmp_path / "account").write_text(there)
            inside[0] -= 1

        def read() -> None:
            assert f"{number}.file" in (tmp_path / "account").read_text().split()
            spared.append(number)

        in_turn(str(tmp_path), f"part {number}", write, None if number == 15 else read, print)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(16)]
    for thread in threads:
        thread.start()
        time.sleep(0.03)
    for thread in threads:
        thread.join()
    assert (tmp_path / "account").read_text() == expected
    assert True not in overlaps
    assert len(overlaps) + len(spared) == 16
    assert len(spared) > 4
    assert 15 not in spared
    assert not (tmp_path / LOCKS).exists()


def test_a_turn_that_was_lost_is_taken_again(tmp_path: Path) -> None:
    """Another part had its turn and ended while this process stood still: what was written then may be newer."""
    calls = []

    def write() -> int:
        calls.append((tmp_path / TURN).exists())
        if len(calls) == 1:
            for path in (tmp_path / LOCKS).iterdir():  # the lease, and the ticket
                path.unlink()
        return len(calls)

    assert in_turn(str(tmp_path), "mine", write, lambda: -1, print) == 2
    assert calls == [True, True]


def test_the_turn_of_a_killed_part_is_taken_over(tmp_path: Path) -> None:
    rewrite_stale(tmp_path)
    (tmp_path / LOCK).rename(tmp_path / TURN)
    assert in_turn(str(tmp_path), "mine", lambda: "written", None, print) == "written"


def test_who_waits_for_its_turn_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "TURN_ASKED_EVERY", 0.01)
    told = Told()
    thread = threading.Thread(target=in_turn, args=(str(tmp_path), "the second", lambda: None, None, told))

    def write() -> None:
        thread.start()
        assert told.happened.wait(10)

    in_turn(str(tmp_path), "the first", write, None, print)
    thread.join()
    assert told.line.startswith("waiting until another part has written the account: 'the first', process")


def test_parts_in_a_store(bucket: str) -> None:
    with only_run(bucket, "one", print, part=RunPart(0, 2)), only_run(bucket, "two", print, part=RunPart(1, 2)):
        for part in (None, "0/2", "0/3"):
            with pytest.raises(InputError, match=r"'(one|two)' .part ./2., process"):
                take(bucket, part)
        assert in_turn(bucket, "one", lambda: "written", lambda: "read", print) == "written"
    take(bucket)
    assert Folder(bucket).list(".lock", ".lease", ".ticket") == []


def test_a_lease_in_a_store_is_renewed_on_a_condition(bucket: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "RENEWED_EVERY", 0.2)
    folder, told = Folder(bucket), threading.Event()
    with only_run(bucket, "mine", lambda why: told.set()):
        first = json.loads(folder.read_text(LOCK) or "")
        until = time.monotonic() + 10
        while json.loads(folder.read_text(LOCK) or "")["renewed"] == first["renewed"]:
            assert time.monotonic() < until
            time.sleep(0.05)
        folder.write_text(LOCK, json.dumps(first | {"token": "another"}))
        assert told.wait(10)
    assert json.loads(folder.read_text(LOCK) or "")["token"] == "another"
    folder.remove(LOCK)


def test_of_many_that_take_over_in_a_store_one_has_it(bucket: str) -> None:
    """Each read the same stale lease; the condition lets one of them replace it, at whatever time the others write."""
    folder, lease = Folder(bucket), Lease("old", "gone", "gone", 1, 0.0, "old", 0.0, 0.0)
    folder.write_text(LOCK, json.dumps(lease.__dict__))
    version = version_of(folder, LOCK)
    replaced = []
    for number in range(3):
        with contextlib.suppress(ChangedMeanwhile):
            replace(folder, LOCK, str(number), version)
            replaced.append(number)
    assert replaced == [0]
    assert folder.read_text(LOCK) == "0"
    folder.remove(LOCK)
