"""Prepare data before TRL's `SFTTrainer` encodes it."""

from typing import Any

from accelerate import PartialState
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.encoding import added_tokens, holds_conversations

logger = logging.get_logger(__name__)

_KWARGS = "chat_template_kwargs"  # TRL reads the arguments from this column


def with_chat_template_kwargs(
    dataset: Dataset | IterableDataset, chat_template_kwargs: dict[str, Any] | None
) -> Dataset | IterableDataset:
    """Add the chat template's arguments to every row, unless the rows already have them."""
    if not chat_template_kwargs or not holds_conversations(dataset) or _KWARGS in next(iter(dataset)):
        return dataset
    if isinstance(dataset, Dataset):
        return dataset.add_column(_KWARGS, [chat_template_kwargs] * len(dataset))
    return dataset.map(lambda row: {**row, _KWARGS: chat_template_kwargs})


def without_bos(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, text_column: str
) -> Dataset | IterableDataset:
    """Drop the BOS from texts that begin with it, if the tokenizer adds a BOS to every text.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): has a column `prompt`, or a column of texts.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        text_column (`str`): name of the column of texts.
    """
    before, _ = added_tokens(tokenizer)
    first: dict[str, Any] = next(iter(dataset), {})
    columns = [name for name in ("prompt", text_column) if isinstance(first.get(name), str)]
    bos = tokenizer.bos_token
    if not bos or before != [tokenizer.bos_token_id] or not columns:
        return dataset
    name = columns[0]

    def drop(row: dict[str, Any]) -> dict[str, Any]:
        return {name: row[name].removeprefix(bos)}

    if isinstance(dataset, IterableDataset):
        return dataset.map(drop)
    count = sum(text.startswith(bos) for text in dataset[name])
    if not count:
        return dataset
    logger.warning(f"{count} of {len(dataset)} texts begin with {bos!r}, which the tokenizer adds: they have it once.")
    with PartialState().main_process_first():  # the other processes reuse its cache
        return dataset.map(drop, desc="Dropping the second BOS")
