"""`python -m benchmarks.download`: bytes per second and seconds of CPU of downloading tars from an S3 server.

Both ways that `tasks.storage.download_ahead` has are measured in turn, each in a process of its own: by the store's
client, and over plain sockets by signed URLs. The server is a process of its own too, which sends parts of a file on
the disk as fast as the machine can, and waits before each answer as a store does; moto's (`--moto`) is slower than any
client. Neither speaks TLS.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.servers import free_port, s3_server

CREDENTIALS = {"AWS_ACCESS_KEY_ID": "k", "AWS_SECRET_ACCESS_KEY": "s", "AWS_DEFAULT_REGION": "us-east-1"}
ETAG = "0123456789abcdef"


class Files(BaseHTTPRequestHandler):
    """Answers what a client asks of a bucket in which each object is the same file."""

    protocol_version = "HTTP/1.1"
    file: str
    objects: int
    wait: float

    def do_GET(self) -> None:
        """Send a listing, or a part of the file."""
        time.sleep(self.wait)
        size = os.path.getsize(self.file)
        if "list-type=2" in self.path:
            item = "<Contents><Key>data/{}.tar</Key><Size>{}</Size><ETag>{}</ETag></Contents>"
            body = "".join(item.format(n, size, ETAG) for n in range(self.objects))
            answer = f"<ListBucketResult><IsTruncated>false</IsTruncated>{body}</ListBucketResult>".encode()
            self._head(200, len(answer))
            self.wfile.write(answer)
            return
        first, last = self.headers["Range"].removeprefix("bytes=").split("-")
        start, left = int(first), int(last) - int(first) + 1
        self._head(206, left)
        self.wfile.flush()
        with open(self.file, "rb") as file:
            while left:
                sent = os.sendfile(self.connection.fileno(), file.fileno(), start, left)
                start, left = start + sent, left - sent

    def do_HEAD(self) -> None:
        """Say how long the file is."""
        time.sleep(self.wait)
        self._head(200, os.path.getsize(self.file))

    def _head(self, status: int, size: int) -> None:
        self.send_response_only(status)
        self.send_header("Content-Length", str(size))
        self.send_header("ETag", f'"{ETAG}"')
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


def serve(port: int, file: str, objects: int, wait: float) -> None:
    """Answer until the process is ended."""
    handler = type("Handler", (Files,), {"file": file, "objects": objects, "wait": wait})
    ThreadingHTTPServer(("127.0.0.1", port), handler).serve_forever()


@contextlib.contextmanager
def server(args: argparse.Namespace, file: str) -> Iterator[str]:
    """The URL of a server with the tars in it."""
    if args.moto:
        with s3_server() as url:
            import s3fs

            fs = s3fs.S3FileSystem(endpoint_url=url, key="k", secret="s", skip_instance_cache=True)
            fs.mkdir("bench")
            for number in range(args.tars):
                fs.put_file(file, f"bench/data/{number}.tar")
            yield url
        return
    port = free_port()
    numbers = [str(port), file, str(args.tars), str(args.wait / 1e3)]
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.download", "--serve", *numbers])
    try:
        time.sleep(2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def measure(way: str) -> dict[str, float]:
    """Download all tars in this process; MB/s, and seconds of its CPU per GB."""
    from tasks.shards import find_shards
    from tasks.storage import signed_download
    from tasks.storage.download_ahead import Stage

    if way == "client":
        signed_download.SIGNING = frozenset()
    shards = find_shards("s3://bench/data", "s3://bench/out")
    began, cpu = time.perf_counter(), time.process_time()
    with Stage(shards) as stage:
        for tar in stage:
            tar.path()
            tar.release()
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    size = sum(shard.tar_bytes for shard in shards)
    return {"mb/s": size / seconds / 1e6, "cpu s/gb": cpu / size * 1e9}


def main() -> int:
    """Write a tar, start the server, measure each way, and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tars", type=int, default=24)
    parser.add_argument("--mb", type=int, default=100, help="size of each tar")
    parser.add_argument("--wait", type=float, default=30.0, help="milliseconds before each answer")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--moto", action="store_true", help="download from moto's server")
    parser.add_argument("--serve", nargs=4, help=argparse.SUPPRESS)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        serve(int(args.serve[0]), args.serve[1], int(args.serve[2]), float(args.serve[3]))
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "tar")
        file.write_bytes(os.urandom(1 << 20) * args.mb)
        with server(args, str(file)) as url:
            for turn in range(args.turns):
                for way in ("client", "sockets"):
                    command = [sys.executable, "-m", "benchmarks.download", "--measure", way]
                    environment = os.environ | CREDENTIALS | {"AWS_ENDPOINT_URL": url, "TMPDIR": folder}
                    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, env=environment)
                    found = json.loads(done.stdout)
                    told = f"{found['mb/s']:7,.0f} MB/s, {found['cpu s/gb']:.2f} s of CPU per GB"
                    print(f"turn {turn + 1}, {way:7}: {told}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
