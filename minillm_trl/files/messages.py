"""The one exception of this package's data code, and how it words what it saw."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from ..errors import UserError


class DataError(UserError):
    """Data that cannot be used as it is. The message says where, what was seen, and how to mend it."""


def shortened(value: Any, limit: int = 60) -> str:
    """`repr(value)`, cut to at most `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """A sentence that offers the known name closest to `name`, with a leading space; empty if none is close."""
    by_lower = {candidate.lower(): candidate for candidate in known}
    matches = get_close_matches(name.lower(), by_lower, n=1)
    return f" Did you mean {by_lower[matches[0]]!r}?" if matches else ""


def listing(names: Iterable[str]) -> str:
    """The names as `'a', 'b'`, long ones cut, or the word "none"."""
    return ", ".join(map(shortened, names)) or "none"
