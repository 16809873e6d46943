"""The errors that users see: one line that says what is wrong, where, and what to do."""

from __future__ import annotations

import traceback


class InputError(Exception):
    """The call or its input is wrong. Nothing was written, and the command line ends with status 2."""


class MalformedShard(Exception):
    """A tar that cannot be read as one. It is not tried again; the shard fails by name, and the others go on."""


def one_line(error: BaseException, limit: int | None = None, named: bool = False) -> str:
    """Return what an error says, as one line.

    Args:
        error: Any exception. If it has no text, the line is the name of its class.
        limit: Length at which the line is cut, in characters; None to cut nothing.
        named: Begin with the error's class, as in "ValueError: no such mode".

    Example:
        >>> one_line(OSError("no space\\n  left"), named=True)
        'OSError: no space left'
    """
    text, kind = " ".join(str(error).split()), type(error).__name__
    line = f"{kind}: {text}" if named and text else text or kind
    return line[:limit]


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that memory ran out, on any device: in Python, numpy, Pillow or torch."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for a name
        return True
    # torch's allocator for CPUs raises a plain RuntimeError
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def drop_locals(error: BaseException) -> None:
    """Free the local variables that an error keeps alive: mapped files, vectors, batches.

    An error keeps the frames it went through, and a frame keeps its variables. If one of these refers to the error
    again, only the garbage collector frees them, which seldom runs here. The lines of the traceback stay. Call this
    where an error is finally handled.

    Args:
        error: The error. Its causes are treated too.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]
