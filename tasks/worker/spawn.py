"""Start worker processes without running the user's script in them again."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def main_module_hidden() -> Iterator[None]:
    """Hide the main module from multiprocessing for the time of the block.

    multiprocessing's spawn runs the parent's main module again in every child, which a script without the
    `if __name__ == "__main__"` guard does not survive. Workers do not need it: whatever a script defines reaches
    them by value, through cloudpickle.

    Example:
        >>> with main_module_hidden():
        ...     cluster = LocalCluster(processes=True)
    """
    main = sys.modules["__main__"]
    names = ("__file__", "__spec__")
    hidden = {name: getattr(main, name) for name in names if hasattr(main, name)}
    main.__spec__ = None
    if "__file__" in hidden:
        del main.__file__
    try:
        yield
    finally:
        for name, value in hidden.items():
            setattr(main, name, value)
