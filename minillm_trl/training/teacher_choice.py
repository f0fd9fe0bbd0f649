"""The teacher of a run as the user gives it: one, or one for each value of a column of the dataset."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from ..config import MiniLLMConfig
from ..errors import UserError
from ..files.messages import listing, nearest
from ..models.end_tokens import declared_ends
from ..rollouts.rollout_teacher import Teacher
from ..rollouts.several_teachers import SeveralTeachers
from ..teacher_server.addresses import base_urls, is_address
from ..teacher_server.remote_teacher import ServedTeacher
from ..teacher_server.stored import OfflineTeacher
from .config_checks import check_teacher_names, refuse_with_several_teachers

OneTeacher = str | PreTrainedModel | ServedTeacher
GivenTeachers = OneTeacher | dict[str, OneTeacher]


def choose_teacher(
    teacher_model: str | PreTrainedModel | Mapping[str, str | PreTrainedModel] | None, args: MiniLLMConfig
) -> GivenTeachers:
    """Return the teacher of a run, or its teachers by name: the given ones, or those of the configuration.

    Raises:
        UserError: if there is no teacher, or it is given twice.
        TeacherServerError: if a server does not answer, or the servers of a teacher serve different models.
    """
    # a configuration of another trainer, which has none of these fields, is refused later
    urls, teachers = getattr(args, "teacher_server_url", None), getattr(args, "teachers", None)
    stored = getattr(args, "offline_teacher", None)
    given = {
        "teacher_model": teacher_model,
        "teacher_server_url": urls,
        "offline_teacher": stored,
        "teachers": teachers,
    }
    names = [name for name, value in given.items() if value is not None]
    if not names:
        raise UserError("teacher_model is missing. Pass it, or set teacher_server_url, offline_teacher or teachers.")
    if len(names) > 1:
        raise UserError(f"{listing(names)} are both given. Drop one of them.")
    if isinstance(teacher_model, Mapping):
        check_teacher_names(teacher_model, "teacher_model")
        refuse_with_several_teachers(args)
        for name, teacher in teacher_model.items():
            if is_address(teacher):
                raise UserError(f"teacher_model[{name!r}] is an address. Set addresses in args.teachers.")
        return dict(teacher_model)
    if teachers is not None:
        return {name: _connected(name, teacher, args) for name, teacher in teachers.items()}
    if getattr(args, "teacher_column", "teacher") != "teacher":
        raise UserError(f"teacher_column={args.teacher_column!r} has no effect with a single teacher. Drop it.")
    if teacher_model is not None:
        return teacher_model
    if stored is not None:
        return OfflineTeacher.open(args)
    assert urls is not None  # one of the four is given
    return ServedTeacher.connect(args, urls)


def _connected(name: str, teacher: Any, args: MiniLLMConfig) -> OneTeacher:
    if not is_address(teacher):
        return teacher
    with naming_teacher(name):
        return ServedTeacher.connect(args, base_urls(teacher, "teachers"))


@contextmanager
def naming_teacher(name: str | None) -> Iterator[None]:
    """Add the name of a teacher to the errors within; None for the only teacher of a run."""
    try:
        yield
    except UserError as error:
        if name is None:
            raise
        raise type(error)(f"Teacher {name!r}: {error}") from error


def by_name(teachers: GivenTeachers) -> dict[str | None, OneTeacher]:
    """Return the teachers by name; the only one of a run has the name None."""
    found: dict[str | None, OneTeacher] = {}
    found.update(teachers.items() if isinstance(teachers, dict) else [(None, teachers)])
    return found


def check_several_teachers(
    names: Sequence[str], args: MiniLLMConfig, train_dataset: Any, eval_dataset: Any, has_turns: bool
) -> None:
    """Check that all prompts name one of several teachers, and that only whole completions mix with a teacher.

    Args:
        names (`Sequence[str]`): names of the teachers.
        args ([`MiniLLMConfig`]): configuration.
        train_dataset, eval_dataset (*optional*): prompts; a `dict` of evaluation prompts too.
        has_turns (`bool`): whether completions have several turns, with answers of tools.

    Raises:
        UserError: with the dataset, the row and its value, or the setting.
    """
    if train_dataset is None:
        raise UserError(
            "Prompts of an environment name no teacher, but there are several. Pass train_dataset with a column "
            f"{args.teacher_column!r}, or a single teacher."
        )
    if has_turns and args.teacher_mixed_alpha > 0:
        raise UserError(
            f"teacher_mixed_alpha={args.teacher_mixed_alpha} with tools needs a single teacher: later turns do not "
            "know the teacher of their row. Set teacher_mixed_alpha=0.0."
        )
    sets = {"train_dataset": train_dataset}
    if isinstance(eval_dataset, dict):
        sets |= {f"eval_dataset[{name!r}]": dataset for name, dataset in eval_dataset.items()}
    elif eval_dataset is not None:
        sets["eval_dataset"] = eval_dataset
    for source, dataset in sets.items():
        check_teacher_column(dataset, args.teacher_column, names, source)


def check_teacher_column(dataset: Dataset | IterableDataset, column: str, names: Sequence[str], source: str) -> None:
    """Check that each row names one of several teachers; in a stream, the first row.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): prompts.
        column (`str`): the column `teacher_column`.
        names (`Sequence[str]`): names of the teachers.
        source (`str`): name of the dataset in messages.

    Raises:
        UserError: with the row and its value.
    """
    if isinstance(dataset, Dataset) and column not in dataset.column_names:
        raise UserError(
            f"{source} has no column {column!r} with the teacher of each row (teacher_column); its columns are "
            f"{listing(dataset.column_names)}.{nearest(column, dataset.column_names)}"
        )
    values = dataset[column] if isinstance(dataset, Dataset) else [row.get(column) for row in dataset.take(1)]
    teacher_numbers(values, column, names, source)


def teacher_numbers(values: Sequence[Any], column: str, names: Sequence[str], source: str) -> list[int]:
    """Return the number of the teacher that each row names.

    Raises:
        UserError: with the row and its value.
    """
    numbers = {name: number for number, name in enumerate(names)}
    found: list[int] = []
    if not names:  # a single teacher, which rows need not name
        return found
    for row, value in enumerate(values):
        if str(value) not in numbers:
            raise UserError(
                f"{source}, row {row} (counting from 0): {column} is {value!r}, which names no teacher."
                f"{nearest(str(value), names)} There are {listing(names)}."
            )
        found.append(numbers[str(value)])
    return found


def row_teachers(rows: Sequence[Mapping[str, Any]], column: str, names: Sequence[str]) -> list[int]:
    """Return the number of the teacher of each row of a rollout; nothing if there is one teacher, without a name."""
    return teacher_numbers([row.get(column) for row in rows], column, names, "a rollout's rows") if names else []


def given_teachers(teachers: Sequence[str] | None, names: Sequence[str], rows: int) -> list[int]:
    """Return the number of the teacher of each given row; nothing if there is one teacher, without a name.

    Raises:
        UserError: if not each row has the name of one of several teachers.
    """
    if (teachers is not None) != bool(names) or (teachers is not None and len(teachers) != rows):
        needed = f"{rows} names, one for each row: there are {listing(names)}" if names else "no names of teachers"
        raise UserError(f"score_rollouts needs {needed}; got teachers={teachers}.")
    return teacher_numbers(teachers or [], "the teacher", names, "score_rollouts")


def index_entry(numbers: Sequence[int], device: torch.device) -> dict[str, torch.Tensor]:
    """Return the entry of a batch with the numbers of the teachers `(B,)`; nothing if there is one teacher."""
    return {"teacher_index": torch.tensor(numbers, device=device)} if numbers else {}


def declared_by(
    teacher: Teacher, given: GivenTeachers, tokenizers: Sequence[PreTrainedTokenizerBase]
) -> tuple[GenerationConfig | None, PreTrainedTokenizerBase | None]:
    """Return generation config and tokenizer of the teacher, for the tokens that end a completion.

    For several teachers, the config has the tokens of all of them and of their tokenizers.

    Args:
        teacher ([`Teacher`]): the loaded teacher or teachers.
        given: what the user gave.
        tokenizers (`Sequence[PreTrainedTokenizerBase]`): tokenizers of the teachers, as far as known.
    """
    if not isinstance(teacher, SeveralTeachers):
        return getattr(teacher.model or given, "generation_config", None), next(iter(tokenizers), None)
    ends = {tokenizer.eos_token_id for tokenizer in tokenizers} - {None}
    for name, member in teacher.members.items():
        with naming_teacher(name):
            source = member.model if member.model is not None else by_name(given)[name]
            ends |= {*declared_ends(getattr(source, "generation_config", None), "the teacher")}
    return GenerationConfig(eos_token_id=sorted(ends) or None), None
