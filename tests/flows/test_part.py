"""Parts of a run: real processes side by side over one output, on a disk and in a store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

from flows.config import EmbedConfig
from flows.embed import _alone as alone_in
from flows.embed import main
from tasks.manifest import read_manifest
from tasks.run_lock import LOCKS, only_run
from tasks.run_part import RunPart
from tasks.storage.folder import Folder
from tests.servers import s3_server

from .conftest import ROOT, img2dataset

SHARDS, FETCHED = 5, 8
FAULTY = ("--embedder", "tests.faulty:Faulty", "--device", "cpu", "--workers", "1")


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Five shards, one of them with a column more: what is one schema depends on all."""
    img2dataset(tmp_path / "data", SHARDS)
    table = pq.read_table(tmp_path / "data/00003.parquet")
    pq.write_table(table.add_column(0, "more", table["width"]), tmp_path / "data/00003.parquet")
    return tmp_path / "data"


@dataclass
class Parts:
    """Starts parts as processes of their own, which wait in each shard until it is released."""

    folder: Path
    dataset: str
    output: str
    environment: dict[str, str] = field(default_factory=dict)
    processes: list[subprocess.Popen[str]] = field(default_factory=list)

    def start(self, part: str, *options: str) -> subprocess.Popen[str]:
        """Start one."""
        gate = self.folder / "released"
        gate.mkdir(exist_ok=True)
        variables = {k: v for k, v in os.environ.items() if k != "PREFECT_API_URL"} | self.environment
        variables |= {"FAULT": f"waits:{gate}", "PREFECT_HOME": str(self.folder / "prefect")}
        call = ["-m", "flows.embed", self.dataset, "--output", self.output, *FAULTY, "--part", part, *options]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            [sys.executable, *call],
            cwd=ROOT,
            env=variables,
            stdout=pipe,
            stderr=pipe,
            text=True,
            start_new_session=True,
        )
        self.processes.append(process)
        return process

    def release(self, *shards: int) -> None:
        """Let the parts embed some shards."""
        for shard in shards:
            (self.folder / "released" / f"{shard:05}").touch()

    def wait_for_locks(self, *parts: int) -> None:
        """Wait until so many parts run."""
        self.wait_until(lambda: {int(lock.partition("-")[0]) for lock in self.locks()} == set(parts))

    def wait_until(self, happened: Callable[[], bool]) -> None:
        until = time.monotonic() + 200
        while not happened():
            for process in self.processes:
                assert process.poll() in (None, 0, -signal.SIGKILL), process.communicate()
            assert time.monotonic() < until
            time.sleep(0.1)

    def locks(self) -> list[str]:
        """The names of the leases of parts."""
        return [file.name for file in Folder(f"{self.output}/{LOCKS}").list(".lock")]

    def call(self, *options: str) -> list[str]:
        """A command line over the same output."""
        return [self.dataset, "--output", self.output, *FAULTY, *options]


@pytest.fixture
def parts(tmp_path: Path, dataset: Path) -> Iterator[Parts]:
    """Parts over an output on a disk."""
    with_them = Parts(tmp_path, str(dataset), str(tmp_path / "out"))
    yield with_them
    _end(with_them)


