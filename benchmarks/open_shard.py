"""`python -m benchmarks.open_shard [--against FOLDER]`: seconds and memory of opening a shard.

With `--against` the same is measured of the code in another folder, such as an earlier commit's, turn by turn. Every
figure is of a process of its own, since memory that was used once is hardly ever given back.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

T = TypeVar("T")

USUAL = 10_000
"""Samples of the shard whose images are as large as a web crawl's."""
IMAGE_BYTES = 55_000
TINY = (1_000, 100_000, 1_000_000)
"""Samples of shards with tiny images."""


def jpeg(size: int) -> bytes:
    """Return a JPEG of about so many bytes, or of 8 x 8 pixels for 0."""
    from PIL import Image

    side = max(8, int((size / 0.82) ** 0.5))
    noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).save(out, "JPEG", quality=85)
    return out.getvalue()


def write_shard(path: Path, samples: int, image: bytes) -> None:
    """Write a tar of samples with an image and a json that holds the key and a caption."""
    with open(path, "wb", buffering=1 << 20) as file:
        for number in range(samples):
            described = json.dumps({"key": f"{number:09}", "caption": "a photograph of a cat", "width": 8}).encode()
            for extension, data in (("jpg", image), ("json", described)):
                member = tarfile.TarInfo(f"{number:09}.{extension}")
                member.size = len(data)
                file.write(member.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % 512))
        file.write(bytes(1024))


class Peak(threading.Thread):
    """The most anonymous memory that this process has, looked at every few milliseconds.

    Attributes:
        began: What it had when this was made, in kB.
        most: The most since then, in kB.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.began = self.most = _anonymous()

    def run(self) -> None:
        """Look, until the process ends."""
        while True:
            self.most = max(self.most, _anonymous())
            time.sleep(0.005)


def _anonymous() -> int:
    """This process's anonymous memory in kB."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0])


def measure(path: str, id_col: str) -> dict[str, Any]:
    """Index and describe a tar in this process; seconds by stage, and MB by which its memory grew."""
    from embedders.tar import map_tar, read_tar_file
    from embedders.tar_index import format_index, parse_index
    from embedders.webdataset import describe

    with tempfile.TemporaryDirectory() as folder:  # what is done once in a process is not this shard's
        write_shard(Path(folder, "small.tar"), 64, jpeg(0))
        data = map_tar(Path(folder, "small.tar"))
        describe(data, read_tar_file(Path(folder, "small.tar"), "small.tar"), id_col, headers=True)
    peak = Peak()
    peak.start()
    seconds: dict[str, float] = {}

    def timed(stage: str, function: Callable[..., T], *args: Any, **options: Any) -> T:
        began = time.perf_counter()
        result = function(*args, **options)
        seconds[stage] = time.perf_counter() - began
        return result

    data = map_tar(path)
    index = timed("index", read_tar_file, path, path)
    timed("ids", describe, data, index, id_col)
    samples = timed("ids and headers", describe, data, index, id_col, headers=True)
    opening = peak.most
    del index
    kept = _anonymous()
    sent = timed("pickle", pickle.dumps, samples)
    timed("unpickle", pickle.loads, sent)
    text = format_index(timed("index again", read_tar_file, path, path), "f")
    timed("parse the index", parse_index, text, "f")
    memory = {"peak": (opening - peak.began) / 1e3, "kept": (kept - peak.began) / 1e3, "sent": len(sent) / 1e6}
    return {"seconds": seconds, "mb": memory}


def _apart(code: str, path: Path, id_col: str) -> dict[str, Any]:
    """`measure` in a process of its own, with the code in a folder."""
    command = [sys.executable, __file__, "--measure", str(path), "--id-col", id_col]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": code}, cwd=code, stdout=subprocess.PIPE, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def table(rows: dict[str, list[dict[str, Any]]], samples: int) -> str:
    """Return a text of the least seconds of several turns as microseconds per sample, and the memory of the first."""
    lines = []
    for name, turns in rows.items():
        times = {stage: min(turn["seconds"][stage] for turn in turns) for stage in turns[0]["seconds"]}
        times.pop("index again")
        shown = [f"{stage} {seconds / samples * 1e6:.2f} us" for stage, seconds in times.items()]
        shown += [f"{what} {size:,.1f} MB" for what, size in turns[0]["mb"].items()]
        lines.append(f"  {name}: {', '.join(shown)}")
    return "\n".join(lines)


def main() -> int:
    """Write the shards, measure, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--against", help="a folder with other code to measure too")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--id-col", default="key", help=argparse.SUPPRESS)
    parser.add_argument("--samples", type=int, nargs="*", default=TINY, help="samples of the shards with tiny images")
    parser.add_argument("--turns", type=int, default=5, help="times that the usual shard is opened")
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure, args.id_col)))
        return 0
    codes = {"this": str(Path(__file__).resolve().parents[1])} | ({"other": args.against} if args.against else {})
    with tempfile.TemporaryDirectory() as folder:
        tar = Path(folder, "shard.tar")
        for samples, size, turns in [(USUAL, IMAGE_BYTES, args.turns), *((n, 0, 1) for n in args.samples)]:
            write_shard(tar, samples, jpeg(size))
            for id_col in ("key", "absent") if size else ("key",):
                found: dict[str, list[dict[str, Any]]] = {name: [] for name in codes}
                for _ in range(turns):
                    for name, code in codes.items():
                        found[name].append(_apart(code, tar, id_col))
                print(f"{samples:,} samples, images of {len(jpeg(size)):,} bytes, id column {id_col!r}, per sample:")
                print(table(found, samples), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
