"""What a command says when its call is wrong."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError
from pydantic import ValidationError

from embedders.errors import InputError, MalformedShard, one_line


def exit_status(app: App, arguments: Sequence[str]) -> int:
    """Run a command and return its exit status: 2, with one line, if the call or its input is wrong.

    Args:
        app: The command.
        arguments: What follows its name.
    """
    try:
        app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (InputError, CycloptsError, MalformedShard, OSError) as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 2
    return 0


def explain(error: BaseException) -> str:
    """Return one line that says what is wrong with a call, and which option to change.

    Args:
        error: What the command raised. If pydantic refused a value somewhere beneath it, the line names the option.

    Example:
        >>> explain(error)  # of `python -m flows.embed shards --output out --batch-size 0`
        "--batch-size: give greater than or equal to 1 or 'auto', not '0'"
    """
    refused = _refusal(error)
    if refused is None:
        return one_line(error)
    first = refused.errors()[0]
    option = "--" + str(first["loc"][0]).replace("_", "-")
    if first["type"].startswith("byte_size"):
        return f"{option}: give a size such as 20GB or 500MiB, not {first['input']!r}"
    wanted = dict.fromkeys(str(each["msg"]).removeprefix("Input should be ") for each in refused.errors())
    return f"{option}: give {' or '.join(wanted)}, not {first['input']!r}"


def _refusal(error: BaseException) -> ValidationError | None:
    """Return pydantic's error that an error is, or was raised from; None if it has nothing to do with pydantic."""
    cause: BaseException | None = error
    seen: set[int] = set()  # a store's client may raise an error that leads back to itself
    while cause is not None and id(cause) not in seen:
        if isinstance(cause, ValidationError):
            return cause
        seen.add(id(cause))
        cause = cause.__cause__ or cause.__context__
    return None
