"""Training and evaluation examples for the training subcommands."""

import sys
from collections.abc import Callable
from functools import partial

from accelerate import PartialState
from datasets import Dataset, IterableDataset

from ..data.load import Columns, has_splits, load_examples, unique_prompts
from ..data.mixtures import load_mixture, parse_parts
from ..data.streams import load_stream, load_streamed_mixture
from ..errors import UserError
from .arguments import DataArguments


def load_splits(
    data: DataArguments,
    eval_strategy: str,
    require_completion: bool,
    text_column: str | None = None,
    teacher_column: str | None = None,
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Load and check the training examples and, if configured, the evaluation examples.

    Args:
        data ([`DataArguments`]): sources, splits and columns.
        eval_strategy (`str`): `"no"`, `"steps"` or `"epoch"`.
        require_completion (`bool`): whether each row must have a completion.
        text_column (`str`, *optional*): column of plain text that may replace prompts and completions.
        teacher_column (`str`, *optional*): column with the teacher of a row, which a mixture keeps.

    Raises:
        ValueError: if evaluation is configured without data, or on a split of data that has no splits: a single
            file, or the folder of a single saved `Dataset`.

    Returns:
        The training examples, a stream if `data` asks for one, and the evaluation examples.
    """
    wants_evaluation = any(
        value is not None for value in (data.dataset_test_split, data.eval_dataset, data.test_split_size)
    )
    if eval_strategy != "no" and not wants_evaluation:
        raise UserError(f"eval_strategy={eval_strategy!r} needs dataset_test_split or eval_dataset.")
    load = partial(
        load_examples,
        prompt_column=data.prompt_column,
        completion_column=data.completion_column,
        references_column=data.references_column,
        require_completion=require_completion,
        text_column=text_column,
    )
    columns = Columns(
        data.prompt_column, data.completion_column, data.references_column, require_completion, text_column
    )
    if data.dataset_name is None:
        return _load_mixture(data, load, columns, teacher_column)
    if data.eval_dataset is None and data.dataset_test_split is not None and not has_splits(data.dataset_name):
        raise UserError(
            f"dataset_test_split={data.dataset_test_split!r}: {data.dataset_name} has no splits, so this would "
            "evaluate on the training data. Name other data with eval_dataset."
        )
    read = partial(load_stream, columns=columns) if data.dataset_streaming else load
    train: Dataset | IterableDataset = read(
        data.dataset_name,
        split=data.dataset_train_split,
        max_rows=data.max_train_rows,
        dataset_config=data.dataset_config,
    )
    return train, _load_evaluation(data, load) if wants_evaluation else None


def _load_evaluation(data: DataArguments, load: Callable[..., Dataset]) -> Dataset:
    return load(
        data.eval_source,
        split=data.dataset_test_split or data.dataset_train_split,
        max_rows=data.max_eval_rows,
        # belongs to `dataset_name`; evaluation data from elsewhere may be a file
        dataset_config=data.dataset_config if data.eval_source == data.dataset_name else None,
    )


def _load_mixture(
    data: DataArguments, load: Callable[..., Dataset], columns: Columns, teacher_column: str | None
) -> tuple[Dataset | IterableDataset, Dataset | None]:
    """Load `datasets`, and the evaluation data from `eval_dataset` or split off by `test_split_size`."""
    if data.dataset_test_split is not None and data.eval_dataset is None:
        raise UserError(
            "dataset_test_split belongs to dataset_name or eval_dataset. For datasets, set test_split_size."
        )
    if data.eval_dataset is not None and data.test_split_size is not None:
        raise UserError("eval_dataset and test_split_size are both given. Drop one of them.")
    if data.streaming:
        stream = load_streamed_mixture(parse_parts(data.datasets), columns, data.max_train_rows)
        return stream, None if data.eval_dataset is None else _load_evaluation(data, load)
    # rows that are split off are drawn from all of them, which shuffles the rest
    max_rows = data.max_train_rows if data.test_split_size is None else None
    train, evaluation = load_mixture(parse_parts(data.datasets), load, max_rows, teacher_column), None
    if data.test_split_size is not None:
        parts = train.train_test_split(data.test_split_size, seed=0)
        train, evaluation = parts["train"], _first(parts["test"], data.max_eval_rows)
    elif data.eval_dataset is not None:
        evaluation = _load_evaluation(data, load)
    return _first(train, data.max_train_rows), evaluation


def _first(examples: Dataset, max_rows: int | None) -> Dataset:
    return examples if max_rows is None else examples.select(range(min(max_rows, len(examples))))


def check_stream_ends(examples: Dataset | IterableDataset, max_steps: int) -> None:
    """Check that a run over a stream, whose length is unknown, has its own end.

    Raises:
        UserError: for a stream without `max_steps`.
    """
    if isinstance(examples, IterableDataset) and max_steps <= 0:
        raise UserError("A stream of examples has no known length, which ends a run. Set max_steps.")


def distinct_prompts(examples: Dataset, source: str, keep_completion: bool = False, by: str | None = None) -> Dataset:
    """Keep each prompt once, see [`unique_prompts`], and print how many rows became how many prompts.

    Args:
        examples ([`~datasets.Dataset`]): the result of [`load_examples`].
        source (`str`): name of the data, as the user gave it.
        keep_completion (`bool`, *optional*, defaults to `False`): whether to keep the completion of the prompt's first
            row.
        by (`str`, *optional*): a column, such as the one with the teacher: prompts with different values differ.
    """
    prompts = unique_prompts(examples, keep_completion, by)
    if (counts := describe_repeats(examples, prompts)) and PartialState().is_main_process:
        print(f"{source}: {counts}. Each prompt is used once.", file=sys.stderr)
    return prompts


def describe_repeats(examples: Dataset, prompts: Dataset) -> str:
    """Return a text with the numbers of rows and of different prompts, empty if no prompt repeats."""
    if len(prompts) == len(examples):
        return ""
    return f"{len(examples)} rows have {len(prompts)} different prompts"
