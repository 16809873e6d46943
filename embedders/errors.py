"""The errors a person sees: one line that says what, where and what to do."""

from __future__ import annotations

import traceback


class InputError(Exception):
    """The call or its input is wrong. Nothing was written; the command line ends with status 2."""


class MalformedShard(Exception):
    """A tar that cannot be read as one. Trying again does not help: the shard fails by name, the others go on."""


def one_line(error: BaseException, limit: int | None = None, named: bool = False) -> str:
    """Return what an error says, as one line.

    Args:
        error: Any exception. One without a text is called by its class.
        limit: The most characters of the line; None for all.
        named: Begin with the error's class, as in "ValueError: no such mode".

    Example:
        >>> one_line(OSError("no space\\n  left"), named=True)
        'OSError: no space left'
    """
    text, kind = " ".join(str(error).split()), type(error).__name__
    line = f"{kind}: {text}" if named and text else text or kind
    return line[:limit]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was not enough memory, on whatever device: Python, numpy, Pillow and torch say so differently."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's, not imported for a name
        return True
    # torch's allocator for CPUs raises a plain RuntimeError
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def drop_locals(error: BaseException) -> None:
    """Free what the functions that an error has left still hold: mapped files, vectors, batches.

    An error keeps the frames it went through, and a frame keeps its variables and its caller. Where one of them
    refers to the error again, as in `raise told from error` with both the same, none of it goes before garbage is
    collected, which is seldom here. The lines of the traceback stay. Call it where an error is caught for good.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        found = waiting.pop()
        if found is not None and id(found) not in seen:
            seen.add(id(found))
            traceback.clear_frames(found.__traceback__)
            waiting += [found.__cause__, found.__context__]
