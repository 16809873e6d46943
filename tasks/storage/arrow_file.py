"""Files for Arrow's readers."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from tasks.storage.folder import Folder


@contextlib.contextmanager
def arrow_file(folder: Folder, name: str) -> Iterator[Any]:
    """Open a file for Arrow's readers: without Python if it is local.

    Raises:
        FileNotFoundError: It is not there.
    """
    if folder.is_local:
        with pa.OSFile(folder.path(name)) as file:
            yield file
    else:
        with folder.open(name) as file:
            yield file
