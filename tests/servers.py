"""Real servers on loopback: an S3 store, and a proxy before it that counts requests and misbehaves on purpose."""

from __future__ import annotations

import contextlib
import http.client
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
HANG_SECONDS = 3.0
"""Longer than the read timeout that tests give their clients."""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextlib.contextmanager
def s3_server() -> Iterator[str]:
    """Moto's S3 server as a process of its own; its URL."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while not _answers(url):
            assert process.poll() is None, "moto's server ended"
            assert time.monotonic() < deadline, "moto's server does not answer"
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.wait(10)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/moto-api/", timeout=5):
            return True
    except OSError:
        return False


@dataclass
class Proxy:
    """Forwards HTTP requests to `target`, but does to each what `fault(method, path)` says.

    "503": answers SlowDown. "hang": answers nothing for a while. "cut": closes the connection amid the body.
    """

    target: str
    fault: Callable[[str, str], str | None] = lambda method, path: None
    requests: list[tuple[str, str]] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    bytes_sent: int = 0
    url: str = ""

    @contextlib.contextmanager
    def running(self) -> Iterator[Proxy]:
        """Listen on loopback until the block ends."""
        proxy = self

        class Handler(_Forwarder):
            owner = proxy

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()


class _Forwarder(BaseHTTPRequestHandler):
    owner: Proxy
    protocol_version = "HTTP/1.1"

    def forward(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.owner.requests.append((self.command, self.path))
        fault = self.owner.fault(self.command, self.path)
        if fault is not None:
            self.owner.faults.append(fault)
        if fault == "503":
            self.answer(503, [("Content-Type", "application/xml")], SLOW_DOWN)
            return
        if fault == "hang":
            time.sleep(HANG_SECONDS)
            self.close_connection = True
            return
        upstream = http.client.HTTPConnection(self.owner.target.removeprefix("http://"), timeout=60)
        with contextlib.closing(upstream):
            upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                if name.lower() != "expect":
                    upstream.putheader(name, value)
            upstream.endheaders(body or None)
            response = upstream.getresponse()
            data = response.read()
        skipped = {"transfer-encoding", "connection", "content-length"}
        headers = [(name, value) for name, value in response.getheaders() if name.lower() not in skipped]
        if self.command == "HEAD":
            headers += [("Content-Length", response.getheader("Content-Length") or "0")]
        self.answer(response.status, headers, data, cut=fault == "cut")

    def answer(self, status: int, headers: list[tuple[str, str]], data: bytes, *, cut: bool = False) -> None:
        with contextlib.suppress(ConnectionError):  # the client gave up waiting
            self.send_response_only(status)
            for name, value in headers:
                self.send_header(name, value)
            if self.command != "HEAD":
                self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data[: len(data) // 2] if cut else data)
            self.owner.bytes_sent += len(data)
        self.close_connection = self.close_connection or cut

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = forward

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the requests are in the list."""
