"""What went wrong, as one line for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import ValidationError

if TYPE_CHECKING:
    pass


def one_line(error: BaseException) -> str:
    """What went wrong, as one line for a person."""
    cause: BaseException | None = error
    seen: set[int] = set()  # a store's client may raise an error that leads back to itself
    while cause is not None and not isinstance(cause, ValidationError) and id(cause) not in seen:
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    if isinstance(cause, ValidationError):
        first = cause.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        if first["type"].startswith("byte_size"):
            return f"{option}: give a size such as 20GB or 500MiB, not {first['input']!r}"
        wrong = " or ".join(dict.fromkeys(str(e["msg"]).removeprefix("Input should be ") for e in cause.errors()))
        return f"{option}: give {wrong}, not {first['input']!r}"
    return " ".join(str(error).split())
