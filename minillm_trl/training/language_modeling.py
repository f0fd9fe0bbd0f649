"""The corpus of L_PT: its encoding, and its batches as a function of the optimizer step.

The examples of an optimizer step depend on its number alone, not on the number of processes, the split into
micro-batches, or earlier reads. So a resumed run continues with the same examples as an uninterrupted one.
"""

import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator, PartialState
from datasets import Dataset, Features, IterableDataset, List, Value
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import MiniLLMConfig
from ..errors import UserError
from ..models.encoding import encode_after_prompt, encode_texts
from ..models.fused_head import ScoreRequest, TokenScores
from ..models.lm_head import completion_hidden_states
from ..objectives import forward_kl, language_modeling_loss
from ..rollouts.keyed_random import keyed_uniforms

logger = logging.getLogger(__name__)


class LanguageModelingBatches:
    r"""Batches of a plain-text or prompt/completion corpus.

    - A column `text`: every text ends with the end-of-sequence token; texts are joined and cut into blocks of
      `max_length` tokens, and all of their tokens count.
    - Columns `prompt` and `completion`, texts or conversations: the completion's tokens count, cut at `max_length`.

    A [`~datasets.Dataset`] is reshuffled in every epoch. An [`~datasets.IterableDataset`] is read in its own order and
    restarted at its end. To resume, the stream is read from its start and the examples seen before are skipped.

    Args:
        dataset ([`~datasets.Dataset`] or [`~datasets.IterableDataset`]): the corpus.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        max_length (`int`): tokens of one sequence.
        batch_size (`int`): sequences of one micro-batch.
        seed (`int`): seed of the order.
        chat_template_kwargs (`dict`, *optional*): for prompts that are conversations.

    Raises:
        ValueError: if the columns are missing, or no row has a token that counts.
    """

    def __init__(
        self,
        dataset: Dataset | IterableDataset,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_length: int,
        batch_size: int,
        seed: int,
        chat_template_kwargs: dict[str, Any] | None = None,
    ):
        self.batch_size = batch_size
        self.seed = seed
        self.pad_token_id = tokenizer.pad_token_id
        self.rows = encode_corpus(dataset, tokenizer, max_length, chat_template_kwargs or {})
        self._stream: Iterator[dict[str, list[int]]] = iter(())
        self._position = 0  # of the next example of the stream
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)  # of the rows in that epoch
        self._loaded_step = -1
        self._loaded: list[dict[str, torch.Tensor]] = []  # micro-batches of that optimizer step

    def window(
        self, step: int, accumulation_steps: int, process: int, num_processes: int
    ) -> list[dict[str, torch.Tensor]]:
        """Return the micro-batches of one optimizer step on one process.

        Args:
            step (`int`): number of the optimizer step, from 0.
            accumulation_steps (`int`): micro-batches of an optimizer step on each process.
            process, num_processes (`int`): number of the process, and number of processes.

        Returns:
            `list[dict]` of `accumulation_steps` batches with `input_ids`, `attention_mask` of shape `(B, L)` and
            `loss_mask` of shape `(B, L-1)`, True where the token at position t+1 counts.
        """
        share = self.batch_size * accumulation_steps
        first = step * share * num_processes
        if isinstance(self.rows, Dataset):
            start = first + process * share
            rows = [self._shuffled_row(number) for number in range(start, start + share)]
        else:  # each process reads the whole window and keeps its share
            rows = self._read_stream(first, share * num_processes)[process * share : (process + 1) * share]
        return [self._collate(rows[i : i + self.batch_size]) for i in range(0, share, self.batch_size)]

    def load_window(
        self, step: int, accumulation_steps: int, accelerator: Accelerator
    ) -> list[dict[str, torch.Tensor]]:
        """Return [`window`] for this process on its device; `window_tokens` counts the tokens of the whole step."""
        batches = self.window(step, accumulation_steps, accelerator.process_index, accelerator.num_processes)
        batches = [{name: values.to(accelerator.device) for name, values in batch.items()} for batch in batches]
        tokens = accelerator.reduce(sum(batch["loss_mask"].sum() for batch in batches), reduction="sum")
        return [{**batch, "window_tokens": tokens} for batch in batches]

    def load(
        self, step: int, micro_step: int, accumulation_steps: int, accelerator: Accelerator
    ) -> dict[str, torch.Tensor]:
        """Return the batch of a micro-step of an optimizer step, whose window is loaded once."""
        if self._loaded_step != step:
            self._loaded_step, self._loaded = step, self.load_window(step, accumulation_steps, accelerator)
        return self._loaded[micro_step]

    def _shuffled_row(self, number: int) -> dict[str, list[int]]:
        epoch, index = divmod(number, len(self.rows))
        if self._epoch != epoch:
            self._epoch, self._order = epoch, keyed_uniforms(len(self.rows), self.seed, epoch).argsort()
        return self.rows[int(self._order[index])]

    def _read_stream(self, first: int, count: int) -> list[dict[str, list[int]]]:
        if first < self._position or self._position == 0:
            self._stream, self._position = _repeat_forever(self.rows), 0
        while self._position < first:
            next(self._stream)
            self._position += 1
        self._position += count
        return [next(self._stream) for _ in range(count)]

    def _collate(self, rows: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = max(len(row["input_ids"]) for row in rows)
        input_ids = torch.full((len(rows), length), self.pad_token_id)
        attention_mask = torch.zeros(len(rows), length, dtype=torch.long)
        counts = torch.zeros(len(rows), length, dtype=torch.bool)
        for i, row in enumerate(rows):
            size = len(row["input_ids"])
            input_ids[i, :size] = torch.tensor(row["input_ids"])
            attention_mask[i, :size] = 1
            counts[i, :size] = torch.tensor(row["counts"], dtype=torch.bool)
        return {"input_ids": input_ids, "attention_mask": attention_mask, "loss_mask": counts[:, 1:]}


@torch.no_grad()
def language_modeling_request(
    batch: dict[str, torch.Tensor], teacher: PreTrainedModel | None, kd_ratio: float
) -> ScoreRequest:
    """Return the request for the student to score a batch of [`LanguageModelingBatches`] for L_PT.

    Args:
        batch (`dict` of `torch.Tensor`): see [`LanguageModelingBatches.window`].
        teacher ([`~transformers.PreTrainedModel`], *optional*): unwrapped; run once if `kd_ratio` is positive.
        kd_ratio (`float`): share of forward KL to the teacher.
    """
    ids, attention_mask, mask = batch["input_ids"], batch["attention_mask"], batch["loss_mask"]
    hidden_states = None
    if kd_ratio > 0.0:
        assert teacher is not None, "a teacher on a server is refused with lm_kd_ratio"
        hidden_states = completion_hidden_states(teacher, ids, attention_mask, mask.shape[1])

    def loss(scores: TokenScores, rows: torch.Tensor) -> torch.Tensor:
        return language_modeling_loss(scores.logps, scores.divergence, kd_ratio)

    return ScoreRequest(
        ids, attention_mask, mask, teacher_hidden_states=hidden_states, divergence=forward_kl, loss=loss
    )


def lm_batches(
    dataset: Dataset | IterableDataset | None,
    args: MiniLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    max_context: int | None,
    chat_template_kwargs: dict[str, Any] | None,
) -> LanguageModelingBatches | None:
    """Return the batches of a corpus as `args` say, in rows that fit into the context; None without a corpus."""
    if dataset is None:
        return None
    return LanguageModelingBatches(
        dataset,
        tokenizer,
        max_length=min(args.lm_max_length, max_context or args.lm_max_length),
        batch_size=args.lm_batch_size or args.per_device_train_batch_size,
        seed=args.seed,
        chat_template_kwargs=chat_template_kwargs,
    )


def encode_corpus(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    chat_template_kwargs: dict[str, Any],
) -> Dataset | IterableDataset:
    """Encode a corpus to rows of `input_ids` and `counts` (where a token counts), see [`LanguageModelingBatches`].

    Raises:
        ValueError: if the columns are not those of a corpus, a row has no text (the message has its number), or no
            row has a token that counts.
    """
    columns = dataset.column_names or list(next(iter(dataset), {}))
    is_text = "text" in columns
    if not is_text and not {"prompt", "completion"} <= set(columns):
        raise UserError(
            f"lm_dataset has the columns {columns}; it needs 'text', or 'prompt' and 'completion'. Rename the right "
            "ones."
        )

    def encode(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        _check_row(row, number, ("text",) if is_text else ("prompt", "completion"))
        if is_text:
            ids = [*encode_texts(tokenizer, [row["text"]])[0], tokenizer.eos_token_id]
            return {"input_ids": ids, "counts": [1] * len(ids)}
        pair = row["prompt"], row["completion"]
        prompt, ids = encode_after_prompt(tokenizer, *pair, chat_template_kwargs, source="lm_dataset")
        counts = [0] * prompt + [1] * (len(ids) - prompt)
        return {"input_ids": ids[:max_length], "counts": counts[:max_length]}

    features = Features({"input_ids": List(Value("int32")), "counts": List(Value("bool"))})
    progress = {"desc": "Encoding lm_dataset"} if isinstance(dataset, Dataset) else {}
    with PartialState().main_process_first():  # the other processes then read its cache
        encoded = dataset.map(encode, with_indices=True, remove_columns=columns, features=features, **progress)
        if is_text:
            encoded = encoded.map(_pack, batched=True, fn_kwargs={"max_length": max_length}, features=features)
        usable = encoded.filter(lambda row: any(row["counts"][1:]))  # the first token is predicted from nothing
    if isinstance(usable, Dataset) and len(usable) < len(encoded):
        logger.warning(
            f"{len(encoded) - len(usable)} of {len(encoded)} rows of lm_dataset were dropped: within "
            f"lm_max_length={max_length} they have no token to learn."
        )
    if isinstance(usable, Dataset) and len(usable) == 0:
        raise UserError(
            f"lm_dataset has no row with a token to learn within lm_max_length={max_length}. Raise lm_max_length, or "
            "check the data."
        )
    return usable


def _check_row(row: dict[str, Any], number: int, names: tuple[str, ...]) -> None:
    for name in names:
        value = row[name]
        if not isinstance(value, str) and (name == "text" or not isinstance(value, list) or not value):
            expected = "a text" if name == "text" else "a text or a conversation of at least one message"
            raise UserError(f"lm_dataset: row {number}: {name} is {value!r}, expected {expected}. Fix the row.")
    if len({type(row[name]) for name in names}) > 1:
        raise UserError(
            f"lm_dataset: row {number}: prompt and completion are a text and a conversation. Make both texts, or "
            "both conversations."
        )


def _pack(batch: dict[str, list[list[int]]], max_length: int) -> dict[str, list[list[int]]]:
    """Join the rows of a batch and cut them into blocks; the last block may be shorter."""
    joined = {name: [value for row in rows for value in row] for name, rows in batch.items()}
    starts = range(0, len(joined["input_ids"]), max_length)
    return {name: [values[start : start + max_length] for start in starts] for name, values in joined.items()}


def _repeat_forever(rows: IterableDataset) -> Iterator[dict[str, list[int]]]:
    epoch = 0
    while True:
        rows.set_epoch(epoch)
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise UserError("lm_dataset yields no row with a token to learn. Check the stream and lm_max_length.")
        epoch += 1
