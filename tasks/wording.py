"""Put counts into words."""

from __future__ import annotations


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a count with its noun: "1 shard", "2,000 shards", "2 indices".

    Args:
        count: How many there are.
        noun: What they are, in the singular.
        plural: The plural, if it is not the singular with an s.
    """
    return f"{count:,} {noun if count == 1 else plural or f'{noun}s'}"
