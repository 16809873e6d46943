"""Decision: what all workers of a run do alike, although each of them would measure something else."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Decision:
    """The decoder and the batch size of a run: one worker measures them before the first shard is written.

    Both change the vectors a little, so all shards of a layer should be made with the same ones.

    Attributes:
        decoder: "exact" or "fast" for DALI's decoders, "reference" for Pillow, as records name them.
        batch_size: Images of a full batch. A GPU without the memory for it takes half as many, or fewer.
    """

    decoder: str
    batch_size: int
