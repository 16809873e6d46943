"""The account of a shard's samples: samples = embedded + quarantined. What breaks this rule cannot be written.

`tasks.records.LayerRecord` cannot be built with counts that this file refuses, and a layer file takes its name only
with such a record.
"""

from __future__ import annotations

from collections.abc import Mapping


class Unbalanced(ValueError):
    """An account in which samples are neither embedded nor quarantined, or both."""


def check_account(samples: int, embedded: int, quarantined: Mapping[str, int]) -> None:
    """Prove that every sample is either embedded or quarantined.

    Args:
        samples: How many samples the shard has.
        embedded: How many of them have a value.
        quarantined: How many have none, by reason.

    Raises:
        Unbalanced: The counts do not add up.

    Example:
        >>> check_account(3, 2, {"truncated": 1})
        >>> check_account(3, 2, {})
        Traceback (most recent call last):
            ...
        tasks.sample_account.Unbalanced: 3 samples, but 2 embedded and 0 quarantined
    """
    bad = sum(quarantined.values())
    if samples != embedded + bad:
        raise Unbalanced(f"{samples} samples, but {embedded} embedded and {bad} quarantined")
