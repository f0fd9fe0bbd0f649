"""The error of all data problems."""

from typing import Any


class DataError(ValueError):
    """Data that cannot be used; the message names the place, the field, what was seen and how to mend it."""


def shortened(value: Any, limit: int = 60) -> str:
    """`repr` cut to `limit` characters."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
