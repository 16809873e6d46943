"""Write a folder completely or not at all: an export that was stopped leaves the former one, or none."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from embedders.errors import InputError
from tasks.storage.durable import publish
from tasks.storage.folder import Folder
from tasks.storage.temporary_space import scratch

MARK = "export.json"
"""Says what an export was made from. A folder with this file may be replaced by another export."""


@contextlib.contextmanager
def whole_folder(target: Folder, made_of: dict[str, Any]) -> Iterator[Path]:
    """Give a local folder to write to. Its files become the target after the block, unless that raises an exception.

    On a disk, the folder takes the target's name in one step. In a store, `MARK` says that the export is unfinished
    until the last file is there.

    Args:
        target: The folder to write or replace.
        made_of: What the export is made from, to be written to `MARK`.

    Raises:
        InputError: The target holds something that is no export.
        OSError: The target cannot be written to.

    Example:
        >>> with whole_folder(Folder("out/export/npy"), {"format": "npy"}) as folder:
        ...     np.save(folder / "vectors.npy", vectors)
    """
    if not target.has(MARK) and _is_taken(target):
        raise InputError(f"{target.url}: holds something that is no export; give another --to")
    if target.is_local:
        with _renamed_folder(Path(target.path("")), made_of) as folder:
            yield folder
        return
    target.check_writable()
    with scratch() as folder:
        local = Path(folder, "export")
        local.mkdir()
        yield local
        _upload(local, target, made_of)


def _is_taken(target: Folder) -> bool:
    """Return whether there is a file of this name, or a folder with anything in it."""
    if not target.is_local:
        return bool(target.list(""))
    path = Path(target.path(""))
    return path.is_file() or (path.is_dir() and any(path.iterdir()))


def _upload(local: Path, target: Folder, made_of: dict[str, Any]) -> None:
    """Replace an earlier export in a store by the files of a local folder."""
    former = {file.name for file in target.list("")}
    target.write_text(MARK, json.dumps(made_of | {"unfinished": True}, indent=2) + "\n")
    names = sorted(path.relative_to(local).as_posix() for path in local.rglob("*") if path.is_file())
    for name in names:
        target.write(name, lambda path, name=name: os.replace(local / name, path))  # type: ignore[misc]
    for name in former - {MARK, *names}:
        target.remove(name)
    target.write_text(MARK, json.dumps(made_of, indent=2) + "\n")


@contextlib.contextmanager
def _renamed_folder(target: Path, made_of: dict[str, Any]) -> Iterator[Path]:
    """Give a folder beside the target; it takes the target's name after the block, or is removed after an exception."""
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}.*.tmp"):
        if not Path("/proc", stale.name.split(".")[-2]).exists():
            shutil.rmtree(stale)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    former = target.with_name(f".{target.name}.former.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        (temporary / MARK).write_text(json.dumps(made_of, indent=2) + "\n")
        if target.exists():
            target.rename(former)
        publish(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(former, ignore_errors=True)
