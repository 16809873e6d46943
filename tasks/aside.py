"""Interpreters beside a worker's: Python work that would hold up the thread that feeds the GPU is done there.

One interpreter runs one thread of Python at a time. Reading a shard's headers and ids costs it about 25 microseconds a
sample; a GPU that takes 20,000 images a second leaves it 50 for everything.
"""

from __future__ import annotations

import contextlib
import os
import pickle
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class SideProcess:
    """A child interpreter that calls functions. It ends with its parent, however that ends."""

    def __init__(self) -> None:
        self.busy = threading.Lock()
        self._ready = False
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
                "CUDA_VISIBLE_DEVICES": "",
            },
        )

    def call(self, function: Callable[..., T], *args: Any) -> T:
        """`function(*args)`, a function of a module, and what it raises. Until the child is up it is called right here.

        :raises OSError: the child has died.
        """
        with self.busy:
            return self._call(function, args)

    def _call(self, function: Callable[..., T], args: tuple[Any, ...]) -> T:
        if not self._is_ready():
            return function(*args)
        try:
            pickle.dump((function, args), self._in)
            self._in.flush()
            failed, value = pickle.load(self._out)
        except (EOFError, BrokenPipeError) as error:
            raise OSError(f"the process that reads shards died (status {self._child.wait()})") from error
        if failed:
            raise value
        return value

    @property
    def alive(self) -> bool:
        """Whether the child still runs."""
        return self._child.poll() is None

    def close(self) -> None:
        """End the child."""
        with contextlib.suppress(BrokenPipeError):
            self._in.close()
        self._out.close()
        self._child.wait()

    @property
    def _in(self) -> Any:
        return self._child.stdin

    @property
    def _out(self) -> Any:
        return self._child.stdout

    def _is_ready(self) -> bool:
        """Whether the child has said that it is."""
        if not self._ready and select.select([self._out], [], [], 0)[0]:
            self._ready = self._out.read(len(READY)) == READY
        return self._ready


READY = b"ready\n"
SIDES = 3
"""Side processes a worker at most: a task that is indexed, and two whose shards are opened."""
_sides: list[SideProcess] = []
_choosing = threading.Lock()


def aside(function: Callable[..., T], *args: Any) -> T:
    """`function(*args)` in a side process of this process that has nothing to do, of a few that start as needed."""
    side = _free_side()
    try:
        return side._call(function, args)
    finally:
        side.busy.release()


def _free_side() -> SideProcess:
    """A side process whose `busy` is held for the caller; waits for one where all are busy and no more may start."""
    with _choosing:
        _sides[:] = [side for side in _sides if side.alive]
        for side in _sides:
            if side.busy.acquire(blocking=False):
                return side
        if len(_sides) < SIDES:
            _sides.append(SideProcess())
            _sides[-1].busy.acquire()
            return _sides[-1]
        waited_for = _sides[0]
        _sides.append(_sides.pop(0))  # the next one waits for another
    waited_for.busy.acquire()
    return waited_for


def serve() -> None:
    """Call what comes on standard input and answer on standard output, until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process
    calls, answers = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a function prints is no answer
    import tasks.index  # noqa: F401  # what will be called; its import takes seconds

    answers.write(READY)
    answers.flush()
    while True:
        try:
            function, args = pickle.load(calls)
        except EOFError:
            return
        try:
            answer = False, function(*args)
        except Exception as error:
            answer = True, error
        pickle.dump(answer, answers)
        answers.flush()


if __name__ == "__main__":
    serve()
