"""Dataclasses shared by the subcommands, and a parser that refuses what it does not know by its nearest right name."""

import argparse
import copy
import difflib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import yaml
from trl import TrlParser

from ..data.errors import shortened
from ..data.json_files import check, parse_json, read_json
from ..errors import UserError
from ..optional_packages import check_packages
from .launch import is_launched, launch_options, read_flags
from .yaml_file import read_yaml

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


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
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column with the prompt; without one, whole conversations are taken from `messages`."},
    )
    completion_column: str = field(default="completion", metadata={"help": "Column with the completion."})
    references_column: str = field(default="references", metadata={"help": "Column with reference texts."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})


@dataclass
class TeacherArguments:
    """The teacher."""

    teacher_model_name_or_path: str = field(metadata={"help": "Name or folder of the teacher model."})


@dataclass
class EarlyStoppingArguments:
    """When to stop before the last step."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."},
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "How much better counts as better."})

    def callbacks(self, args: "TrainingArguments") -> "list[TrainerCallback]":
        """The callback that stops, if it is asked for.

        Raises:
            ValueError: if there is no best checkpoint to go back to, or the patience is none.
        """
        if self.early_stopping_patience is None:
            if self.early_stopping_threshold:
                raise UserError("early_stopping_threshold has no effect without early_stopping_patience. Set it.")
            return []
        if self.early_stopping_patience < 1:
            raise UserError(f"early_stopping_patience must be at least 1, got {self.early_stopping_patience}.")
        if not args.load_best_model_at_end or args.metric_for_best_model is None:
            raise UserError(
                f"early_stopping_patience={self.early_stopping_patience} goes back to the best checkpoint: set "
                "load_best_model_at_end=true and metric_for_best_model (eval_rouge_l or eval_loss)."
            )
        from transformers import EarlyStoppingCallback  # takes seconds

        return [EarlyStoppingCallback(self.early_stopping_patience, self.early_stopping_threshold)]


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
        raise UserError(f"{message}. `{self.prog} --help` lists the options.")


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
        elif action.dest.endswith("_kwargs"):
            action.type = _mapping
        elif action.dest in ("accelerator_config", "deepspeed", "fsdp_config"):
            action.type = _mapping_or_file
    return parser


def _mapping(text: str) -> str:
    """JSON of an object, which the dataclasses parse; they take any other text as it is."""
    try:
        check(parse_json(text), dict[str, Any])
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {shortened(text)} ({error})") from error
    return text.strip()


def json_object(text: str) -> dict[str, Any]:
    """The type of an option that takes a JSON object, or in YAML a mapping."""
    return parse_json(_mapping(text))


def _mapping_or_file(text: str) -> str:
    """The same, or the name of a file of it."""
    if not Path(text).is_file():
        return _mapping(text)
    try:
        read_json(Path(text), dict[str, Any], "Mend the file, or name another.")
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


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
            values, for YAML with file and line; for a package that is not installed; for a process that does not know
            about the others of its launch.
    """
    argv = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]
    if "--config" in argv:
        check_config(parser, _config_path(argv))
    _check_flags(argv, {action.dest for action in parser._actions})
    try:
        *values, from_yaml, from_cli = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # what the configurations of TRL and transformers refuse
        if "Default process group has not been initialized" not in str(error):
            raise UserError(str(error)) from error
        raise UserError(
            "ddp_backend is for several processes, and this is one that no launcher has started. Leave it out, or add "
            "--accelerate_config NAME --num_processes N."
        ) from error
    # what follows the dataclasses is a namespace with --config, which only the help needs
    instances = tuple(values[: len(parser.dataclass_types)])
    settings = {name: value for instance in instances for name, value in vars(instance).items()}
    for name, value in settings.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{name} must be a number, got {value}.")
    check_packages(settings)
    flags = read_flags(from_yaml, from_cli)
    if flags and not is_launched():
        return instances, flags
    if any(hasattr(instance, "distributed_state") for instance in instances):  # of training arguments
        from ..processes import check_processes

        check_processes()
    return instances, {}


