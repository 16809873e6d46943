"""Runs over a real S3 server that fails on purpose, and what is said when a store cannot be used at all."""

from __future__ import annotations

import contextlib
import importlib.util
import itertools
import os
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import s3fs

import tasks.output_files
import tasks.records
from embedders import TimmImageEmbedder
from flows.embed import embed_dataset, main
from flows.new_shards import new_shards
from tasks.shards import find_shards
from tests.layers import embed_all
from tests.servers import Proxy, s3_server

ROOT = Path(__file__).parents[2]
TINY = ("--model-name", "test_vit.r160_in1k", "--no-pretrained", "--device", "cpu")
SECRET = "MARKED0SECRET0THAT0MUST0NOT0BE0WRITTEN"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "testing", "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
READ_TIMEOUT = {"FSSPEC_S3": '{"config_kwargs": {"read_timeout": 1}}'}


@pytest.fixture(scope="module")
def store() -> Iterator[str]:
    """The URL of an S3 server."""
    with s3_server() as url:
        yield url


def client(url: str) -> Any:
    """A file system of the tests' own, past the proxy."""
    return s3fs.S3FileSystem(
        key="testing", secret=SECRET, endpoint_url=url, skip_instance_cache=True, use_listings_cache=False
    )


class Faults:
    """Every n-th request is answered 503, by half, or never, in turn, until that is enough."""

    def __init__(self, every: int, enough: int) -> None:
        self.every, self.enough = every, enough
        self.numbers, self.kinds = itertools.count(), itertools.cycle(["503", "cut", "503", "cut", "hang"])
        self.lock = threading.Lock()

    def __call__(self, method: str, path: str) -> str | None:
        with self.lock:
            number = next(self.numbers)
            return next(self.kinds) if number % self.every == 2 and number < self.every * self.enough else None


@dataclass(frozen=True)
class Run:
    """A run that has ended: what it said and left, and where its processes listened meanwhile."""

    status: int
    said: str
    folder: Path
    proxy: Proxy
    listening: frozenset[str]


@pytest.fixture(scope="module")
def disturbed(store: str, demo_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that meets each kind of fault a few times."""
    return run_through(Faults(every=5, enough=10), store, demo_dataset, tmp_path_factory.mktemp("disturbed"))


def run_through(faults: Faults, store: str, demo_dataset: Path, folder: Path) -> Run:
    """Two workers from s3:// to s3:// through a proxy that fails, with Prefect's words on."""
    fs = client(store)
    if fs.exists("bucket"):
        fs.rm("bucket", recursive=True)
    fs.mkdir("bucket")
    fs.put([str(p) for p in sorted(demo_dataset.glob("0000[01].*"))], "bucket/data/")
    (folder / "tmp").mkdir()
    with Proxy(store, faults).running() as proxy:
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")},
            **CREDENTIALS,
            **READ_TIMEOUT,
            "AWS_ENDPOINT_URL": proxy.url,
            "PREFECT_HOME": str(folder / "prefect"),
            "PREFECT_API_KEY": SECRET,
            "TMPDIR": str(folder / "tmp"),
        }
        call = ["s3://bucket/data", "--output", "s3://bucket/out", *TINY, "--workers", "2", "--verbose"]
        with (folder / "said").open("wb") as said:
            process = subprocess.Popen(
                [sys.executable, "-m", "flows.embed", *call, "--staging-space", "1MB"],
                cwd=ROOT,
                env=environment,
                stdout=said,
                stderr=said,
            )
            listening: set[str] = set()
            deadline = time.monotonic() + 240
            while process.poll() is None:
                if time.monotonic() > deadline:
                    process.kill()
                listening |= listening_addresses(f"PREFECT_HOME={folder / 'prefect'}")
                time.sleep(0.3)
    text = (folder / "said").read_text()
    return Run(process.returncode, text, folder, proxy, frozenset(listening))


def listening_addresses(variable: str) -> set[str]:
    """The local addresses, in /proc's hexadecimal, that processes with an environment variable listen at."""
    inodes = set()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                inodes |= {os.readlink(handle) for handle in (process / "fd").iterdir()}
    lines = [
        line.split() for table in ("tcp", "tcp6") for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]
    ]
    return {line[1].partition(":")[0] for line in lines if line[3] == "0A" and f"socket:[{line[9]}]" in inodes}


