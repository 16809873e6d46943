"""How a run ends that is told to: within seconds, with nothing left behind, and with the status a shell expects."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SECONDS_TO_END = 8.0
"""What an orderly end may take. Then everything this process has started is killed, and so is it: files are whole."""


class Terminated(BaseException):
    """SIGTERM has come."""


_orderly_end: threading.Timer | None = None
_armed = False


@contextlib.contextmanager
def ending_in_time() -> Iterator[None]:
    """Within the block SIGINT raises KeyboardInterrupt and SIGTERM Terminated, and what follows has little time.

    For a command that owns its process, in its main thread.
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
    """Let the time of an orderly end begin when Prefect, whose flows handle SIGTERM themselves, has got it."""
    from prefect.exceptions import TerminationSignal

    try:
        yield
    except TerminationSignal as signalled:
        hurry(128 + signalled.signal)
        raise


def hurry(status: int) -> None:
    """Begin the time of an orderly end, if this process is a command's and it has not begun."""
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
    os.write(2, b"stopped at once; the same command does what is missing\n")
    os._exit(status)
