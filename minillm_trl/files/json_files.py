"""Read JSON files and check that their content has the expected form."""

import json
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..errors import UserError
from .messages import shortened

# What messages call a JSON value of a Python type
_NAMES: dict[Any, str] = {
    **{str: "text", int: "an integer", float: "a number", bool: "true or false"},
    **{NoneType: "null", list: "a list", tuple: "a list", dict: "an object"},
}


def parse_json(text: str | bytes) -> Any:
    """Parse JSON like `json.loads`, but raise `ValueError` for deep nesting too, instead of `RecursionError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, expected: Any, remedy: str) -> Any:
    """Read a JSON file and check its content.

    Args:
        path (`Path`): file, in UTF-8.
        expected: type of the content, see [`misfit`].
        remedy (`str`): sentence that ends the message of an error.

    Raises:
        ValueError: naming the file and the place in it, if it cannot be read or its content has another type.
    """
    try:
        return check(parse_json(path.read_bytes()), expected)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be used ({error}). {remedy}") from error


def check_unchanged(before: dict[str, Any], now: dict[str, Any], holds: str, remedy: str) -> None:
    """Check that settings are the same as when a file or folder was made.

    Args:
        before, now (`dict`): settings, as JSON values.
        holds (`str`): beginning of the message: what was made with `before`, and where it is.
        remedy (`str`): sentence that ends the message.

    Raises:
        ValueError: naming the first setting that differs.
    """
    for name in (name for name in {**before, **now} if before.get(name) != now.get(name)):
        was, is_now = shortened(before.get(name)), shortened(now.get(name))
        raise UserError(f"{holds} with {name[:60]}={was}; now it is {is_now}. {remedy}")


def check(value: Any, expected: Any, place: str = "") -> Any:
    """Return the value if it has the expected type, see [`misfit`].

    Raises:
        ValueError: naming the place in the value that has another type.
    """
    if (problem := misfit(value, expected, place)) is not None:
        raise ValueError(problem)
    return value


def misfit(value: Any, expected: Any, place: str = "") -> str | None:
    """Explain why a JSON value does not have the expected type; return None if it does.

    Args:
        value: value that was read from JSON.
        expected: `Any`, a plain type (`float` accepts integers), a union, `list[...]`, `tuple[...]` for a list of that
            length, `dict[str, ...]`, a `TypedDict` (unknown keys are accepted), or a `NamedTuple` or dataclass
            (unknown keys are not).
        place (`str`): name of the value in the answer.
    """
    origin, parts = get_origin(expected), get_args(expected)
    if expected is Any:
        return None
    if origin in (Union, UnionType):
        problems = [misfit(value, part, place) for part in parts]
        return None if None in problems else problems[0]
    is_record = is_typeddict(expected) or is_dataclass(expected) or hasattr(expected, "_fields")
    kind = dict if is_record else origin or expected
    accepted = {float: (float, int), tuple: (list,)}.get(kind, (kind,))
    if type(value) not in accepted or (kind is tuple and len(value) != len(parts)):
        return f"{place or 'it'} is {shortened(value)}, not {_NAMES[kind]}"
    inside: list[tuple[Any, Any, str]] = []
    if is_record:
        hints = get_type_hints(expected)
        if missing := [name for name in hints if name not in value and name not in _optional(expected)]:
            return f"{place or 'it'} has no {missing[0]!r}"
        if not is_typeddict(expected) and (unknown := value.keys() - hints.keys()):
            return f"{place or 'it'} has {shortened(min(unknown))}, which is unknown"
        inside = [(value[name], hint, f"{place}.{name}".lstrip(".")) for name, hint in hints.items() if name in value]
    elif kind is list or kind is tuple:
        types = parts if kind is tuple else [parts[0]] * len(value)
        inside = [(item, types[index], f"{place}[{index}]") for index, item in enumerate(value)]
    elif kind is dict:
        inside = [(item, parts[1], f"{place}.{name[:40]}".lstrip(".")) for name, item in value.items()]
    return next((problem for arguments in inside if (problem := misfit(*arguments)) is not None), None)


def _optional(record: Any) -> frozenset[str]:
    """Return the keys that may be missing. Only a `TypedDict` has such keys: our other records need every field."""
    return getattr(record, "__optional_keys__", frozenset())
