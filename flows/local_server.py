"""A local Prefect server in a process of its own: it ends with the run that started it, however that ends.

Run by path, with the descriptor of the socket to listen on and the process id of the run.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys

PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent is gone, also by SIGKILL."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it went before the kernel knew
        os._exit(1)


def main(descriptor: int, parent: int) -> None:
    """Serve until told to stop. What is wrong goes to standard error, and the exit status is not 0."""
    end_with_parent(parent)
    import uvicorn

    app = "prefect.server.api.server:create_app"
    server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="error", lifespan="on"))
    server.run(sockets=[socket.socket(fileno=descriptor)])
    if not server.started:
        sys.exit(1)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
