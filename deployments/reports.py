"""`python -m deployments.reports PORT`: hand out the report.html of outputs to browsers on this machine.

`make up` starts it. It listens on loopback and opens only what a run has linked to (`flows/report_link.py`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from embedders.errors import InputError
from flows.report import REPORT
from flows.report_link import KEY_VARIABLE, linked_output
from tasks.own_cluster import LOOPBACK
from tasks.storage.folder import Folder


class Reports(BaseHTTPRequestHandler):
    """Answers GET with the report that the link names, and 404 to everything else."""

    key: str

    def do_GET(self) -> None:
        """Send the report as it is now."""
        output = linked_output(self.path, self.key)
        if output is None:
            self._answer(404, "no such report\n")
            return
        try:
            page = Folder(output).read_text(REPORT)
        except (OSError, InputError) as error:
            self._answer(502, f"{output}/{REPORT}: {error}\n")
            return
        if page is None:
            self._answer(404, f"{output} has no {REPORT} any more; python -m flows.report {output} writes it\n")
        else:
            self._answer(200, page, "text/html")

    def _answer(self, status: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode("utf-8", "surrogateescape")
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Write nothing: a link is a secret."""


def main(arguments: Sequence[str]) -> int:
    """Serve until the process is stopped; return the exit status."""
    key = os.environ.get(KEY_VARIABLE)
    if len(arguments) != 1 or not arguments[0].isdecimal() or not key:
        print(f"error: give a port, and the links' key in {KEY_VARIABLE}; make up does both", file=sys.stderr)
        return 2
    handler = type("Signed", (Reports,), {"key": key})
    ThreadingHTTPServer((LOOPBACK, int(arguments[0])), handler).serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
