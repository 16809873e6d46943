"""Find an output's dataset and weights after they were moved.

An output may be moved or copied, alone or together with its dataset. So a manifest names each path twice: as it was,
and relative to the manifest's own folder. The relative one counts if it exists.
"""

from __future__ import annotations

import os
import posixpath
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from embedders.errors import InputError, one_line
from tasks.storage.folder import Folder

RELATIVE = "from_here"
"""The manifest's entry with the paths relative to its own folder."""


@dataclass(frozen=True)
class Places:
    """Paths or URLs that a run read and wrote besides its output; "" for one that it did not have."""

    dataset: str = ""
    metadata: str = ""
    checkpoint: str = ""


def as_stored(output: str, places: Mapping[str, str]) -> dict[str, Any]:
    """Return the places as a manifest holds them: as absolute paths or URLs, and relative to the output if possible.

    Args:
        output: The output's folder.
        places: Each place by its name in the manifest.
    """
    relative = {name: _relative(output, place) for name, place in places.items() if place}
    return {
        "output": _absolute(output),
        **{name: _absolute(place) if place else "" for name, place in places.items()},
        RELATIVE: {name: place for name, place in relative.items() if place},
    }


def find_places(output: str, stored: Mapping[str, Any], dataset: str | None = None) -> Places:
    """Find the places that a manifest names.

    Args:
        output: The folder that the manifest was read from.
        stored: What the manifest says.
        dataset: Where the dataset is now, if the user gave it.

    Returns:
        The places now. Whatever was inside the output is in this one. For the rest, the place relative to this output
        if it exists, else the place where it was, which may be gone.
    """
    relative = stored.get(RELATIVE)
    if not isinstance(relative, dict):
        relative = _relative_before(stored)
    was = {name: str(stored.get(name) or "") for name in ("dataset", "metadata", "checkpoint")}
    in_place = bool(was["dataset"]) and was["metadata"] == was["dataset"]
    place = dataset or _moved(output, relative.get("dataset"), was["dataset"], _holds_tars) or was["dataset"]
    metadata = place if in_place else _inside(output, relative.get("metadata")) or was["metadata"]
    checkpoint = _moved(output, relative.get("checkpoint"), was["checkpoint"], _is_file) or was["checkpoint"]
    return Places(place, metadata or f"{output.rstrip('/')}/metadata", checkpoint)


def missing_dataset(dataset: str) -> str:
    """Return a sentence that says that the dataset is missing or cannot be reached; "" if it is there."""
    if not dataset:
        return ""
    try:
        if Folder(dataset).exists():
            return ""
    except (OSError, InputError) as error:
        return f"the dataset at {dataset} cannot be reached ({one_line(error)}); give --dataset FOLDER if it has moved"
    return f"the dataset is not at {dataset} any more; give --dataset FOLDER"


def _absolute(place: str) -> str:
    """Return the absolute form of a path; a URL as it is."""
    folder = Folder(place)
    return os.path.abspath(place) if folder.is_local and "://" not in place else place


def _relative(output: str, place: str) -> str:
    """Return a path relative to the output; "" if they are not on one disk or in one store."""
    here, there = Folder(output), Folder(place)
    if "::" in output + place or not (here.protocol == there.protocol or (here.is_local and there.is_local)):
        return ""
    return posixpath.relpath(there.path(""), here.path(""))


def _relative_before(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the relative paths for a manifest that has only absolute ones."""
    metadata, output = str(stored.get("metadata") or ""), str(stored.get("output") or "")
    return {"metadata": "metadata"} if output and metadata == f"{output.rstrip('/')}/metadata" else {}


def _inside(output: str, relative: str | None) -> str:
    """Return the path or URL of a place inside the output; "" for one outside."""
    return f"{output.rstrip('/')}/{relative}" if relative and not relative.startswith("..") else ""


def _moved(output: str, relative: str | None, was: str, there: Any) -> str:
    """Return a place relative to this output, if it differs from what it was and holds what is expected; else "".

    Args:
        output: The output's folder now.
        relative: The place relative to it, from the manifest.
        was: Where it was.
        there: Returns whether a place holds what is expected, from the output and the place.
    """
    if not relative:
        return ""
    here = Folder(output)
    path = posixpath.normpath(here.path(relative))
    place = path if here.is_local else f"{here.protocol}://{path}"
    try:
        return place if place != was and ".." not in path.split("/") and there(output, place) else ""
    except (OSError, InputError):
        return ""


def _is_file(output: str, place: str) -> bool:
    parent, _, name = place.rpartition("/")
    return Folder(parent or "/").has(name)


def _holds_tars(output: str, place: str) -> bool:
    """Return whether a folder holds a tar that the output has embeddings of; it may be another folder by now."""
    embedded = Folder(Folder(output).place("layers")).list(".parquet")
    names = (file.name.partition("/")[2].removesuffix(".parquet") for file in embedded)
    first = next(names, None)
    return first is not None and Folder(place).has(f"{first}.tar")