def check_config(parser: Parser, path: Path) -> None:
    """Check the names and values of a YAML file for [`parse`].

    Raises:
        ValueError: with file and line.
    """
    # reversed, so that of an option and its `--no_` twin, which share a name, the option itself is kept
    known = {action.dest: action for action in reversed(parser._actions)}
    # `env` is TrlParser's: variables of the environment
    check_yaml(
        path, known, lambda name: name == "env" or _is_launch_option(name), _annotations(parser.dataclass_types)
    )


def _is_launch_option(name: str) -> bool:
    return f"--{name}" in launch_options()


def parse_plain(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of a subcommand that has no YAML.

    Raises:
        ValueError: for an unknown flag, with the nearest right name.
    """
    values, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown(parser, unknown[0])
    return values


def _unknown(parser: argparse.ArgumentParser, word: str) -> UserError:
    known = {action.dest for action in parser._actions}
    name = word.partition("=")[0]  # a value may be a secret
    return UserError(f"unknown option {name!r}.{_nearest(name.removeprefix('--'), known)}")


def parse_with_config(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str | None]]:
    """Parse the arguments of a subcommand that starts no training and has an option `--config` for a YAML file.

    Args:
        parser (`argparse.ArgumentParser`): in the YAML, an option with several values takes a list, and one whose
            values are `NAME=VALUE` a mapping as well.
        argv (`list[str]`): arguments; they override the file's.

    Returns:
        The values, and the flags meant for `accelerate launch`, see [`parse`].

    Raises:
        ValueError: for an unknown option, and for a value of the file that its option does not take, with the line.
    """
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path, rest = config.parse_known_args(argv)[0].config, argv
    if path is not None:
        check_plain_yaml(parser, path)
        rest = [*_words(parser, read_yaml(path)[0]), *argv]
    values, unknown = parser.parse_known_args(rest)
    words = [part for word in unknown for part in (word.split("=", 1) if word.startswith("--") else [word])]
    if words and words[0] not in launch_options():
        raise _unknown(parser, words[0])
    flags = read_flags([], words)
    return values, {} if is_launched() else flags


def check_plain_yaml(parser: argparse.ArgumentParser, path: Path) -> None:
    """Check the names and values of a YAML file for [`parse_with_config`].

    Raises:
        ValueError: with file and line.
    """
    known = {action.dest: action for action in parser._actions if action.dest not in ("help", "config")}
    # all of them become words of a command line
    annotations = {
        name: "list | dict | None" if action.nargs == "+" else "dict | None" if action.type is json_object else "None"
        for name, action in known.items()
    }
    check_yaml(path, known, lambda name: False, annotations)


def _words(parser: argparse.ArgumentParser, values: dict[str, Any]) -> list[str]:
    """The values of a YAML file as words of a command line."""
    known, words = {action.dest: action for action in parser._actions}, []
    for name, value in values.items():
        if value is None or value is False:
            continue
        if known[name].type is json_object:
            value = json.dumps(value)
        if isinstance(value, dict):
            value = [f"{key}={each}" for key, each in value.items()]
        if known[name].nargs == "+":
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"--{name}" if known[name].nargs == 0 else f"--{name}={value}")
    return words


def check_yaml(
    path: Path, known: dict[str, argparse.Action], is_other: Callable[[str], bool], annotations: dict[str, str]
) -> None:
    """Check a YAML file against the options.

    Args:
        path (`Path`): of the file.
        known (`dict[str, argparse.Action]`): the options by name.
        is_other (`Callable`): whether a name that no option has may stand there too; nothing is checked of its value.
        annotations (`dict[str, str]`): types of the options, as a dataclass annotates them.

    Raises:
        ValueError: with file and line.
    """
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    _, node = read_yaml(path)
    if not isinstance(node, yaml.MappingNode):
        raise UserError(f"{path}:1: expected `name: value` lines.")
    for key_node, value_node in node.value:
        name, line = key_node.value, key_node.start_mark.line + 1
        if name not in known and not is_other(name):
            raise UserError(f"{path}:{line}: unknown option {shortened(name)}.{_nearest(name, known)}")
        elif name in known:
            _check_yaml_value(known[name], value_node, annotations[name], f"{path}:{line}: {name}")
        elif name == "env":
            _check_environment(value_node, f"{path}:{line}: env")


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
            raise UserError(f"{place}: expected lines of `NAME: value`, which become variables of the environment.")


def _check_yaml_value(action: argparse.Action, node: yaml.Node, annotation: str, place: str) -> None:
    if isinstance(node, yaml.MappingNode) and "dict" not in annotation:
        raise UserError(f"{place}: expected one value, got a mapping.")
    if isinstance(node, yaml.SequenceNode) and "list" not in annotation:
        raise UserError(f"{place}: expected one value, got a list.")
    kind = getattr(action.type, "__name__", "")
    if isinstance(node, yaml.SequenceNode) and kind in ("int", "float"):
        for each in node.value:
            _check_yaml_value(action, each, annotation, place)
    if node.tag.endswith(":null") and "None" not in annotation:
        raise UserError(f"{place}: expected a value, got null. Leave it out for the default.")
    if not isinstance(node, yaml.ScalarNode) or node.tag.endswith(":null"):
        return
    is_text = annotation in _TEXT and action.dest != "resume_from_checkpoint"  # which is true as well
    if is_text and not node.tag.endswith(":str"):
        raise UserError(f"{place}: expected text, got {shortened(node.value)} without quotes. Put it in quotes.")
    if action.nargs == 0 and not node.tag.endswith(":bool"):
        raise UserError(f"{place}: expected true or false, got {shortened(node.value)}.")
    if action.choices is not None and node.value not in map(str, action.choices):
        # argparse checks the choices of the command line, but not those of a default, which a YAML value becomes
        raise UserError(
            f"{place}: expected one of {', '.join(map(str, action.choices))}, got {shortened(node.value)}."
        )
    is_number = kind in ("int", "float")
    is_yaml_bool = node.tag.endswith(":bool")  # also `on` and `off`, which the command line does not know
    if action.type in (None, str) or action.choices is not None or (is_yaml_bool and not is_number):
        return
    try:
        action.type(node.value)
    except (TypeError, ValueError, argparse.ArgumentTypeError) as error:
        names = {
            "string_to_bool": "true or false",
            "_mapping": "a mapping",
            "json_object": "a mapping",
            "_mapping_or_file": "a mapping or file",
        }
        expected = names.get(kind, kind)
        raise UserError(f"{place}: expected {expected}, got {shortened(node.value)}.") from error


def _annotations(dataclass_types: Iterable[type]) -> dict[str, str]:
    """Annotations of the fields, as HfArgumentParser simplifies their types."""
    classes = [base for dataclass_type in dataclass_types for base in reversed(dataclass_type.__mro__)]
    annotations = [each for base in classes for each in vars(base).get("__annotations__", {}).items()]
    return {name: str(annotation) for name, annotation in annotations}


def _config_path(argv: list[str]) -> Path:
    index = argv.index("--config")
    if index + 1 == len(argv):
        raise UserError("--config needs a file name.")
    return Path(argv[index + 1])


def _check_flags(argv: list[str], known: set[str]) -> None:
    for word in argv:
        name = word.removeprefix("--")
        if not word.startswith("--") or name in known or name.replace("-", "_") in known:
            continue
        if name.removeprefix("no_") in known or _is_launch_option(name):  # `--no_` is argparse's way to switch off
            continue
        raise UserError(f"unknown option {word!r}.{_nearest(name, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {near[0]!r}?" if near else ""
