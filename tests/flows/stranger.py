"""What another user of the machine may try on a run; run by path, prints as JSON what worked.

Takes as JSON lists the ports, the ids of the processes whose environment may hold secrets, and, if there are any, Unix
sockets, the temporary folders, and what no file in them may show.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import socket
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distributed.core import rpc
from distributed.security import Security
from websockets.sync.client import connect

NOBODY = 65534
READS = [
    *("/", "/info/main/workers.html", "/info/main/logs.html", "/json/counts.json", "/json/index.html", "/metrics"),
    *("/status", "/health", "/api/admin/version", "/api/admin/settings", "/api/openapi.json"),
]
"""Prefect's documentation (/docs) and /ui-settings are open, and Dask's /sitemap.json: they tell nothing of a run."""
POSTS = [f"/api/{what}/filter" for what in ("flow_runs", "task_runs", "flows", "logs", "artifacts", "events")]


async def dask(port: int, protocol: str, security: Security) -> list[str]:
    """Ask a Dask scheduler, nanny or worker who it is: where that is answered, it also runs what it is sent."""
    arguments = security.get_connection_args("client")
    with contextlib.suppress(OSError, ValueError, asyncio.TimeoutError):
        async with rpc(f"{protocol}://127.0.0.1:{port}", connection_args=arguments, timeout=3) as server:
            return [f"{port}: {protocol}: {(await asyncio.wait_for(server.identity(), 5))['type']}"]
    return []


def web(port: int) -> list[str]:
    """Ask for pages and for what Prefect's API lists."""
    found = []
    for method, path in [*(("GET", path) for path in READS), *(("POST", path) for path in POSTS)]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=3)
        with contextlib.suppress(OSError, http.client.HTTPException), contextlib.closing(connection):
            connection.request(method, path, "{}", {"Content-Type": "application/json"})
            answer = connection.getresponse()
            if answer.status < 400:
                found.append(f"{port}: {method} {path}: {answer.status} {answer.read(60)!r}")
    return found


def listen(port: int) -> list[str]:
    """Subscribe to Prefect's events with a wrong password."""
    wrong = json.dumps({"type": "auth", "token": "wrong"})
    protocol: Any = ["prefect"]
    address = f"ws://127.0.0.1:{port}/api/events/out"
    with contextlib.suppress(Exception), connect(address, subprotocols=protocol, open_timeout=3) as events:
        events.send(wrong)
        if "auth_success" in str(events.recv(3)):
            return [f"{port}: events"]
    return []


def environment(process: int) -> list[str]:
    """Read another process's environment."""
    try:
        return [f"environment of {process}"] if Path(f"/proc/{process}/environ").read_bytes() else []
    except OSError:
        return []


def arguments(process: int, secrets: Sequence[str]) -> list[str]:
    """Look for secrets in another process's command line, which everybody may read."""
    with contextlib.suppress(OSError):
        line = Path(f"/proc/{process}/cmdline").read_bytes()
        return [f"arguments of {process}: {secret}" for secret in secrets if secret.encode() in line]
    return []


def reach(path: str) -> list[str]:
    """Connect to a Unix socket; "@" stands for the zero byte of one that is in no folder."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path.replace("@", "\0", 1) if path.startswith("@") else path)
        return [f"socket {path}"]
    return []


def files(folder: str, secrets: Sequence[str]) -> list[str]:
    """Look for secrets in the files of a folder, and for files and folders that can be changed."""
    found = []
    for parent, folders, names in os.walk(folder):
        for path in (os.path.join(parent, name) for name in [*folders, *names]):
            with contextlib.suppress(OSError):
                mode = os.lstat(path).st_mode
                if not stat.S_ISLNK(mode) and os.access(path, os.W_OK):
                    found.append(f"{path}: can be changed")
                text = Path(path).read_bytes() if stat.S_ISREG(mode) else b""
                found += [f"{path}: shows {secret}" for secret in secrets if secret.encode() in text]
    return found


async def main(
    ports: list[int],
    processes: list[int],
    sockets: Sequence[str] = (),
    folders: Sequence[str] = (),
    secrets: Sequence[str] = (),
) -> None:
    """Try everything."""
    own = Security.temporary()  # certificates, but of another authority
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid(NOBODY)
        os.setuid(NOBODY)
    found = [what for port in ports for what in [*web(port), *listen(port)]]
    calls = [dask(port, *how) for port in ports for how in (("tcp", Security()), ("tls", own))]
    found += [what for answers in await asyncio.gather(*calls) for what in answers]
    if os.getuid() == NOBODY:
        found += [what for process in processes for what in environment(process)]
        found += [what for process in processes for what in arguments(process, secrets)]
        found += [what for path in sockets for what in reach(path)]
        found += [what for folder in folders for what in files(folder, secrets)]
    print(json.dumps(found))


if __name__ == "__main__":
    asyncio.run(main(*map(json.loads, sys.argv[1:])))
