"""Values of options: JSON on the command line, and YAML values, checked line by line."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from trl import TrlParser

from ..errors import UserError
from ..files.json_files import check, parse_json, read_json
from ..files.messages import shortened
from ..files.yaml_files import read_yaml
from .launch import is_launch_option
from .option_names import aliases, right_name


def mapping(text: str) -> str:
    """Return the text if it is a JSON object. The dataclasses parse it, but accept any other text unchecked."""
    try:
        check(parse_json(text), dict[str, Any])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shortened(text)} ({error})") from error
    return text.strip()


def json_object(text: str) -> dict[str, Any]:
    """Parse a JSON object: the type of an option that takes one, or in YAML a mapping."""
    return parse_json(mapping(text))


def mapping_or_file(text: str) -> str:
    """Return the text if it is a JSON object, or the name of a file with one."""
    if not Path(text).is_file():
        return mapping(text)
    try:
        read_json(Path(text), dict[str, Any], "Fix the file, or name another.")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def read_config(parser: argparse.ArgumentParser, path: Path) -> dict[str, Any]:
    """Read a YAML file of options, and check its names and values.

    Args:
        parser (`argparse.ArgumentParser`): parser of a subcommand. For a parser with dataclasses, the file may also
            have options of the launcher, and `env` with environment variables, which `TrlParser` sets.
        path (`Path`): the YAML file.

    Returns:
        The values by the first names of the options.

    Raises:
        ValueError: with file and line.
    """
    has_dataclasses = isinstance(parser, TrlParser)
    annotations = _annotations(parser)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    content, node = read_yaml(path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: expected `name: value` lines.")
    # reversed: an option and its `--no_` twin share a name, and the option, which comes first, must win
    known = {action.dest: action for action in reversed(parser._actions) if action.dest not in ("help", "config")}
    first_names = aliases(parser)
    lines: dict[str, tuple[str, int]] = {}
    for key_node, value_node in node.value:
        name, line = key_node.value, key_node.start_mark.line + 1
        option = first_names.get(name, name)
        if option not in known and not (has_dataclasses and (name == "env" or is_launch_option(name))):
            raise UserError(
                f"{path}:{line}: unknown option {shortened(name)}.{right_name(name, {*known, *first_names})}"
            )
        elif option in known:
            _check_yaml_value(known[option], value_node, annotations[option], f"{path}:{line}: {name}")
            other = lines.setdefault(option, (name, line))
            if content[other[0]] != content[name]:
                raise UserError(
                    f"{path}:{line}: {name} is another name of {other[0]}, and line {other[1]} has a different value. "
                    "Drop one of them."
                )
        elif name == "env":
            _check_environment(value_node, f"{path}:{line}: env")
    return with_first_names(parser, content)


def with_first_names(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a YAML file with aliases replaced by the names of the options."""
    first_names = aliases(parser)
    return {first_names.get(name, name): value for name, value in values.items()}


_NUMBERS = ("int", "float", "temperature_or_greedy")  # types of options
_TEXT = (str(str), str(str | None))


def _check_environment(node: yaml.Node, place: str) -> None:
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(node, node)]
    for key, value in pairs:
        is_pair = isinstance(key, yaml.ScalarNode) and isinstance(value, yaml.ScalarNode) and key is not value
        if (
            not is_pair
            or key.tag != "tag:yaml.org,2002:str"
            or not key.value
            or {"=", "\0"} & set(key.value + value.value)
        ):
            raise UserError(f"{place}: expected lines of `NAME: value`, which become environment variables.")


def _check_yaml_value(action: argparse.Action, node: yaml.Node, annotation: str, place: str) -> None:
    if isinstance(node, yaml.MappingNode) and "dict" not in annotation:
        raise UserError(f"{place}: expected one value, got a mapping.")
    if isinstance(node, yaml.SequenceNode) and "list" not in annotation:
        raise UserError(f"{place}: expected one value, got a list.")
    kind = getattr(action.type, "__name__", "")
    if isinstance(node, yaml.SequenceNode) and kind in _NUMBERS:
        for item in node.value:
            _check_yaml_value(action, item, annotation, place)
    if node.tag.endswith(":null") and "None" not in annotation:
        raise UserError(f"{place}: expected a value, got null. Leave it out for the default.")
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        return
    is_text = annotation in _TEXT and action.dest != "resume_from_checkpoint"  # which may also be `true`
    if is_text and not node.tag.endswith(":str"):
        raise UserError(f"{place}: expected text, got {shortened(node.value)} without quotes. Put it in quotes.")
    if action.nargs == 0 and not node.tag.endswith(":bool"):
        raise UserError(f"{place}: expected true or false, got {shortened(node.value)}.")
    if action.choices is not None and node.value not in map(str, action.choices):
        # a YAML value becomes a default, and argparse does not check the choices of defaults
        raise UserError(
            f"{place}: expected one of {', '.join(map(str, action.choices))}, got {shortened(node.value)}."
        )
    is_number = kind in _NUMBERS
    is_yaml_bool = node.tag.endswith(":bool")  # also `on` and `off`, which the command line does not accept
    if (
        not callable(action.type)
        or action.type is str
        or action.choices is not None
        or (is_yaml_bool and not is_number)
    ):
        return
    try:
        action.type(node.value)
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        names = {
            "string_to_bool": "true or false",
            "mapping": "a mapping",
            "json_object": "a mapping",
            "mapping_or_file": "a mapping or file",
            "temperature_or_greedy": "a temperature above 0 or greedy",
        }
        expected = names.get(kind, kind)
        raise UserError(f"{place}: expected {expected}, got {shortened(node.value)}.") from error


def _annotations(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Return the types of the options as text, as a dataclass annotates them."""
    if isinstance(parser, TrlParser):  # from the dataclasses: HfArgumentParser simplifies the types of its options
        classes = [base for dataclass_type in parser.dataclass_types for base in reversed(dataclass_type.__mro__)]
        fields = [pair for base in classes for pair in vars(base).get("__annotations__", {}).items()]
        return {name: str(annotation) for name, annotation in fields}
    # from the options, whose YAML values become words of a command line
    return {
        action.dest: "list | dict | None"
        if action.nargs == "+"
        else "dict | None"
        if action.type is json_object
        else "None"
        for action in parser._actions
    }
