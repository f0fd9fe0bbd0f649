"""Training and evaluation examples for the training subcommands."""

import sys

from accelerate import PartialState
from datasets import Dataset

from ..data.load import has_splits, load_examples, unique_prompts
from ..errors import UserError
from .arguments import DataArguments


def load_splits(
    data: DataArguments, eval_strategy: str, require_completion: bool, text_column: str | None = None
) -> tuple[Dataset, Dataset | None]:
    """Load and check the training examples and, if configured, the evaluation examples.

    Args:
        data ([`DataArguments`]): sources, splits and columns.
        eval_strategy (`str`): `"no"`, `"steps"` or `"epoch"`.
        require_completion (`bool`): whether each row must have a completion.
        text_column (`str`, *optional*): column of plain text that may replace prompts and completions.

    Raises:
        ValueError: if evaluation is configured without data, or on a split of data that has no splits: a single
            file, or the folder of a single saved `Dataset`.
    """
    wants_evaluation = data.dataset_test_split is not None or data.eval_dataset is not None
    if eval_strategy != "no" and not wants_evaluation:
        raise UserError(f"eval_strategy={eval_strategy!r} needs dataset_test_split or eval_dataset.")
    if data.eval_dataset is None and data.dataset_test_split is not None and not has_splits(data.dataset_name):
        raise UserError(
            f"dataset_test_split={data.dataset_test_split!r}: {data.dataset_name} has no splits, so this would "
            "evaluate on the training data. Name other data with eval_dataset."
        )

    def load(source: str, split: str, max_rows: int | None) -> Dataset:
        return load_examples(
            source,
            split=split,
            prompt_column=data.prompt_column,
            completion_column=data.completion_column,
            references_column=data.references_column,
            require_completion=require_completion,
            text_column=text_column,
            max_rows=max_rows,
            # belongs to `dataset_name`; evaluation data from elsewhere may be a file
            dataset_config=data.dataset_config if source == data.dataset_name else None,
        )

    train = load(data.dataset_name, data.dataset_train_split, data.max_train_rows)
    if not wants_evaluation:
        return train, None
    split = data.dataset_test_split or data.dataset_train_split
    return train, load(data.eval_dataset or data.dataset_name, split, data.max_eval_rows)


def distinct_prompts(examples: Dataset, source: str, keep_completion: bool = False) -> Dataset:
    """Keep each prompt once, see [`unique_prompts`], and print how many rows became how many prompts.

    Args:
        examples ([`~datasets.Dataset`]): the result of [`load_examples`].
        source (`str`): name of the data, as the user gave it.
        keep_completion (`bool`, *optional*, defaults to `False`): whether to keep the completion of the prompt's first
            row.
    """
    prompts = unique_prompts(examples, keep_completion)
    if (counts := describe_repeats(examples, prompts)) and PartialState().is_main_process:
        print(f"{source}: {counts}. Each prompt is used once.", file=sys.stderr)
    return prompts


def describe_repeats(examples: Dataset, prompts: Dataset) -> str:
    """Return a text with the numbers of rows and of different prompts, empty if no prompt repeats."""
    if len(prompts) == len(examples):
        return ""
    return f"{len(examples)} rows have {len(prompts)} different prompts"
