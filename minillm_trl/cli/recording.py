"""Record the run of a training subcommand, with the YAML that repeats it."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from transformers import TrainingArguments

from ..errors import UserError
from ..files.redaction import is_secret
from ..models.init_kwargs import parsed_kwargs
from ..training.run_record import RunRecord
from .arguments import Parser
from .launch import launched_with

if TYPE_CHECKING:
    from .training import TrainerConfig


def record_run(
    subcommand: str, argv: Sequence[str], parser: Parser, parsed: Sequence[Any], checkpoint: str | bool | None
) -> RunRecord:
    """Return the record of a run; enter it as a context once the input is checked.

    Args:
        subcommand (`str`): name of the subcommand.
        argv (`Sequence[str]`): its arguments.
        parser ([`Parser`]): the parser that parsed them.
        parsed (`Sequence`): the parsed dataclasses.
        checkpoint (`str` or `bool`, *optional*): the checkpoint to resume from; True for the newest, if any.
    """
    _hide_tokens(parsed)
    return RunRecord(subcommand, argv, repeating_options(parser, argv), parsed, checkpoint)


def add_models(
    record: RunRecord, args: "TrainerConfig", student: str, teachers: Mapping[str | None, str] | None = None
) -> None:
    """Record the models of a run, with the revisions that its arguments name.

    Args:
        record ([`RunRecord`]): the record.
        args: the arguments of the trainer.
        student (`str`): name or folder of the student.
        teachers (`Mapping`, *optional*): names or folders of the teachers in this process; the key of a single one is
            None.
    """
    record.add_model("student", student, (parsed_kwargs(args.model_init_kwargs) or {})["revision"])
    for name, teacher in (teachers or {}).items():
        record.add_model(
            "teacher" if name is None else f"teacher {name}",
            teacher,
            (parsed_kwargs(getattr(args, "teacher_model_init_kwargs", None)) or {}).get("revision"),
        )


def repeating_options(parser: Parser, argv: Sequence[str]) -> dict[str, Any]:
    """Return the options that repeat the run: first those given, then the defaults of the others.

    The values are those before the dataclasses complete them, which would set some options by two names. Options with
    secrets, the checkpoint to resume from, and defaults of None are left out.

    Args:
        parser ([`Parser`]): the parser that parsed `argv`, so its defaults are now those of the YAML.
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
    """Return the `env` of a YAML, which sets environment variables, without secrets."""
    if config is None:
        return {}
    variables = yaml.safe_load(Path(config).read_text(encoding="utf-8")).get("env", {})
    kept = {name: value for name, value in variables.items() if not is_secret(name)}
    return {"env": kept} if kept else {}


def _hide_tokens(parsed: Sequence[Any]) -> None:
    """Move the hub's token from the arguments, which are saved with the model, to the environment.

    Raises:
        ValueError: for a token in the keyword arguments of a model.
    """
    for args in (values for values in parsed if isinstance(values, TrainingArguments)):
        if args.hub_token is not None:
            os.environ["HF_TOKEN"] = args.hub_token
            args.hub_token = None
        for name in ("model_init_kwargs", "teacher_model_init_kwargs"):
            for key in filter(is_secret, getattr(args, name, None) or {}):
                raise UserError(
                    f"{name} has {key!r}, which would be saved with the model. Set the environment "
                    "variable HF_TOKEN instead."
                )
