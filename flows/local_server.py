"""The process of a local Prefect server; it ends with the run that started it, however that ends.

`flows/server.py` runs this file by its path, with the descriptor of the socket to listen on and the run's process id.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, even if that was killed.

    Args:
        parent: Process id of the run.
    """
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel could watch it
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serve until SIGTERM. An error goes to standard error and makes the exit status 1.

    Args:
        descriptor: File descriptor of the listening socket.
        parent: Process id of the run.
    """
    end_with_parent(parent)
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=descriptor)])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
