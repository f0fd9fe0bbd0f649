"""Dataclasses shared by the subcommands, and a parser that refuses what it does not know by its nearest right name."""

import argparse
import copy
import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .launch import is_launched, launch_options, read_flags


@dataclass
class DataArguments:
    """Where the examples come from."""

    dataset: str = field(
        metadata={
            "help": "`e2e` (ships with the package), a .jsonl, .json, .csv or .parquet file, a folder, or a dataset "
            "on the hub."
        }
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_eval_split: str | None = field(default=None, metadata={"help": "Split to evaluate on while training."})
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Source of the evaluation split, if it is not `dataset`."}
    )
    prompt_column: str = field(default="prompt", metadata={"help": "Column with the prompt."})
    completion_column: str = field(default="completion", metadata={"help": "Column with the completion."})
    references_column: str = field(default="references", metadata={"help": "Column with reference texts."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser has each option with dashes too, which doubles the length of the help
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        return super()._format_action_invocation(shown)


class Parser(TrlParser):
    """`TrlParser` whose help groups the options by dataclass, inherited ones last, and whose errors are exceptions."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        for dataclass_type in dataclass_types:
            summary = (dataclass_type.__doc__ or "").strip().splitlines()[0].rstrip(".")
            self._move(dataclass_type, f"{dataclass_type.__name__}: {summary}")
        for dataclass_type in dataclass_types:
            for base in filter(is_dataclass, dataclass_type.__mro__[1:]):
                self._move(base, f"inherited from {base.__name__.lstrip('_')}")

    def _move(self, dataclass_type: type, title: str) -> None:
        names = vars(dataclass_type).get("__annotations__", {})
        moved = [action for action in self._optionals._group_actions if action.dest in names]
        if not moved:
            return
        self.add_argument_group(title)._group_actions.extend(moved)
        for action in moved:
            self._optionals._group_actions.remove(action)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def make_parser(name: str, dataclass_types: Sequence[type], description: str) -> Parser:
    """The parser of a training subcommand."""
    parser = Parser(
        dataclass_types,
        prog=f"minillm-trl {name}",
        usage="%(prog)s [--config FILE.yaml] [options]",
        description=description,
        epilog="`--accelerate_config NAME`, `--num_processes N` and the other options of `accelerate launch` hand the "
        "command over to it.",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with values for any of these options")
    for action in parser._actions:
        if action.dest == "model_name_or_path":  # TRL's dataclass has a default of None that no command can use
            action.required = True
    return parser


def parse(parser: Parser, argv: list[str]) -> tuple[tuple[Any, ...], dict[str, str | None]]:
    """Parse YAML and command line into the parser's dataclasses.

    Args:
        parser ([`Parser`]): from [`make_parser`].
        argv (`list[str]`): arguments; `--config FILE` names a YAML file whose values they override.

    Returns:
        The dataclass instances, and the flags meant for `accelerate launch`: none unless a hand-over is asked for, and
        none in a process that a launcher has started, whose settings stand already.

    Raises:
        ValueError: for YAML that cannot be read, unknown keys and flags (with the nearest right name) and wrong
            values; for YAML with file and line.
    """
    argv = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]
    # reversed, so that of an option and its `--no_` twin, which share a name, the option itself is kept
    known = {action.dest: action for action in reversed(parser._actions)}
    launch = {option.removeprefix("--") for option in launch_options()}
    if "--config" in argv:
        check_yaml(_config_path(argv), known, launch, _list_fields(parser.dataclass_types))
    _check_flags(argv, set(known), launch)
    *values, from_yaml, from_cli = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # what follows the dataclasses is a namespace with --config, which only the help needs
    instances = tuple(values[: len(parser.dataclass_types)])
    flags = read_flags(from_yaml, from_cli)
    return instances, {} if is_launched() else flags


def parse_plain(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of a subcommand that has no YAML.

    Raises:
        ValueError: for an unknown flag, with the nearest right name.
    """
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        known = {action.dest for action in parser._actions}
        raise ValueError(f"unknown option {unknown[0]!r}.{_nearest(unknown[0].removeprefix('--'), known)}")
    return values


def check_yaml(path: Path, known: dict[str, argparse.Action], launch: set[str], lists: set[str]) -> None:
    """Check a YAML file against the options, those of `accelerate launch`, and those that take lists.

    Raises:
        ValueError: with file and line.
    """
    if not path.is_file():
        raise ValueError(f"--config {path}: no such file.")
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"))
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"{path}:{line}: broken YAML: {error.problem}.") from error
    except yaml.reader.ReaderError as error:
        raise ValueError(f"{path}: broken YAML: character #x{error.character:04x} is not allowed.") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}).") from error
    if not isinstance(node, yaml.MappingNode):
        raise ValueError(f"{path}:1: expected `name: value` lines.")
    seen: dict[str, int] = {}
    for key_node, value_node in node.value:
        name, line = key_node.value, key_node.start_mark.line + 1
        if name in seen:
            raise ValueError(f"{path}:{line}: {name!r} stands in line {seen[name]} already.")
        seen[name] = line
        if name not in known and name not in launch and name != "env":
            raise ValueError(f"{path}:{line}: unknown option {name!r}.{_nearest(name, known)}")
        elif name in known:
            _check_yaml_value(known[name], value_node, name in lists, f"{path}:{line}: {name}")


def _check_yaml_value(action: argparse.Action, node: yaml.Node, takes_list: bool, place: str) -> None:
    if isinstance(node, yaml.SequenceNode) and not takes_list and action.type is not None:
        raise ValueError(f"{place}: expected one value, got a list.")
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        return
    if action.choices is not None and node.value not in map(str, action.choices):
        # argparse checks the choices of the command line, but not those of a default, which a YAML value becomes
        raise ValueError(f"{place}: expected one of {', '.join(map(str, action.choices))}, got {node.value!r}.")
    is_number = action.type in (int, float)
    is_yaml_bool = node.tag.endswith(":bool")  # also `on` and `off`, which the command line does not know
    if action.type in (None, str) or action.choices is not None or (is_yaml_bool and not is_number):
        return
    try:
        action.type(node.value)
    except (ValueError, argparse.ArgumentTypeError) as error:
        expected = action.type.__name__ if is_number else "true or false"
        raise ValueError(f"{place}: expected {expected}, got {node.value!r}.") from error


def _list_fields(dataclass_types: Iterable[type]) -> set[str]:
    """Names of the fields that take lists, from the annotations: HfArgumentParser simplifies the fields' types."""
    classes = [base for dataclass_type in dataclass_types for base in dataclass_type.__mro__]
    annotations = [each for base in classes for each in vars(base).get("__annotations__", {}).items()]
    return {name for name, annotation in annotations if "list" in str(annotation)}


def _config_path(argv: list[str]) -> Path:
    index = argv.index("--config")
    if index + 1 == len(argv):
        raise ValueError("--config needs a file name.")
    return Path(argv[index + 1])


def _check_flags(argv: list[str], known: set[str], launch: set[str]) -> None:
    for word in argv:
        name = word.removeprefix("--")
        if not word.startswith("--") or name in known or name.replace("-", "_") in known or name in launch:
            continue
        if name.removeprefix("no_") in known:  # argparse's way to switch a flag off
            continue
        raise ValueError(f"unknown option {word!r}.{_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
