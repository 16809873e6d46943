"""A part of a run: which shards one of several independent runs over the same output does."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_PART = re.compile(r"([0-9]{1,9})/([0-9]{1,9})")


@dataclass(frozen=True)
class RunPart:
    """Every `count`-th shard of the dataset, from shard `number` on.

    Parts with one `count` are a division: together they do every shard once. Job arrays count as they do, from 0.

    Example:
        >>> RunPart.parse("1/3").of(["a", "b", "c", "d", "e"])
        ['b', 'e']
    """

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> RunPart:
        """Return the part that a text such as "3/16" names.

        Raises:
            ValueError: It names none; the message says how parts are counted.
        """
        found = _PART.fullmatch(text)
        if found is None:
            raise ValueError("a part such as 3/16, which is counted from 0/16 to 15/16")
        number, count = map(int, found.groups())
        if count == 0:
            raise ValueError("a part of at least one, such as 0/1")
        if number >= count:
            raise ValueError(f"a part from 0/{count} to {count - 1}/{count}, counted from 0")
        return cls(number, count)

    def of(self, items: Sequence[T]) -> Sequence[T]:
        """Return this part of the dataset's shards, which must be all of them, in their order."""
        return items[self.number :: self.count]

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"
