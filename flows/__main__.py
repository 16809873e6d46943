"""`python -m flows COMMAND …`, or `shard-embed COMMAND …` once installed: all commands under one name."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "embed": "give every image of a WebDataset an embedding",
    "search": "find the images that are most like one",
    "report": "write report.html again",
    "export": "write the dataset in the layout of another tool",
    "demo": "embed 256 photographs and show which are alike",
}
"""Each is a file of this folder with a `main` that takes the arguments and returns the exit status."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one of the commands and return its exit status: 2 if there is none of that name.

    Args:
        arguments: The command and its own arguments; by default this process's.
    """
    command, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if command in COMMANDS:
        return int(importlib.import_module(f"flows.{command}").main(rest))
    if command in {"-h", "--help"}:
        print("Usage: shard-embed COMMAND …   (shard-embed COMMAND --help shows its options)\n")
        for name, about in COMMANDS.items():
            print(f"  {name:8} {about}")
        return 0
    print(f"error: no command {command!r}; give one of: {', '.join(COMMANDS)}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
