"""Dataclasses shared by the subcommands, and parsers that refuse an unknown option and offer the nearest known one."""

import argparse
import copy
import json
import math
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from trl import TrlParser

from ..errors import UserError
from ..hardware.optional_packages import check_packages
from .launch import is_launch_option, is_launched, read_flags
from .option_names import aliases, check_given_once, check_stray_words, given_options, right_name
from .option_values import json_object, mapping, mapping_or_file, read_config, with_first_names
from .presets import apply_preset

if TYPE_CHECKING:
    from transformers import TrainerCallback, TrainingArguments


@dataclass
class DataArguments:
    """Source of the examples."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "`e2e` (ships with the package), a .jsonl, .json, .csv or .parquet file, a folder, or a dataset "
            "on the hub. Required unless `datasets` is given.",
            "aliases": ["--dataset"],
        },
    )
    datasets: list[Any] | None = field(
        default=None,
        metadata={
            "help": "In YAML, as in TRL: a mixture of datasets, each with `path` and optionally `name`, `split`, "
            "`columns` and `fraction`."
        },
    )
    test_split_size: float | None = field(
        default=None, metadata={"help": "Share of `datasets` that is kept for evaluation, drawn with seed 0."}
    )
    dataset_streaming: bool = field(
        default=False,
        metadata={
            "help": "Read the training examples of `dataset_name` while training instead of loading them first. Needs "
            "max_steps."
        },
    )
    streaming: bool = field(
        default=False, metadata={"help": "The same for `datasets`, one after another; not with fractions."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a dataset on the hub."})
    dataset_train_split: str = field(default="train", metadata={"help": "Split to train on."})
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split to evaluate on while training.", "aliases": ["--dataset_eval_split"]},
    )
    eval_dataset: str | None = field(
        default=None, metadata={"help": "Source of the evaluation split, if different from `dataset_name`."}
    )
    prompt_column: str = field(
        default="prompt",
        metadata={"help": "Column with the prompt; without one, whole conversations are taken from `messages`."},
    )
    completion_column: str = field(default="completion", metadata={"help": "Column with the completion."})
    references_column: str = field(default="references", metadata={"help": "Column with reference texts."})
    max_train_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})
    max_eval_rows: int | None = field(default=None, metadata={"help": "Use the first rows only."})

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.datasets is None):
            problem = "is missing" if self.datasets is None else "and datasets are both given"
            raise UserError(f"dataset_name {problem}. Give dataset_name, or in YAML a list `datasets`.")
        if self.datasets is not None:
            for name, default, key in (("dataset_config", None, "name"), ("dataset_train_split", "train", "split")):
                if (value := getattr(self, name)) != default:
                    raise UserError(
                        f"{name}={value!r} belongs to dataset_name. Set `{key}` in the entries of datasets."
                    )
        if self.datasets is None and self.test_split_size is not None:
            raise UserError("test_split_size belongs to `datasets`. For dataset_name, set dataset_test_split.")
        if self.streaming and self.datasets is None:
            raise UserError("streaming belongs to `datasets`. For dataset_name, set dataset_streaming.")
        if self.dataset_streaming and self.datasets is not None:
            raise UserError("dataset_streaming belongs to dataset_name. For datasets, set streaming.")
        if self.streaming and self.test_split_size is not None:
            raise UserError(
                "test_split_size draws from all rows, which a stream does not have. Name other data with eval_dataset."
            )
        if self.test_split_size is not None and not 0.0 < self.test_split_size < 1.0:
            raise UserError(f"test_split_size must lie between 0 and 1, got {self.test_split_size}.")

    @property
    def is_streamed(self) -> bool:
        """Whether the training examples are read while training."""
        return self.dataset_streaming or self.streaming

    @property
    def source(self) -> str:
        """What the examples are called in messages and records."""
        if self.dataset_name is not None:
            return self.dataset_name
        from ..data.mixtures import parse_parts  # imports datasets, which `--help` does not need

        return " + ".join(part.source for part in parse_parts(self.datasets))

    @property
    def eval_source(self) -> str:
        """What the evaluation examples are called."""
        return self.eval_dataset or self.source


@dataclass
class TeacherArguments:
    """The teacher."""

    teacher_model_name_or_path: str = field(
        metadata={"help": "Name or folder of the teacher model.", "aliases": ["--teacher"]}
    )


@dataclass
class EarlyStoppingArguments:
    """Early stopping."""

    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after this many evaluations without a better metric_for_best_model."},
    )
    early_stopping_threshold: float = field(default=0.0, metadata={"help": "Smallest improvement that counts."})

    def callbacks(self, args: "TrainingArguments") -> "list[TrainerCallback]":
        """Return the early-stopping callback, or nothing without `early_stopping_patience`.

        Raises:
            ValueError: if the run keeps no best checkpoint to go back to, or the patience is below 1.
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
        from transformers import EarlyStoppingCallback  # takes seconds to import

        return [EarlyStoppingCallback(self.early_stopping_patience, self.early_stopping_threshold)]


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _format_action_invocation(self, action: argparse.Action) -> str:
        # HfArgumentParser also has every option with dashes, which would double the length of the help
        shown = copy.copy(action)
        shown.option_strings = [option for option in action.option_strings if "-" not in option[2:]]
        return super()._format_action_invocation(shown)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.required else super()._get_help_string(action)


