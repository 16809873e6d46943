"""Links to report.html that a browser opens from Prefect's UI.

A page that came over HTTP may not open `file://…` or `s3://…`, so a server has to hand out the reports. `make up`
starts one (`deployments/reports.py`) and gives its address to the worker in the environment. Each link is signed, so
that the server hands out only reports that a run has linked to, and no other file.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from urllib.parse import quote, unquote

from flows.report import REPORT
from tasks.storage.folder import Folder

BASE_VARIABLE = "SHARD_EMBED_REPORTS"
"""The address of the server of reports, such as http://127.0.0.1:4201."""
KEY_VARIABLE = "SHARD_EMBED_REPORTS_KEY"
"""The secret that links are signed with."""


def report_link(output: str) -> str | None:
    """Return a link to an output's report that a browser opens; None if no server hands it out.

    Args:
        output: Folder or fsspec URL of the output.
    """
    folder = Folder(output)
    if folder.protocol in {"http", "https"}:
        return folder.place(REPORT)
    base, key = os.environ.get(BASE_VARIABLE), os.environ.get(KEY_VARIABLE)
    if not (base and key):
        return None
    place = folder.path("") if folder.is_local else folder.url
    place = place.rstrip("/")
    return f"{base.rstrip('/')}/{_signature(place, key)}/{quote(place, safe='')}"


def linked_output(path: str, key: str) -> str | None:
    """Return the output that a link's path names; None if this project has not made the link.

    Args:
        path: The path of the request, from the slash on.
        key: The secret that links are signed with.
    """
    signature, _, quoted = path.removeprefix("/").partition("/")
    place = unquote(quoted)
    return place if hmac.compare_digest(signature, _signature(place, key)) else None


def _signature(place: str, key: str) -> str:
    return hmac.new(key.encode(), place.encode("utf-8", "surrogateescape"), hashlib.sha256).hexdigest()[:32]
