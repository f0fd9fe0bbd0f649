"""What the trainer refuses: arguments before any weight is loaded, and rewards that are no numbers."""

import logging
from collections.abc import Callable
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .config import MiniLLMConfig
from .teacher import check_same_tokenizer

logger = logging.getLogger(__name__)


def check_arguments(
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel,
    reward_funcs: Any,
    args: MiniLLMConfig,
    train_dataset: Dataset | IterableDataset | None,
    eval_dataset: Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None,
    processing_class: PreTrainedTokenizerBase | None,
    rollout_func: Callable | None,
) -> None:
    """Check the arguments of [`MiniLLMTrainer`] against each other.

    Raises:
        TypeError: if `args` is no [`MiniLLMConfig`].
        ValueError: naming the argument, its value and the fix.
    """
    if not isinstance(args, MiniLLMConfig):
        raise TypeError(f"args must be a MiniLLMConfig, got {type(args).__name__}.")
    if model is teacher_model and not isinstance(model, str):
        raise ValueError("model and teacher_model are the same object; training it would move the teacher.")
    _check_train_dataset(train_dataset, args)
    for name, dataset in (eval_dataset if isinstance(eval_dataset, dict) else {"": eval_dataset}).items():
        if dataset is not None:
            _check_columns(dataset, f"eval_dataset[{name!r}]" if name else "eval_dataset")
    if reward_funcs and args.num_generations == 1:
        raise ValueError(
            "reward_funcs need num_generations > 1: their advantage is relative to the other completions of the same "
            "prompt, and would be zero for a single one."
        )
    if not (args.rkl_advantage or args.single_step_decomposition or reward_funcs):
        raise ValueError(
            "rkl_advantage=False, single_step_decomposition=False and no reward_funcs leave nothing to train on."
        )
    if rollout_func is not None and args.teacher_mixed_alpha > 0:
        raise ValueError(
            f"rollout_func samples by itself, so its rollouts do not follow the mixture of teacher_mixed_alpha="
            f"{args.teacher_mixed_alpha}: set teacher_mixed_alpha=0.0."
        )
    _check_tokenizers(model, teacher_model, processing_class, train_dataset)


def check_rewards(rewards: torch.Tensor, completion_ids: torch.Tensor, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every reward `(B, T)` of the completions `(B, T)` is finite.

    Raises:
        FloatingPointError: naming the first token, its position and its completion.
    """
    bad = (~rewards.isfinite()).nonzero()
    if len(bad) == 0:
        return
    row, position = bad[0].tolist()
    token = completion_ids[row, position].item()
    raise FloatingPointError(
        f"log p(y) - log q(y) is {rewards[row, position].item()} for token {token} ({tokenizer.decode([token])!r}) at "
        f"position {position} of completion {row}: the teacher gives it probability zero, or a model overflowed. "
        "Check the teacher in float32 on this prompt; a token that the teacher can never produce must be impossible "
        "for the student too."
    )


def _check_tokenizers(
    model: str | PreTrainedModel,
    teacher_model: str | PreTrainedModel,
    processing_class: PreTrainedTokenizerBase | None,
    train_dataset: Dataset | IterableDataset,
) -> None:
    student_name, teacher_name = (
        each if isinstance(each, str) else each.config._name_or_path for each in (model, teacher_model)
    )
    if not teacher_name:  # built in process: its vocabulary's size is all that can be checked, once it is placed
        return
    try:
        teacher_tokenizer = AutoTokenizer.from_pretrained(teacher_name)
    except (OSError, ValueError) as error:
        if isinstance(teacher_model, str):
            raise ValueError(
                f"teacher_model={teacher_name!r}: no tokenizer could be loaded from there: {error}"
            ) from error
        logger.warning(
            f"The teacher's tokenizer could not be loaded from {teacher_name!r}, so it was not compared. "
            "Make sure that it is the student's."
        )
        return
    check_same_tokenizer(
        processing_class or AutoTokenizer.from_pretrained(student_name),
        teacher_tokenizer,
        conversational=not isinstance(next(iter(train_dataset))["prompt"], str),
    )


def _check_train_dataset(dataset: Dataset | IterableDataset | None, args: MiniLLMConfig) -> None:
    if dataset is None or (isinstance(dataset, Dataset) and len(dataset) == 0):
        raise ValueError("train_dataset is missing or empty: MiniLLM needs prompts to sample completions for.")
    _check_columns(dataset, "train_dataset")
    if isinstance(dataset, Dataset) and len(dataset) * args.num_generations < args.generation_batch_size:
        raise ValueError(
            f"train_dataset has {len(dataset)} prompts, too few for one rollout of generation_batch_size="
            f"{args.generation_batch_size} completions with num_generations={args.num_generations}. Lower "
            "steps_per_generation or per_device_train_batch_size, or raise num_generations."
        )


def _check_columns(dataset: Dataset | IterableDataset, name: str) -> None:
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise ValueError(f"{name} is empty.")
    columns = dataset.column_names  # None for a stream of unknown features
    if columns is not None and "prompt" not in columns:
        raise ValueError(f"{name} has no column 'prompt'; its columns are {columns}. Rename the right one.")
