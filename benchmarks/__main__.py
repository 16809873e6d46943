"""`python -m benchmarks`, `make bench`: run `benchmarks.throughput`, by default in a size that suits the machine."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.throughput import main
from tasks.hardware import count_gpus

ON_A_GPU = ("--no-pretrained",)
ON_A_CPU = ("--no-pretrained", "--model", "tf_efficientnet_lite0", "--shards", "2", "--samples", "256")
"""Takes minutes instead of hours, and nothing from a model hub."""


def sized(arguments: Sequence[str]) -> Sequence[str]:
    """Return the arguments, or those that suit this machine if there are none."""
    return arguments or (ON_A_GPU if count_gpus() else ON_A_CPU)


if __name__ == "__main__":
    sys.exit(main(sized(sys.argv[1:])))
