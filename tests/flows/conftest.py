"""A real Prefect server for the whole session, and the command line as a person runs it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from embedders import TimmImageEmbedder
from flows.demo_data import load_photograph
from flows.embed import embed_dataset
from flows.server import prefect_server
from tasks.manifest import Manifest

ROOT = Path(__file__).parents[2]
TINY = "test_vit.r160_in1k"
IMG2DATASET: tuple[str, ...] = ("url", "caption", "key", "status", "error_message", "width", "height")
IMG2DATASET += ("original_width", "original_height", "exif", "sha256")
"""The columns that img2dataset 1.45 writes, in its order."""


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A Prefect server with a database of its own; its API's URL."""
    home = tmp_path_factory.mktemp("prefect")
    before = dict(os.environ)
    os.environ["PREFECT_HOME"] = str(home)
    os.environ["PREFECT_API_DATABASE_CONNECTION_URL"] = f"sqlite+aiosqlite:///{home}/prefect.db"
    try:
        with prefect_server():
            yield os.environ["PREFECT_API_URL"]
    finally:
        os.environ.clear()
        os.environ.update(before)


def processes_with(variable: str) -> list[tuple[int, str]]:
    """The id and command of all processes, children of children too, that have inherited an environment variable."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended
            if variable.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((int(process.name), (process / "cmdline").read_text()))
    return found


@dataclass(frozen=True)
class Finished:
    """A command that has ended."""

    status: int
    stdout: str
    stderr: str

    @property
    def manifest(self) -> dict[str, Any]:
        """The manifest it printed with --json, and nothing else."""
        return dict(json.loads(self.stdout))


@pytest.fixture
def command() -> Callable[..., Finished]:
    """Run `python -m flows.embed` with some arguments and wait for it."""

    def run(*arguments: object, **environment: str) -> Finished:
        done = subprocess.run(
            [sys.executable, "-m", "flows.embed", *map(str, arguments)],
            cwd=ROOT,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        return Finished(done.returncode, done.stdout, done.stderr)

    return run


def embed(dataset: Path, output: Path, **parameters: Any) -> Manifest:
    embedder = TimmImageEmbedder(TINY, pretrained=False)
    return embed_dataset(str(dataset), str(output), embedder, workers=1, device="cpu", **parameters)


def img2dataset(folder: Path, shards: int = 2, rows: int = 12) -> Path:
    """A dataset as img2dataset leaves it: tar, parquet and _stats.json; every third download has failed."""
    folder.mkdir()
    photograph = load_photograph("skimage", "data/chelsea.png").resize((96, 64))
    for shard in range(shards):
        table = []
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for row in range(rows):
                key, fetched = f"{shard:05}{row:04}", row % 3 != 2
                size = (96, 64, 451, 300) if fetched else (None,) * 4
                error = None if fetched else "HTTP Error 404: Not Found"
                status = "success" if fetched else "failed_to_download"
                exif = "{}" if fetched else None
                sha256 = f"{row:064x}"
                values = (f"https://x.test/{key}.jpg", f"cat {row}", key, status, error, *size, exif, sha256)
                table.append(dict(zip(IMG2DATASET, values, strict=True)))
                if not fetched:
                    continue
                out = io.BytesIO()
                photograph.rotate(row * 20).save(out, "JPEG")
                members = {"jpg": out.getvalue(), "txt": b"cat", "json": json.dumps(table[-1]).encode()}
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
        text, number = pa.string(), pa.int32()
        types = (text, text, text, text, text, number, number, number, number, text, text)
        schema = pa.schema(list(zip(IMG2DATASET, types, strict=True)))
        pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / f"{shard:05}.parquet")
        stats = {"count": rows, "successes": rows - rows // 3, "failed_to_download": rows // 3}
        (folder / f"{shard:05}_stats.json").write_text(json.dumps(stats))
    return folder


@pytest.fixture(scope="session")
def crawl(server: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with such a dataset in data/, embedded into out/; not to be changed."""
    folder = tmp_path_factory.mktemp("crawl")
    img2dataset(folder / "data")
    manifest = embed(folder / "data", folder / "out")
    assert (manifest.embedded, manifest.quarantined, manifest.rows, manifest.shards_failed) == (16, 0, 16, 0)
    return folder
