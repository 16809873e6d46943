"""An embedder that meets with accidents in the shards that an environment variable names.

`FAULT=dies:00003` kills its worker with SIGKILL each time it comes to that shard, `hangs:00003` never returns from a
call in C there, `slow:0.5` takes half a second more for each shard, `waits:FOLDER` waits until the folder has a file
named like the shard. Its vectors are those of a plain TimmImageEmbedder,
and so is its fingerprint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from embedders import TimmImageEmbedder
from embedders.shard_batch import ShardBatch
from embedders.webdataset import OpenShard

MODEL = "test_vit.r160_in1k"


class Faulty(TimmImageEmbedder):
    """A small model with random weights."""

    def __init__(self) -> None:
        super().__init__(MODEL, pretrained=False)

    def batches(self, shards: Iterable[OpenShard], device: str) -> Iterator[ShardBatch]:
        """The usual batches, unless the fault comes first."""
        return super().batches(map(self.meet, shards), device)

    def meet(self, shard: OpenShard) -> OpenShard:
        """Come to a shard."""
        fault, _, value = os.environ.get("FAULT", "").partition(":")
        if fault == "slow":
            time.sleep(float(value))
        elif fault == "waits":
            while not (Path(value) / Path(shard.path).stem).exists():
                time.sleep(0.02)
        elif value == Path(shard.path).stem:
            if fault == "dies":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hangs":
                ctypes.CDLL(None).pause()
        return shard