def rows(fs: Any, folder: str) -> dict[str, list[dict[str, Any]]]:
    """What the merged files of an output hold, by name."""
    found = {}
    for path in fs.find(folder):
        with fs.open(path) as file:
            found[path.rpartition("/")[2]] = pq.read_table(file).to_pylist()
    return found


def test_a_store_that_fails_now_and_then_ends_in_the_undisturbed_dataset(
    disturbed: Run, store: str, demo_dataset: Path, tmp_path: Path
) -> None:
    check_dataset(disturbed, store, demo_dataset, tmp_path)


@pytest.mark.chaos
def test_a_store_that_fails_every_third_request_ends_in_the_undisturbed_dataset(
    store: str, demo_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    run = run_through(Faults(every=3, enough=10**6), store, demo_dataset, tmp_path / "run")
    check_dataset(run, store, demo_dataset, tmp_path)
    print(f"{len(run.proxy.faults)} of {len(run.proxy.requests)} requests failed")


def check_dataset(run: Run, store: str, demo_dataset: Path, tmp_path: Path) -> None:
    """Prove that a run met every kind of fault and ended in what an embedding of the local files gives."""
    assert run.status == 0, run.said
    assert {"503", "cut", "hang"} <= set(run.proxy.faults)
    embedder = TimmImageEmbedder("test_vit.r160_in1k", pretrained=False)
    shards = find_shards(str(demo_dataset), str(tmp_path))[:2]
    embed_all(shards, embedder)
    found = rows(client(store), "bucket/out/metadata")
    assert len(found) == 2
    for shard in shards:
        vectors = pq.read_table(tmp_path / shard.layer_file("image_embedding")).to_pydict()
        vector_of = dict(zip(vectors["id"], vectors["image_embedding"], strict=True))
        metadata = pq.read_table(demo_dataset / f"{shard.name}.parquet").to_pylist()
        expected = [row | {"image_embedding": vector_of[row["key"]]} for row in metadata if row["key"] in vector_of]
        assert found[f"{shard.name}.parquet"] == expected
    names = {path.removeprefix("bucket/out/") for path in client(store).find("bucket/out")}
    kinds = {"layers/image_embedding": "parquet", "metadata": "parquet", "index": "idx"}
    assert names == {f"{kind}/{shard.name}.{end}" for kind, end in kinds.items() for shard in shards} | {
        "README.md",
        "manifest.json",
        "report.html",
        "schema.parquet",
        "quarantine/image_embedding/00000.parquet",
    }


def test_nothing_stays_on_the_local_disk(disturbed: Run) -> None:
    assert len(list((disturbed.folder / "tmp").glob("shard-embed-*"))) == 1
    assert list((disturbed.folder / "tmp").glob("shard-embed-*/*")) == []


def test_the_run_listened_on_loopback_only(disturbed: Run) -> None:
    """The scheduler, the dashboard, the workers and the Prefect server."""
    assert disturbed.listening == {"0100007F"}


def test_secrets_are_written_nowhere(disturbed: Run, store: str) -> None:
    assert SECRET not in disturbed.said
    fs = client(store)
    written = {path: fs.cat_file(path) for path in fs.find("bucket/out")}
    written |= {str(p): p.read_bytes() for p in disturbed.folder.rglob("*") if p.is_file()}
    assert any(path.endswith("prefect.db") for path in written)
    assert [path for path, data in written.items() if SECRET.encode() in data] == []


def test_no_result_is_persisted(disturbed: Run) -> None:
    """Prefect would pickle them, a failed run's error too."""
    assert list((disturbed.folder / "prefect").glob("storage/*")) == []


def test_a_second_run_asks_for_footers_only(
    disturbed: Run, store: str, command: Callable[..., Any], server: str
) -> None:
    with Proxy(store).running() as proxy:
        done = command(
            *("s3://bucket/data", "--output", "s3://bucket/out", *TINY, "--json"),
            **CREDENTIALS,
            AWS_ENDPOINT_URL=proxy.url,
        )
    assert (done.status, done.manifest["shards_cached"]) == (0, 2), done.stderr
    assert not [path for _, path in proxy.requests if path.endswith(".tar")]
    assert [path for method, path in proxy.requests if method == "GET" and ".parquet" in path].count(
        "/bucket/out/layers/image_embedding/00000.parquet"
    ) <= 2  # this command plans twice: before the flow, and for the account


def test_new_shards_in_a_store_are_seen(disturbed: Run, store: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store}.items():
        monkeypatch.setenv(name, value)
    assert new_shards("s3://bucket/data", "s3://bucket/out") == []
    assert [tar.name for tar in new_shards("s3://bucket/data", "s3://bucket/nothing")] == ["00000.tar", "00001.tar"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line of a call that ends with status 2."""
    assert main([*map(str, arguments), *TINY]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.fixture
def on_s3(store: str, demo_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process with the store's address and credentials, and a small dataset in it."""
    for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": store, "AWS_EC2_METADATA_DISABLED": "true"}.items():
        monkeypatch.setenv(name, value)
    fs = client(store)
    fs.makedirs("small", exist_ok=True)
    fs.put_file(demo_dataset / "00003.tar", "small/data/00003.tar")
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.mark.usefixtures("on_s3")
def test_a_missing_bucket_or_folder_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    line = refused(capsys, "s3://nobucket/data", "--output", tmp_path / "out")
    assert "s3://nobucket/data: no such folder" in line
    line = refused(capsys, "s3://small/nothing", "--output", tmp_path / "out")
    assert "s3://small/nothing: no such folder" in line
    line = refused(capsys, "s3://small/data", "--output", "s3://nobucket/out")
    assert "s3://nobucket/out" in line
    assert "bucket does not exist" in line
    assert not (tmp_path / "out").exists()


def look_at_credentials(store: str, after: bytes) -> None:
    """Let moto look at credentials after so many requests."""
    kind = {"Content-Type": "text/plain"}
    urllib.request.urlopen(urllib.request.Request(f"{store}/moto-api/reset-auth", after, kind)).close()


def test_wrong_credentials_are_told_in_one_line(
    on_s3: pytest.MonkeyPatch, store: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    look_at_credentials(store, b"0")
    try:
        line = refused(capsys, "s3://small/data", "--output", tmp_path / "out")
    finally:
        look_at_credentials(store, b"inf")
    assert "s3://small/data" in line
    assert "AWS_ACCESS_KEY_ID" in line
    assert SECRET not in line


def test_no_credentials_are_told_in_one_line(
    on_s3: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on_s3.delenv("AWS_ACCESS_KEY_ID")
    on_s3.delenv("AWS_SECRET_ACCESS_KEY")
    on_s3.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    line = refused(capsys, "s3://small/data", "--output", tmp_path / "out")
    assert "credentials" in line
    assert "AWS_ACCESS_KEY_ID" in line


def test_a_store_that_is_not_there_is_told_in_one_line(
    on_s3: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    on_s3.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    on_s3.setenv("AWS_MAX_ATTEMPTS", "1")
    line = refused(capsys, "s3://small/data", "--output", tmp_path / "out")
    assert "http://127.0.0.1:1" in line
    assert "AWS_ENDPOINT_URL" in line


@pytest.mark.parametrize(
    "url",
    [
        f"s3://AKIA:{SECRET}@bucket/data",
        f"s3://AKIA:a/{SECRET}@bucket/data",
        f"https://user:{SECRET}@host/data",
        f"https://{SECRET}@host/data",
        f"simplecache::s3://AKIA:{SECRET}@bucket/data",
        f"https://host/data?X-Amz-Signature={SECRET}",
        f"https://host/data?token={SECRET}",
    ],
)
def test_a_secret_in_a_url_is_refused_and_not_repeated(
    capsys: pytest.CaptureFixture[str], url: str, tmp_path: Path
) -> None:
    for call in ([url, "--output", tmp_path / "out"], [tmp_path, "--output", url]):
        line = refused(capsys, *call)
        assert SECRET not in line
        assert "environment variables" in line


def test_a_missing_package_is_named_with_its_command(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    if importlib.util.find_spec("gcsfs"):
        pytest.skip("gcsfs is installed here")
    assert "pip install gcsfs" in refused(capsys, "gs://bucket/data", "--output", tmp_path / "out")


def test_an_output_that_cannot_be_written_is_refused(
    capsys: pytest.CaptureFixture[str], demo_dataset: Path, tmp_path: Path
) -> None:
    line = refused(capsys, demo_dataset, "--output", "http://127.0.0.1:1/out")
    assert "cannot be written to" in line


# --- how many requests ------------------------------------------------------------------------------------------------


def kinds(requests: list[tuple[str, str]]) -> dict[str, Counter[str]]:
    """Count requests: by shard of those that name one, and as "" of the others; each as method and folder."""
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for method, path in requests:
        path, _, query = path.partition("?")
        names = re.search(r"/([^/]+/)?(\d{5})\.(\w+)$", path)
        if "list-type" in query:
            found[""]["LIST"] += 1
        elif names is None:
            found[""][method] += 1
        else:
            found[names[2]][f"{method} {names[1]}{names[3]}"] += 1
    return dict(found)


@dataclass
class Counted:
    """Two small shards in a store, and what runs over them request before they make a report."""

    fs: Any
    proxy: Proxy
    report: dict[str, Counter[str]] = field(default_factory=dict)
    """What the report of the last run asked for."""

    def run(self) -> dict[str, Counter[str]]:
        """Embed what is left to embed; the requests, as `kinds` counts them."""
        for records in (tasks.records._held, tasks.output_files._balanced):
            records.clear()  # as in a process that has made no plan yet
        self.proxy.requests.clear()
        embedder = TimmImageEmbedder("test_vit.r160_in1k", pretrained=False)
        done = embed_dataset("s3://counted/data", "s3://counted/out", embedder, workers=1, device="cpu")
        assert (done.samples, done.shards_failed) == (128, 0), done
        written = self.proxy.requests.index(("PUT", "/counted/out/manifest.json"))
        self.report = kinds(self.proxy.requests[written + 1 :])
        return kinds(self.proxy.requests[: written + 1])


@pytest.fixture
def counted(store: str, server: str, demo_dataset: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    """The demo's first two shards; a sample of the first one ends in quarantine."""
    fs = client(store)
    fs.mkdir("counted")
    fs.put([str(path) for path in sorted(demo_dataset.glob("0000[01].*"))], "counted/data/")
    with Proxy(store).running() as proxy:
        for name, value in {**CREDENTIALS, "AWS_ENDPOINT_URL": proxy.url}.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        yield Counted(fs, proxy)
    s3fs.S3FileSystem.clear_instance_cache()


EMBEDDED = {"GET data/tar": 1, "GET data/parquet": 2, "GET image_embedding/parquet": 2, "GET index/idx": 2}
EMBEDDED |= {"PUT index/idx": 1, "PUT image_embedding/parquet": 1, "DELETE image_embedding/parquet": 1}
MERGED = {"GET data/parquet": 1, "GET image_embedding/parquet": 1, "GET metadata/parquet": 2}
MERGED |= {"PUT metadata/parquet": 1, "DELETE unmatched/parquet": 1}
LOOKED_AT = {"GET data/parquet": 1}
"""Of the first 64 shards that are left to embed: whether their metadata fit."""
FOUND_DONE = {"GET image_embedding/parquet": 1, "GET index/idx": 1, "GET metadata/parquet": 1}
WITH_QUARANTINE = {"GET image_embedding/parquet": 1}
ONCE = {"LIST": 40, "HEAD": 12, "GET": 30, "PUT": 30, "DELETE": 3}
"""Whatever the shards, as long as they are few; GET and PUT renew the lock while the run goes on."""


def most(*parts: dict[str, int]) -> Counter[str]:
    """The sum of some requests."""
    return sum(map(Counter, parts), Counter[str]())


def test_requests_per_shard_are_bounded(counted: Counted) -> None:
    """The table in docs/remote-stores.md."""
    first = counted.run()
    whole = most(EMBEDDED, MERGED, LOOKED_AT)
    quarantined = most(whole, WITH_QUARANTINE, WITH_QUARANTINE, {"PUT image_embedding/parquet": 1})
    assert first["00001"] <= whole, first["00001"]
    assert first["00000"] <= quarantined, first["00000"]
    assert first[""] <= Counter(ONCE), first[""]
    assert counted.report["00001"]["GET image_embedding/parquet"] <= 5  # vectors, and the ids of pictures

    idle = counted.run()
    assert idle["00001"] <= Counter(FOUND_DONE), idle["00001"]
    assert idle["00000"] <= most(FOUND_DONE, WITH_QUARANTINE), idle["00000"]
    assert idle[""] <= Counter({"LIST": 12, "HEAD": 3, "GET": 6, "PUT": 6, "DELETE": 3}), idle[""]

    counted.fs.rm_file("counted/out/layers/image_embedding/00001.parquet")
    resumed = counted.run()
    assert resumed["00000"] <= most(FOUND_DONE, WITH_QUARANTINE), resumed["00000"]
    again = most(EMBEDDED, LOOKED_AT, FOUND_DONE, {"GET metadata/parquet": 2})  # as before: looked at, not merged
    assert resumed["00001"] <= again, resumed["00001"]
    assert resumed[""] <= Counter(ONCE), resumed[""]
