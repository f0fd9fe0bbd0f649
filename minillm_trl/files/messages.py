"""The exception for unusable data, and helpers that put values and names into messages."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ..errors import UserError


class DataError(UserError):
    """Data that cannot be used. The message names the place, the value and the fix."""


def shortened(value: Any, limit: int = 60) -> str:
    """Return `repr(value)`, cut to at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'NAME'?" for the known name closest to `name`; empty if no name is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[matches[0]]!r}?" if matches else ""


def listing(names: Iterable[str]) -> str:
    """Return the names as `'a', 'b'`, with long names cut; "none" for no names."""
    return ", ".join(map(shortened, names)) or "none"
