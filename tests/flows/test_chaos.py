"""Every fault that a run has to survive, really done; after it the dataset equals, row for row, an undisturbed run's.

`make chaos` prints what each cost. A sample is done twice if its vector was written, was whole, and was written
again all the same; "seconds" are from the fault to the end of the run that has the whole dataset.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from .conftest import ROOT, processes_with

pytestmark = pytest.mark.chaos
SHARDS, SAMPLES = 8, 64
FAULTY = ("--embedder", "tests.faulty:Faulty", "--device", "cpu", "--workers", "2")
PLAIN = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu", "--workers", "2")
SECONDS_TO_STOP = 10.0


@pytest.fixture(scope="session")
def dataset(demo_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight shards of 64 photographs: the demo's, twice."""
    folder = tmp_path_factory.mktemp("chaos") / "data"
    folder.mkdir()
    for number in range(SHARDS):
        for ending in ("tar", "parquet"):
            shutil.copy2(demo_dataset / f"{number % 4:05}.{ending}", folder / f"{number:05}.{ending}")
    return folder


@dataclass
class Run:
    """A run of the command line in a session of its own, as a terminal or a batch system starts it."""

    output: Path
    process: subprocess.Popen[bytes]
    mark: str
    log: Path

    @property
    def said(self) -> str:
        """What it has said so far."""
        return self.log.read_text()

    def wait(self, timeout: float = 240) -> int:
        """Its exit status."""
        return self.process.wait(timeout)

    def wait_until(self, happened: Callable[[], Any], timeout: float = 120) -> None:
        """Wait for something that it does."""
        until = time.monotonic() + timeout
        while not happened():
            assert self.process.poll() is None, self.said
            assert time.monotonic() < until, self.said
            time.sleep(0.02)

    def wait_for_shards(self, count: int) -> None:
        """Wait until it has written the embeddings of so many shards."""
        self.wait_until(lambda: len(list((self.output / "layers/image_embedding").glob("[!.]*.parquet"))) >= count)

    def wait_for_server(self) -> None:
        """Wait until it has started a Prefect server."""
        self.wait_until(lambda: self.children("local_server"))

    def signal_group(self, number: int) -> None:
        """Send a signal to all that the terminal would send it to."""
        os.killpg(self.process.pid, number)

    def children(self, word: str) -> list[int]:
        """The ids of the processes it has started, by a word of their command."""
        return [pid for pid, command in processes_with(self.mark) if word in command and pid != self.process.pid]

    def workers(self) -> list[int]:
        """The ids of its Dask workers."""
        return self.children("spawn_main")

    def wait_until_gone(self, timeout: float = 10) -> None:
        """Prove that nothing it has started is left."""
        until = time.monotonic() + timeout
        while left := processes_with(self.mark):
            assert time.monotonic() < until, left
            time.sleep(0.05)


@dataclass
class Chaos:
    """Starts runs, compares what they leave, and notes what it cost."""

    folder: Path
    dataset: Path
    reference: Path
    runs: int = 0
    started: list[Run] = field(default_factory=list)

    def start(self, output: Path, *options: str, **environment: str) -> Run:
        """Start the command line."""
        self.runs += 1
        mark = f"CHAOS={self.folder.name}-{self.runs}"
        log = self.folder / f"{self.runs}.log"
        variables = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | environment
        variables |= {"PREFECT_HOME": str(self.folder / "prefect"), "CHAOS": mark.partition("=")[2]}
        with log.open("wb") as out:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.embed", str(self.dataset), "--output", str(output), *options],
                cwd=ROOT,
                env=variables,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.started.append(run := Run(output, process, mark, log))
        return run

    def finish(self, output: Path, *options: str, **environment: str) -> dict[str, Any]:
        """One more run of the same command; its manifest."""
        run = self.start(output, *(options or FAULTY), **environment)
        assert run.wait() == 0, run.said
        return manifest(output)

    def lost(self, output: Path) -> int:
        """The samples that differ from the undisturbed run's or are not there; none may be there that should not."""
        lost = 0
        for number in range(SHARDS):
            name = f"metadata/{number:05}.parquet"
            expected = pq.read_table(self.reference / name)
            if not (output / name).exists():
                lost += len(expected)
                continue
            found = pq.read_table(output / name)
            assert found.drop_columns("image_embedding") == expected.drop_columns("image_embedding")
            lost += int((np.abs(matrix(found) - matrix(expected)).max(axis=1) > 1e-5).sum())
        assert len(list((output / "metadata").rglob("*.parquet"))) == SHARDS
        assert leftovers(output) == []
        return lost

    def close(self) -> None:
        """Leave nothing behind, whatever has failed."""
        for run in self.started:
            for pid, _ in processes_with(run.mark):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            run.process.wait()


