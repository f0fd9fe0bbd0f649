"""Reads JSON that an earlier run wrote, or somebody else, and checks that it has the form that is expected."""

import json
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints, is_typeddict

from ..errors import UserError
from .messages import shortened

_NAMES = {
    **{str: "text", int: "an integer", float: "a number", bool: "true or false"},
    **{NoneType: "null", list: "a list", tuple: "a list", dict: "an object"},
}


def parse_json(text: str | bytes) -> Any:
    """`json.loads` whose errors are all of the kind `ValueError`; by itself, deep nesting is a `RecursionError`."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path: Path, expected: Any, how_to_mend: str) -> Any:
    """Read a JSON file.

    Args:
        path (`Path`): UTF-8.
        expected: what it must hold, see [`misfit`].
        how_to_mend (`str`): a sentence for the message.

    Raises:
        ValueError: if it cannot be read or holds something else, naming the file and the place in it.
    """
    try:
        return check(parse_json(path.read_bytes()), expected)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be used ({error}). {how_to_mend}") from error


def check_unchanged(before: dict[str, Any], now: dict[str, Any], holds: str, how_to_mend: str) -> None:
    """Check that settings, JSON values, are those that something was made with.

    Args:
        before, now (`dict`): the settings.
        holds (`str`): beginning of the message: what was made with them, and where it is.
        how_to_mend (`str`): a sentence for the message.

    Raises:
        ValueError: naming the first that differs.
    """
    for name in (name for name in {**before, **now} if before.get(name) != now.get(name)):
        was, is_now = shortened(before.get(name)), shortened(now.get(name))
        raise UserError(f"{holds} with {name[:60]}={was}; now it is {is_now}. {how_to_mend}")


def check(value: Any, expected: Any, place: str = "") -> Any:
    """The value, if it is of a type, see [`misfit`].

    Raises:
        ValueError: if it is not, saying where.
    """
    if (problem := misfit(value, expected, place)) is not None:
        raise ValueError(problem)
    return value


def misfit(value: Any, expected: Any, place: str = "") -> str | None:
    """Why a value that was read from JSON is not of a type; None if it is.

    Args:
        value: what was read.
        expected: `Any`, a plain type (`float` takes integers too), a union, `list[...]`, `tuple[...]` for a list of
            that length, `dict[str, ...]`; a `TypedDict`, which may have other names too, a `NamedTuple` or a
            dataclass, which may not.
        place (`str`): what the value is called in the answer.
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
        inside = [(each, types[number], f"{place}[{number}]") for number, each in enumerate(value)]
    elif kind is dict:
        inside = [(each, parts[1], f"{place}.{name[:40]}".lstrip(".")) for name, each in value.items()]
    return next((problem for each in inside if (problem := misfit(*each)) is not None), None)


def _optional(record: Any) -> frozenset[str]:
    """Names of a record that may be missing; all fields of our dataclasses and tuples are needed."""
    return getattr(record, "__optional_keys__", frozenset())
