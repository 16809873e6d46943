"""A home for Prefect where the user has none: it keeps settings there, and a local server keeps its database."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def provide_home() -> None:
    """Set PREFECT_HOME to a temporary folder if the user's home cannot be written to.

    Prefect reads it while it is imported, so call this before. The folder goes when the process ends. A PREFECT_HOME
    that the user has set stays.
    """
    if "PREFECT_HOME" in os.environ or _can_have_home():
        return
    folder = tempfile.mkdtemp(prefix="shard-embed-prefect-")
    os.environ["PREFECT_HOME"] = folder
    atexit.register(shutil.rmtree, folder, ignore_errors=True)


def _can_have_home() -> bool:
    """Return whether `~/.prefect` is a folder that we can write to, or can be made one."""
    try:
        home = Path.home() / ".prefect"
        home.mkdir(mode=0o700, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: nobody knows where the user's home is
        return False
    return os.access(home, os.W_OK | os.X_OK)
