"""Shut down cleanly on SIGINT or SIGTERM: within seconds, with no process left, and with the status shells expect."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS_TO_END = 8.0
"""An orderly shutdown may take this long. After that this process kills all that it started, and itself. No file is
left half-written."""


class Terminated(BaseException):
    """Raised when SIGTERM arrives, as KeyboardInterrupt is for SIGINT."""


_orderly_end: threading.Timer | None = None
_armed = False


@contextlib.contextmanager
def ending_in_time() -> Iterator[None]:
    """Within the block, raise KeyboardInterrupt on SIGINT and Terminated on SIGTERM, and limit the time to end.

    Use it in the main thread of a command that owns its process. A second Ctrl-C ends the process at once.

    Example:
        >>> with ending_in_time():
        ...     status = run_the_command()
    """
    global _armed, _orderly_end

    def stop(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and _orderly_end is not None:
            _end_now(128 + number)  # Ctrl-C for the second time
        hurry(128 + number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    _armed = True
    try:
        yield
    finally:
        _armed = False
        for number, handler in before.items():
            signal.signal(number, handler)
        if _orderly_end is not None:
            _orderly_end.cancel()
            _orderly_end = None


@contextlib.contextmanager
def noticing_prefects_signal() -> Iterator[None]:
    """Limit the time to end also if Prefect gets the SIGTERM, since its flows install a handler of their own."""
    from prefect.exceptions import TerminationSignal

    try:
        yield
    except TerminationSignal as signalled:
        hurry(128 + signalled.signal)
        raise


def hurry(status: int) -> None:
    """Start the time limit of an orderly shutdown, if this process is a command's and no limit runs yet.

    Args:
        status: Exit status if the time is not enough: 130 for SIGINT, 143 for SIGTERM.
    """
    global _orderly_end
    if not _armed or _orderly_end is not None:
        return
    _orderly_end = threading.Timer(SECONDS_TO_END, _end_now, [status])
    _orderly_end.daemon = True
    _orderly_end.start()


def _end_now(status: int) -> None:
    import psutil

    with contextlib.suppress(psutil.Error):
        for child in psutil.Process().children(recursive=True):
            with contextlib.suppress(psutil.Error):
                child.kill()
    os.write(2, b"stopped at once; run the same command again to finish\n")
    os._exit(status)
