"""Ids as the text that is compared, and text as UTF-8 can hold it."""

from __future__ import annotations

from typing import Any


def canonical_id(value: Any) -> str:
    """An id as the text that is compared: 12, 12.0 (an integer column that once held a null) and "12" are one id."""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return printable(str(value))


def printable(text: str) -> str:
    """The text with what UTF-8 cannot hold, such as the bytes of a Latin-1 name, as backslash escapes."""
    return text.encode("utf-8", "backslashreplace").decode()
