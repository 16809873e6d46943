"""Interpreters beside a worker's: Python work that would hold up the thread that feeds the GPU is done there.

One interpreter runs one thread of Python at a time. Reading a shard's headers and ids costs it about 25 microseconds a
sample; a GPU that takes 20,000 images a second leaves it 50 for everything.
"""

from __future__ import annotations

import copy
import importlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.context import SpawnContext, SpawnProcess
from typing import Any, TypeVar

from tasks.worker.spawn import main_module_hidden

T = TypeVar("T")

logger = logging.getLogger(__name__)

SIDES = 3
"""Side processes of a worker at most: a task that is indexed, and two whose shards are opened."""


class SidePool:
    """A pool of interpreters that call functions. They start as they are needed, and end with this process."""

    def __init__(self, module: str) -> None:
        """Start one interpreter and import `module` there, which takes seconds."""
        self.broken = False
        self._pool = ProcessPoolExecutor(SIDES, _Context(), initializer=_begin)
        self._up: Future[None] = self._pool.submit(_import, module)
        self._up.add_done_callback(_warn)

    def call(self, function: Callable[..., T], *args: Any, wait: bool = False) -> T:
        """Return `function(*args)`, a function of a module.

        Args:
            function: The function.
            args: Its arguments.
            wait: Whether to wait until a side process is up; else it is called right here meanwhile.

        Raises:
            OSError: A side process died, and the pool is of no use any more.
            Exception: What the function raises.
        """
        if not (wait or self._up.done()) or self._up.exception() is not None:
            return function(*args)
        try:
            return self._pool.submit(_answer, function, args).result()
        except BrokenProcessPool as error:
            self.broken = True
            raise OSError("a process that reads shards died: out of memory, or a crash in native code") from error

    def close(self) -> None:
        """End the side processes."""
        self._pool.shutdown(cancel_futures=True)


_pools: dict[str, SidePool] = {}
_choosing = threading.Lock()


def aside(function: Callable[..., T], *args: Any, wait: bool = False) -> T:
    """Return `function(*args)`, called by a pool of this process, which is made anew where a side process has died.

    Each module has a pool of its own, so that shards that are opened do not wait for others that are merged.

    Args:
        function: The function.
        args: Its arguments.
        wait: Whether to wait until a side process is up; else it is called right here meanwhile.
    """
    module = function.__module__
    with _choosing:
        if module not in _pools or _pools[module].broken:
            _pools[module] = SidePool(module)
        pool = _pools[module]
    return pool.call(function, *args, wait=wait)


class _Process(SpawnProcess):
    """A child that a Dask worker may have, and that does not run the user's script again.

    Dask's workers are daemonic processes, which multiprocessing allows no children lest they are left behind. These
    are not: they are daemonic too, which ends them where their parent ends in order, and `_begin` sees to the rest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs, daemon=True)

    def start(self) -> None:
        config = vars(multiprocessing.current_process())["_config"]
        daemonic = config.pop("daemon", None)
        try:
            with main_module_hidden():
                super().start()
        finally:
            if daemonic is not None:
                config["daemon"] = daemonic


class _Context(SpawnContext):
    Process = _Process


def _begin() -> None:
    """Prepare a side process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent, whose end ends this process
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End this process when its parent is gone, however that ended: the pool's own pipes would stay open."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _import(module: str) -> None:
    importlib.import_module(module)


def _warn(up: Future[None]) -> None:
    if not up.cancelled() and (error := up.exception()) is not None:
        logger.warning("no process starts beside this one, so shards are read here, which is slower: %s", error)


def _answer(function: Callable[..., T], args: tuple[Any, ...]) -> T:
    """Call a function; what it raises is something that the parent can make again from its pickle."""
    try:
        return function(*args)
    except Exception as error:
        try:
            copy.copy(error)
        except Exception:
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise
