"""The record of a training subcommand's run, and the YAML that repeats it."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from ..errors import UserError
from ..files.redaction import is_secret
from ..training.run_record import RunRecord
from .arguments import Parser
from .launch import launched_with


def record_run(
    subcommand: str, argv: Sequence[str], parser: Parser, parsed: Sequence[Any], checkpoint: str | bool | None
) -> RunRecord:
    """The record of a run, to be entered once its input is checked.

    Args:
        subcommand (`str`): of `minillm-trl`.
        argv (`Sequence[str]`): its arguments.
        parser ([`Parser`]): that has parsed them.
        parsed (`Sequence`): the dataclasses.
        checkpoint (`str` or `bool`, *optional*): that the run goes on from; True for the newest, if there is one.
    """
    _hide_tokens(parsed)
    return RunRecord(subcommand, argv, repeating_options(parser, argv), parsed, checkpoint)


def add_models(record: RunRecord, args: TrainingArguments, student: str, teacher: str | None = None) -> None:
    """Note the models of a training, with the revisions that its arguments name."""
    record.add_model("student", student, args.model_init_kwargs["revision"])
    if teacher is not None:
        record.add_model("teacher", teacher, (args.teacher_model_init_kwargs or {}).get("revision"))


def repeating_options(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """The options that make the same run again: those that were given, then the defaults of the others.

    They are as they were before the dataclasses complete them, so that nothing is said twice in two ways. Options
    with secrets are left out, the checkpoint that a run goes on from, and defaults of None.

    Args:
        parser ([`Parser`]): that has parsed `argv` before, so that its defaults are those of the YAML by now.
        argv (`Sequence[str]`): arguments.
    """
    values = vars(parser.parse_known_args([*argv])[0])
    fresh = Parser(parser.dataclass_types)
    names = dict.fromkeys(action.dest for action in fresh._actions if action.dest in values)
    kept = {name: values[name] for name in names if name != "resume_from_checkpoint" and not is_secret(name)}
    given = {name: value for name, value in kept.items() if value != fresh.get_default(name)}
    defaults = {name: value for name, value in kept.items() if name not in given and value is not None}
    return {**given, **launched_with(), **_variables(values["config"]), **defaults}


def _variables(config: str | None) -> dict[str, dict[str, Any]]:
    """The `env` of a YAML, which sets variables of the environment, without the secrets."""
    if config is None:
        return {}
    variables = yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("env", {})
    kept = {name: value for name, value in variables.items() if not is_secret(name)}
    return {"env": kept} if kept else {}


def _hide_tokens(parsed: Sequence[Any]) -> None:
    """Let the environment know the hub's token, not the arguments, which are saved with the model.

    Raises:
        ValueError: for a token among the keyword arguments of a model.
    """
    for args in (each for each in parsed if isinstance(each, TrainingArguments)):
        if args.hub_token is not None:
            os.environ["HF_TOKEN"] = args.hub_token
            args.hub_token = None
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            for key in filter(is_secret, getattr(args, name, None) or {}):
                raise UserError(
                    f"{name} has {key!r}, which would be saved with the model. Set the variable HF_TOKEN of the "
                    "environment instead."
                )
