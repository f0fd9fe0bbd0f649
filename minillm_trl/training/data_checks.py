"""Checks of the datasets that a trainer is given."""

from typing import Any

from datasets import Dataset, IterableDataset

from ..config import MiniLLMConfig
from ..errors import UserError


def check_train_dataset(dataset: Dataset | IterableDataset | None, args: MiniLLMConfig) -> None:
    """Check that there are prompts, enough for one rollout, and with `lmbda` below 1 a completion for each.

    Raises:
        TypeError: if `dataset` is neither a `Dataset` nor an `IterableDataset`, as GRPO does.
        UserError: for missing prompts or completions, and for a stream without `max_steps`.
    """
    if dataset is not None and not isinstance(dataset, Dataset | IterableDataset):
        raise TypeError(f"train_dataset must be a Dataset or IterableDataset, got {type(dataset).__name__}.")
    first = None if dataset is None else next(iter(dataset), None)
    if dataset is None or first is None:
        raise UserError("train_dataset is missing or empty: MiniLLM needs prompts to sample completions.")
    check_columns(dataset, "train_dataset", first)
    if isinstance(dataset, IterableDataset) and args.max_steps <= 0:
        raise UserError("train_dataset is a stream, which has no known length to end the run. Set max_steps.")
    if isinstance(dataset, IterableDataset) and args.overlap_rollouts:
        raise UserError(
            "train_dataset is a stream, whose next rows are not known when overlap_rollouts=True needs them. Load the "
            "rows (dataset_streaming=False), or set overlap_rollouts=False."
        )
    if isinstance(dataset, IterableDataset) and args.offline_teacher is not None:
        raise UserError(
            f"train_dataset is a stream, whose rows cannot be checked for scores in offline_teacher="
            f"{args.offline_teacher!r} before training. Load the rows, or drop dataset_streaming."
        )
    if args.lmbda < 1.0:
        rows = dataset["completion"] if isinstance(dataset, Dataset) and "completion" in dataset.column_names else []
        if "completion" not in next(iter(dataset)) or not all(rows):
            raise UserError(
                f"lmbda={args.lmbda} trains on the dataset's completions, but train_dataset has rows without one. Add "
                "a column `completion`, drop these rows, or set lmbda=1.0."
            )
    if isinstance(dataset, Dataset):
        check_fills_rollout(dataset, args, "train_dataset")


def check_fills_rollout(prompts: Dataset, args: MiniLLMConfig, source: str, repeats: str = "") -> None:
    """Check that there are enough prompts for one rollout.

    Args:
        prompts ([`~datasets.Dataset`]): distinct prompts, one in each row.
        args ([`MiniLLMConfig`]): configuration.
        source (`str`): the user's name for them, with which the message begins.
        repeats (`str`, *optional*): remark on the number of original rows, if some had the same prompt.

    Raises:
        UserError: with the number of prompts.
    """
    assert args.generation_batch_size is not None  # set by GRPOConfig
    assert args.num_generations is not None
    if len(prompts) * args.num_generations < args.generation_batch_size:
        remark = f" ({repeats})" if repeats else ""
        raise UserError(
            f"{source} has {len(prompts)} prompts{remark}, too few for one rollout of generation_batch_size="
            f"{args.generation_batch_size} completions with num_generations={args.num_generations}. Lower "
            "steps_per_generation or per_device_train_batch_size, or raise num_generations."
        )


def check_columns(dataset: Dataset | IterableDataset, name: str, first: dict[str, Any] | None = None) -> None:
    """Check that there are rows with a column `prompt`; `first` is the first row, if known."""
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise UserError(f"{name} is empty.")
    columns = dataset.column_names  # None for a stream with unknown features
    if columns is None and first is not None:
        columns = list(first)
    if columns is not None and "prompt" not in columns:
        raise UserError(
            f"{name} has no column 'prompt'; its columns are {columns}. Rename the column with the prompts."
        )


def check_lm_dataset(lm_dataset: Dataset | IterableDataset | None, args: MiniLLMConfig) -> None:
    """Check the corpus of L_PT, and that no option of it is set without one."""
    if isinstance(lm_dataset, Dataset) and len(lm_dataset) == 0:
        raise UserError("lm_dataset is empty.")
    for name, default in (("lm_coef", 1.0), ("lm_kd_ratio", 0.0)):
        if lm_dataset is None and getattr(args, name) != default:
            raise UserError(
                f"{name}={getattr(args, name)} has no effect without lm_dataset. Pass one, or drop {name}."
            )
