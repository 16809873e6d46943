"""Give Prefect a home folder where the user has none; it keeps its settings and a local server's database there."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from pathlib import Path


def provide_home() -> None:
    """Set PREFECT_HOME to a temporary folder if the user's home cannot be written to.

    Call this before Prefect is imported, which reads the variable. The folder is removed when the process ends. A
    PREFECT_HOME that the user has set stays as it is.
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
