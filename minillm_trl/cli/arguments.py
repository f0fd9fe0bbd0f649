"""Dataclasses shared by the subcommands, and a parser that refuses what it does not know by its nearest right name."""

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import yaml
from trl import TrlParser

from .launch import LAUNCHED, launch_flags


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


class Parser(TrlParser):
    """`TrlParser` whose help puts each dataclass's own fields into a group, and whose errors are exceptions."""

    def __init__(self, dataclass_types: Sequence[type], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        for dataclass_type in dataclass_types:
            own = set(vars(dataclass_type).get("__annotations__", {}))
            self._move(own, f"{dataclass_type.__name__}: {(dataclass_type.__doc__ or '').strip().splitlines()[0]}")
        inherited = {action.dest for action in self._optionals._group_actions} - {"help", "config"}
        self._move(inherited, "inherited from TRL and transformers")

    def _move(self, names: set[str], title: str) -> None:
        group = self.add_argument_group(title)
        moved = [action for action in self._optionals._group_actions if action.dest in names]
        group._group_actions.extend(moved)
        for action in moved:
            self._optionals._group_actions.remove(action)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}. `{self.prog} --help` lists the options.")


def make_parser(name: str, dataclass_types: Sequence[type], description: str) -> Parser:
    """The parser of a training subcommand."""
    parser = Parser(dataclass_types, prog=f"minillm-trl {name}", description=description)
    parser.add_argument("--config", metavar="FILE", help="YAML file with values for any of these options")
    return parser


def parse(parser: Parser, argv: list[str]) -> tuple[tuple[Any, ...], list[str]]:
    """Parse YAML and command line into the parser's dataclasses.

    Args:
        parser ([`Parser`]): from [`make_parser`].
        argv (`list[str]`): arguments; `--config FILE` names a YAML file whose values they override.

    Returns:
        The dataclass instances, and the flags meant for `accelerate launch` (empty unless a hand-over is asked for).

    Raises:
        ValueError: for YAML that cannot be read, unknown keys and flags (with the nearest right name) and wrong
            values; for YAML with file and line.
    """
    argv = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]
    known = {action.dest: action for action in parser._actions}
    launch = launch_flags()
    if "--config" in argv:
        check_yaml(_config_path(argv), known, launch)
    _check_flags(argv, set(known), launch)
    *values, from_yaml, from_cli = parser.parse_args_and_config(
        argv, return_remaining_strings=True, separate_remaining_strings=True
    )
    # what follows the dataclasses is a namespace with --config, which only the help needs
    instances = tuple(values[: len(parser.dataclass_types)])
    if os.environ.get(LAUNCHED) == "1":  # a child of the hand-over: those keys of the YAML have been obeyed
        return instances, []
    return instances, [*from_yaml, *from_cli]


def check_yaml(path: Path, known: dict[str, argparse.Action], launch: set[str]) -> None:
    """Check a YAML file against the options, and those of `accelerate launch`.

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
            _check_yaml_value(known[name], value_node, f"{path}:{line}: {name}")


def _check_yaml_value(action: argparse.Action, node: yaml.Node, place: str) -> None:
    if isinstance(node, yaml.SequenceNode) and action.nargs is None and action.type is not None:
        raise ValueError(f"{place}: expected one value, got a list.")
    if not isinstance(node, yaml.ScalarNode) or action.type not in (int, float) or node.tag.endswith(":null"):
        return
    try:
        action.type(node.value)
    except ValueError as error:
        raise ValueError(f"{place}: expected {action.type.__name__}, got {node.value!r}.") from error


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


def _nearest(name: str, known: Sequence[str] | set[str] | dict[str, Any]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
