"""The line that a person sees of an error."""

from __future__ import annotations

import pytest

from embedders.errors import one_line


@pytest.mark.parametrize(
    ("error", "options", "line"),
    [
        (OSError("no  space\n\tleft"), {}, "no space left"),
        (OSError("no  space\n\tleft"), {"named": True}, "OSError: no space left"),
        (OSError("no  space\n\tleft"), {"named": True, "limit": 10}, "OSError: n"),
        (MemoryError(), {}, "MemoryError"),
        (MemoryError(), {"named": True}, "MemoryError"),
    ],
)
def test_an_error_is_one_line(error: Exception, options: dict[str, object], line: str) -> None:
    assert one_line(error, **options) == line  # type: ignore[arg-type]
