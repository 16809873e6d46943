"""What task runs are called in Prefect's UI: "embed 00012–00019"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class Named(Protocol):
    """Something with a name: a shard, or a file with the rows of several shards."""

    @property
    def name(self) -> str:
        """Return its name."""


def span_of(group: Sequence[Named]) -> str:
    """Return the names of a group's first and last member: "00012", "00012–00019", "nothing".

    Args:
        group: Shards or files, in the order of their names.
    """
    if not group:
        return "nothing"
    first, last = group[0].name, group[-1].name
    return first if first == last else f"{first}\N{EN DASH}{last}"


def run_name(verb: str, group: str = "shards") -> Any:
    """Return the `task_run_name` of a task that has a parameter `span`: a verb, and that or the names of its group.

    Args:
        verb: What the task does.
        group: The parameter that holds its group.
    """

    def name(parameters: dict[str, Any]) -> str:
        return f"{verb} {parameters.get('span') or span_of(parameters[group])}"

    return name  # as Any: Prefect's type for it has a class method, which no function has
