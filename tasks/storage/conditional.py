"""Write a small file on a condition: only if there is none, or only if it is still the one that was read.

| where | `create` | `replace` |
|---|---|---|
| a disk | a hard link, which fails if the name is taken | without a condition |
| S3 | `If-None-Match: *` | `If-Match: ETAG` |
| other stores | their client's `mode="create"`; else without a condition | without a condition |

Some stores that speak S3's language ignore conditions or refuse them. So who replaces a file reads it again afterwards.
"""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from pathlib import Path

from tasks.storage.folder import Folder
from tasks.storage.remote import as_os_error

S3 = frozenset({"s3", "s3a"})
REFUSED = frozenset({"PreconditionFailed", "ConditionalRequestConflict", "NoSuchKey", "412", "409", "404"})
"""S3's codes for a file that is not the one expected: another one, one that is being written, or none."""

LINKED = 20
"""Attempts to create a file in a folder that others remove when it is empty."""


class ChangedMeanwhile(Exception):
    """A file is not the one any more that was to be replaced."""


def create(folder: Folder, name: str, text: str) -> bool:
    """Write a file, complete and in one step, if there is none.

    Returns:
        Whether it was written. False may also mean that it was, and that the answer was lost on the way: read it.

    Raises:
        OSError: It cannot be written.
    """
    path = folder.path(name)
    try:
        if folder.is_local:
            _link(path, text)
        else:
            folder.fs.pipe_file(path, text.encode(), mode="create")
    except FileExistsError:
        return False
    except NotImplementedError:
        return _create_unless_there(folder, name, text)
    except Exception as error:
        os_error = as_os_error(error)
        if not isinstance(os_error, OSError):
            raise
        if folder.has(name):  # this is how some stores say that it exists
            return False
        if folder.is_local or os_error.errno != errno.ENOSYS:
            raise os_error  # noqa: B904  # its cause is set there
        return _create_unless_there(folder, name, text)
    return True


def agree(folder: Folder, name: str, text: str) -> str:
    """Return the text that the first of several processes wrote to a file, which may be this one.

    Example:
        >>> agree(Folder("out"), "decoder.txt", "fast")  # another part of the run was first
        'exact'
    """
    create(folder, name, text)
    there = folder.read_text(name)
    return text if there is None else there


def _create_unless_there(folder: Folder, name: str, text: str) -> bool:
    """Do the same in a store without conditions, in two steps."""
    if folder.has(name):
        return False
    folder.write_text(name, text)
    return True


def _link(path: str, text: str) -> None:
    """Create a file on a disk together with its content.

    Raises:
        FileExistsError: There is one already.
    """
    for attempt in range(LINKED):
        try:
            _make_folder(Path(path).parent)
            _link_once(path, text)
            return
        except FileNotFoundError:  # another run swept the temporary file, or removed the empty folder
            if attempt == LINKED - 1:
                raise


def _make_folder(folder: Path) -> None:
    """Create a folder unless it is there.

    Raises:
        NotADirectoryError: It is a file.
        FileNotFoundError: It was removed at the same moment.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        if folder.exists() and not folder.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder)) from error
        raise FileNotFoundError(folder) from error


def _link_once(path: str, text: str) -> None:
    folder, name = os.path.split(path)
    temporary = f"{folder}/.{name}.{uuid.uuid4().hex}.tmp"  # swept by the next run if this one is killed here
    try:
        Path(temporary).write_text(text, "utf-8")
        os.link(temporary, path)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS):
            raise
        with open(path, "x", encoding="utf-8") as file:  # a file system without hard links
            file.write(text)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def version_of(folder: Folder, name: str) -> str | None:
    """Return what `replace` compares: the etag on S3. None if there is no such file, and in all other places."""
    if folder.protocol not in S3:
        return None
    try:
        return str(folder.fs.info(folder.path(name))["ETag"])
    except FileNotFoundError:
        return None
    except Exception as error:
        raise as_os_error(error)  # noqa: B904  # its cause is set there


def replace(folder: Folder, name: str, text: str, version: str | None) -> str | None:
    """Write a file, complete or not at all, if it still has a version.

    Args:
        folder: Where it is.
        name: The file's name.
        text: Its content.
        version: From `version_of`, called before the file was read; None to write it in any case.

    Returns:
        The version of what was written; None where there are no versions.

    Raises:
        ChangedMeanwhile: It has another version, or is gone. Nothing was written.
        OSError: It cannot be written.
    """
    if version is not None:
        try:
            answer = folder.fs.pipe_file(folder.path(name), text.encode(), IfMatch=version)
            return str(answer["ETag"])
        except Exception as error:
            os_error = as_os_error(error)
            if _code(os_error) in REFUSED:
                raise ChangedMeanwhile(f"{folder.place(name)}: {os_error}") from error
            if getattr(os_error, "errno", None) != errno.ENOSYS:  # the store knows no conditions
                raise os_error  # noqa: B904  # its cause is set there
    folder.write_text(name, text)
    return version_of(folder, name)


def _code(error: Exception) -> str:
    """Return S3's own code of an error; "" if it has none."""
    response = getattr(error.__cause__, "response", None) or {}
    return str(response.get("Error", {}).get("Code", ""))
