"""Stop a flow whose output another run has taken over, and nothing else of the process that called it."""

from __future__ import annotations

import contextlib
import ctypes
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

WAKE = signal.SIGURG
"""Interrupts what the main thread waits for. Without a handler the system ignores it, so one that comes late is
harmless."""


class LockLost(Exception):
    """Another run has taken over the output. What this one has finished is kept, and the other goes on from there."""


class _Stop(BaseException):
    """Raised in the thread of the flow; no `except Exception` on the way takes it for a failed shard."""


@contextlib.contextmanager
def stoppable() -> Iterator[Callable[[str], None]]:
    """Run a block that another thread can stop.

    Yields:
        A function that raises LockLost out of the block, with the line that it is given. In the main thread this
        interrupts whatever the block waits for; in another one it takes effect when a wait ends, at the latest with the
        next finished group of shards.

    Raises:
        LockLost: The function was called.

    Example:
        >>> with stoppable() as stop, only_run("out", "embed laion", lost=stop):
        ...     write_to("out")
    """
    thread, lock = threading.current_thread(), threading.Lock()
    reasons: list[str] = []
    open_, in_main = True, thread is threading.main_thread()

    def stop(why: str) -> None:
        with lock:
            if not open_ or reasons:
                return
            reasons.append(why)
            if in_main:
                signal.pthread_kill(_ident(thread), WAKE)
            else:
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(_ident(thread)), ctypes.py_object(_Stop))

    def wake(number: int, frame: FrameType | None) -> None:
        if reasons:
            raise _Stop

    before = signal.signal(WAKE, wake) if in_main else None
    try:
        yield stop
    except _Stop:
        raise LockLost(f"{reasons[0]}; this run has stopped, and what it has finished is kept") from None
    finally:
        with lock:
            open_ = False
        if in_main:
            signal.signal(WAKE, before)


def _ident(thread: threading.Thread) -> int:
    assert thread.ident is not None  # it runs
    return thread.ident
