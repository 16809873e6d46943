"""Resolve the dependency sets of pyproject.toml into locks/*.txt, and prove that they still resolve to that.

    python locks/lock.py             write the locks anew; versions stay where they still fit
    python locks/lock.py --upgrade   write the locks anew with the newest versions
    python locks/lock.py --check     resolve again, write nothing, show what differs; exit status 1 if anything does

A lock is a constraints file: `pip install -c locks/gpu.txt '.[gpu]'` installs what is asked for, in these versions.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
ROOT = LOCKS.parent


@dataclass(frozen=True)
class LockedSet:
    """One lock: the extras resolved together into `locks/NAME.txt`, under further constraints files if any."""

    name: str
    extras: tuple[str, ...] = ()
    constraints: tuple[str, ...] = ()

    @property
    def path(self) -> Path:
        """The lock file."""
        return LOCKS / f"{self.name}.txt"


# dev is everything that `make` installs, so it comes first: where the other sets can, they follow its versions.
# The GPU sets hold s3 too, since workers read from a shared store. dask-cuda pins dask, so dask differs there.
SETS = (
    LockedSet("dev", extras=("s3", "demo", "export", "dev"), constraints=("locks/torch.in",)),
    LockedSet("base", constraints=("locks/torch.in",)),
    LockedSet("s3", extras=("s3",), constraints=("locks/torch.in",)),
    LockedSet("demo", extras=("demo",), constraints=("locks/torch.in",)),
    LockedSet("export", extras=("export",), constraints=("locks/torch.in",)),
    LockedSet("gpu", extras=("gpu", "s3")),
    LockedSet("gpu-cu13", extras=("gpu-cu13", "s3"), constraints=("locks/torch.in",)),
)


def pins(lock: str) -> dict[str, str]:
    """Return the pinned line of every package named in the text of a lock, without its comment, by package name."""
    lines = (line.split("#")[0].strip() for line in lock.splitlines())
    return {re.split(r"[=<>!~;\[ ]", line, maxsplit=1)[0]: line for line in lines if line}


def resolve(locked: LockedSet, preferred: str) -> str:
    """Resolve one set for every supported Python, near to the `preferred` pins, and return the text of its lock.

    Exits with the resolver's own message if there is no solution or no registry.
    """
    with tempfile.TemporaryDirectory() as folder:
        # uv takes what its output file already says as the versions to prefer.
        output = Path(folder, locked.path.name)
        output.write_text(preferred)
        command = [sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml"]
        command += ["--quiet", "--output-file", str(output)]
        # fewest: one version of a package for all Pythons, so that what runs is what was tested.
        command += ["--universal", "--python-version", "3.11", "--fork-strategy", "fewest"]
        command += ["--annotation-style", "line", "--custom-compile-command", "make lock"]
        command += [f"--extra={extra}" for extra in locked.extras]
        command += [f"--constraints={path}" for path in locked.constraints]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"locks/{locked.path.name}: no resolution\n{done.stderr.strip()}")
        return output.read_text()


def write(upgrade: bool) -> None:
    """Write every lock; with `upgrade`, forget the versions that the locks hold now."""
    followed: dict[str, str] = {}
    for locked in SETS:
        held = pins(locked.path.read_text()) if locked.path.exists() and not upgrade else {}
        text = resolve(locked, preferred="".join(f"{line}\n" for line in (held | followed).values()))
        locked.path.write_text(text)
        followed = followed or pins(text)
        print(f"locks/{locked.path.name}: {len(pins(text))} packages")


def check() -> int:
    """Resolve every set near to its own lock, print the differences, and return how many sets have any."""
    stale = 0
    for locked in SETS:
        name = f"locks/{locked.path.name}"
        held = locked.path.read_text() if locked.path.exists() else ""
        resolved = resolve(locked, preferred=held)
        if resolved == held:
            print(f"{name}: {len(pins(held))} packages, as locked")
            continue
        stale += 1
        diff = difflib.unified_diff(held.splitlines(), resolved.splitlines(), name, "resolved now", n=0, lineterm="")
        print("\n".join(diff))
    if stale:
        print(
            f"{stale} of {len(SETS)} locks differ from what pyproject.toml resolves to: run `make lock` and commit them"
        )
    return stale


def main() -> int:
    """Read the command line and return the exit status."""
    parser = argparse.ArgumentParser(description="Resolve the dependency sets of pyproject.toml into locks/*.txt.")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--check", action="store_true", help="write nothing; show what differs and exit with 1")
    mode.add_argument("--upgrade", action="store_true", help="take the newest versions")
    arguments = parser.parse_args()
    if arguments.check:
        return 1 if check() else 0
    write(arguments.upgrade)
    return 0


if __name__ == "__main__":
    sys.exit(main())