def _end(parts: Parts) -> None:
    for process in parts.processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_two_parts_side_by_side_one_of_them_killed(
    server: str, parts: Parts, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other one goes on and ends well; the killed one, called again, does what is missing, and all is accounted."""
    first, second = parts.start("0/2", "--json"), parts.start("1/2")
    parts.wait_for_locks(0, 1)
    for options in ((), ("--part", "1/3"), ("--part", "0/2"), ("--part", "0/2", "--on-error", "null")):
        assert main(parts.call(*options)) == 2
        assert "tests.faulty:Faulty' (part" in (said := capsys.readouterr().err), said
        assert said.startswith("error: ")
        assert said.count("\n") == 1
    parts.release(1)
    embedded = Path(parts.output) / "layers/image_embedding/00001.parquet"
    until = time.monotonic() + 20  # a loaded machine may not have come to it; the test goes on all the same
    while not embedded.exists() and time.monotonic() < until:
        time.sleep(0.05)
    os.killpg(second.pid, signal.SIGKILL)
    second.communicate()
    was_embedded = embedded.exists()
    parts.release(0, 2, 4)
    said, complaint = first.communicate(timeout=200)
    assert first.returncode == 0, complaint
    account = json.loads(said)
    own = {"part": "0/2", "shards": 3, "shards_done": 3, "samples": 24, "embedded": 24, "quarantined": 0}
    assert account["part"] == own
    assert (account["shards"], account["shards_failed"], account["shards_missing"]) == (SHARDS, 0, 2)
    assert account["left_out"] == (["00003"] if was_embedded else ["00001", "00003"])
    assert (account["samples"], account["failures"]) == (FETCHED * (4 if was_embedded else 3), {})
    assert read_manifest(parts.output).model_dump(exclude={"output", "dataset", "metadata"}) == {
        name: value for name, value in account.items() if name not in {"output", "dataset", "metadata"}
    }
    assert parts.locks() != []  # the killed one's

    parts.release(3)
    assert main(parts.call("--part", "1/2")) == 0
    said = capsys.readouterr().err
    assert "part 1 of 2: 2 of 5 shards; 16 samples = 16 embedded + 0 quarantined\n40 samples = 40 emb" in said, said
    manifest = read_manifest(parts.output)
    assert (manifest.shards_missing, manifest.left_out, manifest.samples) == (0, [], FETCHED * SHARDS)
    assert manifest.part is not None
    assert manifest.part.shards_done == 2
    left = {path.name for path in Path(parts.output).iterdir()}
    folders = {"index", "layers", "metadata", "unmatched"}
    assert left == folders | {"README.md", "manifest.json", "report.html", "schema.parquet"}
    assert [path for path in Path(parts.output).rglob("*") if path.name.startswith(".")] == []
    # A whole run finds the same schema and columns in all files: nothing is joined again.
    assert main(parts.call()) == 0
    assert "5 shards, all done already: nothing to embed, nothing to merge" in capsys.readouterr().err
    assert read_manifest(parts.output).part is None
    assert {tuple(pq.read_schema(path).names) for path in Path(parts.output, "metadata").iterdir()} == {
        tuple(pq.read_schema(Path(parts.output, "schema.parquet")).names)
    }


def test_two_parts_over_a_store(
    tmp_path: Path, dataset: Path, server: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with s3_server() as url:
        variables = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
        variables["AWS_ENDPOINT_URL"] = url
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()  # of servers that are gone
        fs = s3fs.S3FileSystem(endpoint_url=url)
        fs.mkdir("bucket")
        fs.put([str(path) for path in sorted(dataset.glob("0000[123].*"))], "bucket/data/")
        parts = Parts(tmp_path, "s3://bucket/data", "s3://bucket/out", variables)
        try:
            both = [parts.start(f"{number}/2", "--json") for number in range(2)]
            parts.wait_for_locks(0, 1)
            assert main(parts.call()) == 2
            assert "another run writes here" in capsys.readouterr().err
            parts.release(1, 2, 3)
            accounts = []
            for process in both:
                said, complaint = process.communicate(timeout=200)
                assert process.returncode == 0, complaint
                accounts.append(json.loads(said))
        finally:
            _end(parts)
        last = read_manifest(parts.output)
        assert (last.shards, last.shards_missing, last.samples) == (3, 0, 3 * FETCHED)
        assert [account["part"]["shards_done"] for account in accounts] == [2, 1]
        assert sorted(account["shards_missing"] for account in accounts)[0] == 0
        assert Folder(parts.output).list(".lock", ".lease", ".ticket") == []
        assert len(fs.ls("bucket/out/metadata")) == 3
    s3fs.S3FileSystem.clear_instance_cache()


def test_a_part_that_fails_and_one_that_does_not(
    server: str, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In place, one after the other: the second one's status is its own, and its account names what the first lacks."""
    for extra in dataset.glob("0000[34].*"):
        extra.unlink()
    shutil.copy2(dataset / "00000.parquet", tmp_path / "before.parquet")
    (dataset / "00001.tar").write_bytes((dataset / "00001.tar").read_bytes()[:3000])

    def run(part: str) -> tuple[int, dict[str, Any]]:
        call = [str(dataset), "--output", str(tmp_path / "out"), *FAULTY, "--in-place", "--json", "--part", part]
        status = main(call)
        return status, json.loads(capsys.readouterr().out)

    status, first = run("1/2")
    assert (status, list(first["failures"]), first["shards_failed"], first["shards_missing"]) == (1, ["00001"], 1, 3)
    assert "--part 1/2" in first["finish_with"]
    status, second = run("0/2")
    assert (status, second["failures"], second["shards_failed"], second["finish_with"]) == (0, {}, 0, "")
    assert (second["shards_missing"], second["left_out"]) == (1, ["00001"])
    assert second["failures_of_other_parts"] == first["failures"]
    assert second["part"]["shards_done"] == 2
    page = (tmp_path / "out/report.html").read_text()
    assert "Failed: 00001: 00001.tar" in page
    assert "3, 0 done before, 0 failed, 1 not done yet by other parts" in page
    columns = pq.read_schema(tmp_path / "before.parquet").names
    assert pq.read_schema(dataset / "00000.parquet").names == [*columns, "image_embedding"]
    assert "image_embedding" not in pq.read_schema(dataset / "00001.parquet").names
    assert not (dataset / LOCKS).exists()
    # More parts than shards: nothing to do is no failure.
    status, none = run("7/8")
    assert (status, none["part"]["shards"], none["shards_missing"]) == (0, 0, 1)
    assert none["failures_of_other_parts"] == first["failures"]


def test_half_written_files_stay_while_another_part_may_write_them(tmp_path: Path) -> None:
    """Not every network file system can tell whether another machine has a file open."""
    half = tmp_path / "layers/image_embedding" / f".00001.parquet.{'0' * 32}.tmp"
    half.parent.mkdir(parents=True)
    half.touch()
    config = EmbedConfig(dataset=str(tmp_path / "data"), output=str(tmp_path), part="0/2")
    with only_run(str(tmp_path), "other", print, part=RunPart(1, 2), settings=config.common_to_parts):
        with alone_in(config, (), print):
            pass
        assert half.exists()
    with alone_in(config, (), print):
        assert not half.exists()