class PlainParser(argparse.ArgumentParser):
    """Parser of a subcommand without dataclasses. Options cannot be abbreviated."""

    def __init__(self, name: str, **kwargs: Any):
        super().__init__(f"minillm-trl {name}", allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise _parsing_error(self, message)


def _parsing_error(parser: argparse.ArgumentParser, message: str) -> UserError:
    return UserError(f"{message}. `{parser.prog} --help` lists the options.")


class Parser(TrlParser):
    """`TrlParser` whose help groups the options by dataclass, inherited ones last, and whose errors are exceptions."""

    def __init__(self, dataclass_types: Iterable[Any], **kwargs: Any):
        classes: tuple[Any, ...] = tuple(dataclass_types)
        super().__init__(classes, allow_abbrev=False, formatter_class=_HelpFormatter, **kwargs)
        for dataclass_type in classes:
            summary = (dataclass_type.__doc__ or "").strip().splitlines()[0].rstrip(".")
            self._move(dataclass_type, f"{dataclass_type.__name__}: {summary}")
        for dataclass_type in classes:
            for base in dataclass_type.__mro__[1:]:
                title = f"inherited from {base.__name__.lstrip('_')}"
                if is_dataclass(base):
                    self._move(base, title)

    def _move(self, dataclass_type: Any, title: str) -> None:
        names = vars(dataclass_type).get("__annotations__", {})
        moved = [action for action in self._optionals._group_actions if action.dest in names]
        if not moved:
            return
        self.add_argument_group(title)._group_actions.extend(moved)
        for action in moved:
            self._optionals._group_actions.remove(action)

    def set_defaults_with_config(self, **kwargs: Any) -> list[str]:
        """Set defaults from the values of a YAML file, which may use aliases of options."""
        return super().set_defaults_with_config(**with_first_names(self, kwargs))

    def error(self, message: str) -> NoReturn:
        raise _parsing_error(self, message)


def make_parser(name: str, dataclass_types: Sequence[type], description: str) -> Parser:
    """Return the parser of a training subcommand."""
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
        if action.dest == "model_name_or_path":  # TRL's default is None, with which no command works
            action.required = True
        elif action.dest.endswith("_kwargs"):
            action.type = mapping
        elif action.dest in ("accelerator_config", "deepspeed", "fsdp_config"):
            action.type = mapping_or_file
    return parser


def parse(parser: Parser, argv: list[str]) -> tuple[tuple[Any, ...], dict[str, str | None]]:
    """Parse YAML and command line into the parser's dataclasses.

    Args:
        parser ([`Parser`]): from [`make_parser`].
        argv (`list[str]`): arguments; `--config FILE` names a YAML file whose values they override.

    Returns:
        The dataclass instances, and the flags for `accelerate launch`. The flags are empty without a hand-over, and in
        a process that a launcher has started, since its settings are fixed.

    Raises:
        ValueError: for unreadable YAML, unknown keys and flags (with the nearest known name) and wrong values, in YAML
            with file and line; for a package that is not installed; for a process that is unaware of the others of
            its launch.
    """
    argv = [
        part for word in argv for part in (word.split("=", 1) if word.startswith("--") and "=" in word else [word])
    ]
    _check_words(parser, argv, is_launchable=True)
    # `read_config` checks the file, with lines; `TrlParser` reads it again
    from_file = read_config(parser, _config_path(argv)) if "--config" in argv else {}
    preset_fields = apply_preset(parser, from_file, argv)
    try:
        *values, from_yaml, from_cli = parser.parse_args_and_config(
            argv, return_remaining_strings=True, separate_remaining_strings=True
        )
    except UserError:
        raise
    except (ImportError, ValueError) as error:  # raised by the configurations of TRL and transformers
        if "Default process group has not been initialized" not in str(error):
            raise UserError(str(error)) from error
        raise UserError(
            "ddp_backend needs several processes, and no launcher has started this one. Leave it out, or add "
            "--accelerate_config NAME --num_processes N."
        ) from error
    # the namespace that follows the dataclasses holds --config, which only the help needs
    instances = tuple(values[: len(tuple(parser.dataclass_types))])
    settings = {name: value for instance in instances for name, value in vars(instance).items()}
    for name, value in settings.items():
        if isinstance(value, float) and math.isnan(value):
            raise UserError(f"{name} must be a number, got {value}.")
    check_packages(settings)
    flags = read_flags(from_yaml, from_cli)
    if flags and not is_launched():
        return instances, flags
    if preset_fields and os.environ.get("RANK", "0") == "0":
        print(preset_fields, file=sys.stderr)
    if any(hasattr(instance, "distributed_state") for instance in instances):  # training arguments
        from ..hardware.processes import check_processes

        check_processes()
    return instances, {}


def parse_plain(parser: argparse.ArgumentParser, argv: list[str]) -> argparse.Namespace:
    """Parse the arguments of a subcommand without `--config`.

    Raises:
        ValueError: for an unknown flag, with the nearest known name.
    """
    _check_words(parser, argv, is_launchable=False)
    return parser.parse_args(argv)


def _check_words(parser: argparse.ArgumentParser, argv: list[str], is_launchable: bool) -> None:
    """Refuse words that argparse would misread, or would report only after missing options."""
    for option in given_options(parser, argv):
        if option.word and option.action is None and not (is_launchable and is_launch_option(option.word[2:])):
            known = {action.dest for action in parser._actions} | aliases(parser).keys()
            raise UserError(f"unknown option {option.word!r}.{right_name(option.word[2:], known)}")
    check_given_once(parser, argv)
    check_stray_words(parser, argv)


def parse_with_config(
    parser: argparse.ArgumentParser, argv: list[str]
) -> tuple[argparse.Namespace, dict[str, str | None]]:
    """Parse the arguments of a subcommand without dataclasses that has `--config` for a YAML file.

    Args:
        parser (`argparse.ArgumentParser`): in YAML, an option with several values takes a list, or a mapping if its
            values are `NAME=VALUE`.
        argv (`list[str]`): arguments; they override the file.

    Returns:
        The values, and the flags meant for `accelerate launch`, see [`parse`].

    Raises:
        ValueError: for an unknown option, and for a value in the file that its option does not accept, with the line.
    """
    _check_words(parser, argv, is_launchable=True)
    config = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    config.add_argument("--config", type=Path)
    path, rest = config.parse_known_args(argv)[0].config, argv
    if path is not None:
        rest = [*_words(parser, read_config(parser, path)), *argv]
    values, unknown = parser.parse_known_args(rest)
    words = [part for word in unknown for part in (word.split("=", 1) if word.startswith("--") else [word])]
    flags = read_flags([], words)
    return values, {} if is_launched() else flags


def _words(parser: argparse.ArgumentParser, values: dict[str, Any]) -> list[str]:
    """Return the values of a YAML file as words of a command line."""
    known, words = {action.dest: action for action in parser._actions}, []
    for name, value in values.items():
        if value is None or value is False:
            continue
        if known[name].type is json_object:
            value = json.dumps(value)
        if isinstance(value, dict):
            value = [f"{key}={item}" for key, item in value.items()]
        if known[name].nargs == "+":
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
        else:
            words.append(f"--{name}" if known[name].nargs == 0 else f"--{name}={value}")
    return words


def _config_path(argv: list[str]) -> Path:
    index = argv.index("--config")
    if index + 1 == len(argv):
        raise UserError("--config needs a file name.")
    return Path(argv[index + 1])