@pytest.fixture(scope="session")
def reference(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("reference")
    chaos = Chaos(folder, dataset, folder / "out")
    try:
        assert chaos.finish(folder / "out", *PLAIN)["embedded"] == SHARDS * SAMPLES - 4
    finally:
        chaos.close()
    return folder / "out"


@pytest.fixture
def chaos(dataset: Path, reference: Path, tmp_path: Path) -> Iterator[Chaos]:
    """Starts runs in the test's folder; none is left after it."""
    made = Chaos(tmp_path, dataset, reference)
    yield made
    made.close()


Tell = Callable[[str, int, int, int, float], None]


@pytest.fixture
def tell(request: pytest.FixtureRequest) -> Tell:
    """Note a line of the table: fault, times tried, samples lost, samples done twice, seconds to recover."""

    def note(fault: str, tried: int, lost: int, twice: int, seconds: float) -> None:
        request.config.stash[CHAOS_TABLE].append((fault, tried, lost, twice, seconds))
        assert (lost, twice) == (0, 0)

    from tests.conftest import CHAOS_TABLE

    return note


def matrix(table: Any) -> np.ndarray:
    """The vectors of a merged table."""
    return table.column("image_embedding").combine_chunks().values.to_numpy().reshape(len(table), -1)


def manifest(output: Path) -> dict[str, Any]:
    """The account that a run has left."""
    return dict(json.loads((output / "manifest.json").read_text()))


def leftovers(output: Path) -> list[str]:
    """Temporary files and locks."""
    return [str(path) for path in output.rglob("*") if path.name.startswith(".") or path.name == "run.locks"]


def written(output: Path) -> dict[str, tuple[int, int]]:
    """Every embeddings file, by what changes when it is written again."""
    stats = {path.name: path.stat() for path in (output / "layers/image_embedding").glob("[!.]*.parquet")}
    return {name: (stat.st_ino, stat.st_mtime_ns) for name, stat in stats.items()}


def twice(before: dict[str, tuple[int, int]], output: Path) -> int:
    """The samples in files that were there, whole, and were written again."""
    after = written(output)
    return SAMPLES * sum(after.get(name) != stamp for name, stamp in before.items())


def test_a_worker_killed(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    seconds = lost = again = 0.0
    for number in range(3):
        output = tmp_path / f"out{number}"
        run = chaos.start(output, *FAULTY, FAULT="slow:0.3")
        run.wait_for_shards(1 + number)
        before, fault = written(output), time.monotonic()
        os.kill(run.workers()[number % 2], signal.SIGKILL)
        assert run.wait() == 0, run.said
        seconds = max(seconds, time.monotonic() - fault)
        lost, again = lost + chaos.lost(output), again + twice(before, output)
        run.wait_until_gone()
    tell("a worker killed (SIGKILL) in the middle of a shard", 3, int(lost), int(again), seconds)


def test_a_shard_that_kills_its_worker_again_and_again(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    run = chaos.start(tmp_path / "out", *FAULTY, FAULT="dies:00003")
    assert run.wait() == 1, run.said
    account = manifest(tmp_path / "out")
    assert list(account["failures"]) == ["00003"]
    assert "worker died" in account["failures"]["00003"]
    assert (account["shards_failed"], account["samples"]) == (1, (SHARDS - 1) * SAMPLES)
    assert account["finish_with"] in run.said
    before, fault = written(tmp_path / "out"), time.monotonic()
    assert chaos.finish(tmp_path / "out")["shards_cached"] == SHARDS - 1
    seconds = time.monotonic() - fault
    tell(
        "the same worker killed again and again by one shard",
        1,
        chaos.lost(tmp_path / "out"),
        twice(before, tmp_path / "out"),
        seconds,
    )


def test_a_shard_that_hangs(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    run = chaos.start(tmp_path / "out", *FAULTY, "--shard-timeout", "3", FAULT="hangs:00005")
    assert run.wait() == 1, run.said
    account = manifest(tmp_path / "out")
    assert list(account["failures"]) == ["00005"]
    assert "hangs" in account["failures"]["00005"]
    assert "--shard-timeout 3" in account["finish_with"]
    before, fault = written(tmp_path / "out"), time.monotonic()
    assert chaos.finish(tmp_path / "out")["shards_cached"] == SHARDS - 1
    seconds = time.monotonic() - fault
    tell("a shard that hangs in C code", 1, chaos.lost(tmp_path / "out"), twice(before, tmp_path / "out"), seconds)


def test_the_whole_process_killed_at_random_moments(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    moments, wanted = random.Random(4), 20
    begun = time.monotonic()
    run = chaos.start(tmp_path / "measured", *FAULTY, FAULT="slow:0.3")
    assert run.wait() == 0
    whole = time.monotonic() - begun
    lost = again = tried = outputs = 0
    seconds = 0.0
    while tried < wanted:
        output = tmp_path / f"out{outputs}"
        outputs += 1
        while tried < wanted:
            before = written(output)
            run = chaos.start(output, *FAULTY, FAULT="slow:0.3")
            with contextlib.suppress(subprocess.TimeoutExpired):
                run.process.wait(moments.uniform(0.1, whole))
            if run.process.poll() is not None:
                assert run.process.returncode == 0, run.said
                break
            run.process.kill()  # the one process: its children have to notice by themselves
            fault = time.monotonic()
            tried += 1
            run.process.wait()
            run.wait_until_gone()
            again += twice(before, output)
        before = written(output)
        chaos.finish(output)
        seconds = max(seconds, time.monotonic() - fault)
        lost, again = lost + chaos.lost(output), again + twice(before, output)
    tell("the whole process killed (SIGKILL) at random moments", tried, lost, again, seconds)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_told_to_stop(chaos: Chaos, tmp_path: Path, tell: Tell, number: signal.Signals, status: int) -> None:
    output, seconds, again, tried = tmp_path / "out", 0.0, 0, 3
    for attempt in range(tried):
        before = written(output)
        run = chaos.start(output, *FAULTY, FAULT="slow:1")
        if attempt == 0:
            run.wait_for_server()
        else:
            run.wait_for_shards(len(before) + 1)
        told = time.monotonic()
        if number == signal.SIGINT:
            run.signal_group(number)
        else:
            run.process.send_signal(number)
        assert run.wait(SECONDS_TO_STOP) == status, run.said
        run.wait_until_gone(max(0.1, SECONDS_TO_STOP - (time.monotonic() - told)))
        assert "Traceback" not in run.said
        assert run.said.splitlines()[-1].startswith("stopped"), run.said
        assert leftovers(output) == []
        again += twice(before, output)
    before, fault = written(output), time.monotonic()
    chaos.finish(output)
    seconds = time.monotonic() - fault
    tell(f"{number.name}", tried, chaos.lost(output), again + twice(before, output), seconds)


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[Path]:
    """A file system of its own."""
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if made.returncode:
        pytest.skip(f"cannot mount a tmpfs here: {made.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_the_disk_full(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    with small_disk(tmp_path / "disk", "140k") as disk:
        output = disk / "out"
        run = chaos.start(output, *FAULTY)
        assert run.wait() == 1, run.said
        assert "No space left on device" in run.said
        assert leftovers(output) == []
        before, fault = written(output), time.monotonic()
        assert 0 < len(before) < SHARDS
        subprocess.run(["mount", "-o", "remount,size=100m", str(disk)], check=True)
        assert chaos.finish(output)["shards_cached"] == len(before)
        seconds = time.monotonic() - fault
        tell("the disk full", 1, chaos.lost(output), twice(before, output), seconds)


def test_an_output_that_is_read_only(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    with small_disk(tmp_path / "disk", "100m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = chaos.start(disk / "out", *FAULTY)
        assert run.wait() == 2
        assert "cannot be written to" in run.said
        assert len(run.said.splitlines()) == 1
        fault = time.monotonic()
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        chaos.finish(disk / "out")
        tell("a read-only output", 1, chaos.lost(disk / "out"), 0, time.monotonic() - fault)


def test_a_tar_replaced_while_the_run_goes_on(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    data = tmp_path / "data"
    shutil.copytree(chaos.dataset, data)
    last = data / f"{SHARDS - 1:05}.tar"
    shutil.move(last, tmp_path / "right.tar")
    other_images(tmp_path / "right.tar", data / "00000.tar", last)
    chaos.dataset = data
    run = chaos.start(tmp_path / "out", *FAULTY, FAULT="slow:1")
    run.wait_for_shards(1)
    fault = time.monotonic()
    shutil.move(tmp_path / "right.tar", last)
    assert run.wait() == 1, run.said
    assert list(manifest(tmp_path / "out")["failures"]) == [last.stem]
    assert "replaced" in run.said
    before = written(tmp_path / "out")
    assert last.stem + ".parquet" not in before
    chaos.finish(tmp_path / "out")
    seconds = time.monotonic() - fault
    tell(
        "a tar replaced while the run goes on",
        1,
        chaos.lost(tmp_path / "out"),
        twice(before, tmp_path / "out"),
        seconds,
    )


def other_images(tar: Path, of: Path, to: Path) -> None:
    """A tar with the names of one and, turned round, the images of another."""
    with tarfile.open(tar) as named, tarfile.open(of) as pictured, tarfile.open(to, "w") as made:
        images = [pictured.extractfile(m).read() for m in pictured if m.name.endswith(".jpg")][::-1]  # type: ignore[union-attr]
        for member in named.getmembers():
            data = named.extractfile(member).read()  # type: ignore[union-attr]
            if member.name.endswith(".jpg") and images:
                data = images.pop()

            member.size = len(data)
            made.addfile(member, io.BytesIO(data))


def test_the_local_prefect_server_killed(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    run = chaos.start(output, *FAULTY, FAULT="slow:1")
    run.wait_for_shards(1)
    (server,) = run.children("local_server")
    before, fault = written(output), time.monotonic()
    os.kill(server, signal.SIGKILL)
    assert run.wait() == 0, run.said
    seconds = time.monotonic() - fault
    run.wait_until_gone()
    tell("the local Prefect server killed", 1, chaos.lost(output), twice(before, output), seconds)


def test_two_runs_at_once(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    output = tmp_path / "out"
    first = chaos.start(output, *FAULTY, FAULT="slow:0.5")
    first.wait_for_shards(1)
    before, fault = written(output), time.monotonic()
    second = chaos.start(output, *FAULTY)
    assert second.wait() == 2
    assert f"process {first.process.pid} on" in second.said
    assert len(second.said.splitlines()) == 1
    assert first.wait() == 0, first.said
    tell("two runs over one output at once", 1, chaos.lost(output), twice(before, output), time.monotonic() - fault)


def damage_deleted(output: Path) -> None:
    (output / "layers/image_embedding/00000.parquet").unlink()


def damage_truncated(output: Path) -> None:
    path = output / "layers/image_embedding/00001.parquet"
    path.write_bytes(path.read_bytes()[:-200])


def damage_flipped_footer(output: Path) -> None:
    flip(output / "layers/image_embedding/00002.parquet", -60)


def damage_flipped_page(output: Path) -> None:
    flip(output / "layers/image_embedding/00003.parquet", 9000)


def damage_foreign(output: Path) -> None:
    shutil.copy(output / "quarantine/image_embedding/00000.parquet", output / "layers/image_embedding/00004.parquet")


def damage_swapped(output: Path) -> None:
    one, two = output / "layers/image_embedding/00005.parquet", output / "layers/image_embedding/00006.parquet"
    held = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(held)


def damage_quarantine(output: Path) -> None:
    (output / "quarantine/image_embedding/00000.parquet").write_bytes(b"PAR1")


def damage_index(output: Path) -> None:
    path = output / "index/00007.idx"
    path.write_text(path.read_text().replace("v1.2 64", "v1.2 63", 1))


DAMAGES = {
    damage_deleted: ["00000"],
    damage_truncated: ["00001"],
    damage_flipped_footer: ["00002"],
    damage_flipped_page: ["00003"],
    damage_foreign: ["00004"],
    damage_swapped: ["00005", "00006"],
    damage_quarantine: ["00000"],
    damage_index: [],  # is made again, and agrees then
}


def flip(path: Path, at: int) -> None:
    """Turn one bit of a file."""
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def test_outputs_damaged_between_runs(chaos: Chaos, tmp_path: Path, tell: Tell) -> None:
    lost = again = 0
    seconds = 0.0
    for damage, shards in DAMAGES.items():
        output = tmp_path / damage.__name__
        shutil.copytree(chaos.reference, output)
        damage(output)
        shutil.rmtree(output / "metadata")
        untouched = {name: stamp for name, stamp in written(output).items() if name.partition(".")[0] not in shards}
        damaged = {name: stamp for name, stamp in written(output).items() if name.partition(".")[0] in shards}
        fault = time.monotonic()
        chaos.finish(output, *PLAIN)  # as the reference was made
        seconds = max(seconds, time.monotonic() - fault)
        assert twice(damaged, output) == SAMPLES * len(damaged), damage.__name__
        lost, again = lost + chaos.lost(output), again + twice(untouched, output)
    tell("outputs deleted, cut, bit-flipped, foreign, swapped", len(DAMAGES), lost, again, seconds)
