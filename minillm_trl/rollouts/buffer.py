"""The rollout buffer: its batches, and how its rows are dealt to optimizer steps."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .sampling import keyed_uniforms

# Tensors by name, see MiniLLMTrainer.score_rollouts. Buffered batches are handed out again in every inner pass, so
# they are never written to.
Batch = dict[str, torch.Tensor]


def sequences(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids and attention mask `(B, P+T)` of prompts with completions, and the bool mask `(B, T)` of what is trained.

    Tokens of tools and environments (`tool_mask` 0) are attended to, but neither rewarded nor trained.
    """
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).long()
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    return input_ids, attention_mask, mask


def fill_empty_completions(output: dict[str, Any], pad_token_id: int) -> tuple[dict[str, Any], list[int]]:
    """Give each empty completion of a rollout function one token of padding, as GRPO reads the last token of each.

    Returns:
        The output with `completion_ids`, `logprobs` and `env_mask` filled, and the numbers of the empty rows.
    """
    empty = [row for row, ids in enumerate(output.get("completion_ids", ())) if len(ids) == 0]
    fillers = {"completion_ids": pad_token_id, "logprobs": 0.0, "env_mask": 0}
    filled = {
        name: [[fillers[name]] if row in empty else values for row, values in enumerate(output[name])]
        for name in fillers
        if empty and output.get(name) is not None
    }
    return {**output, **filled}, empty


def assemble_rows(parts: Sequence[tuple[Sequence[int], torch.Tensor]], num_rows: int, length: int) -> torch.Tensor:
    """Put values of some rows each, `(n, t, ...)` with t <= length, into one tensor `(num_rows, length, ...)`."""
    first = parts[0][1]
    values = first.new_zeros(num_rows, length, *first.shape[2:])
    for rows, part in parts:
        values[torch.tensor(rows, device=values.device), : part.shape[1]] = part
    return values


def trim(batch: Batch) -> Batch:
    """Cut off the columns that are padding in every row: the prompts' first and the completions' last."""
    prompt = int(batch["prompt_mask"].bool().any(dim=0).int().argmax())
    length = max(int(batch["completion_mask"].sum(dim=1).max()), 1)
    return {
        name: values if values.dim() < 2 else values[:, prompt:] if name.startswith("prompt_") else values[:, :length]
        for name, values in batch.items()
    }


def parts_by_length(attention_mask: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Cut rows `(B, L)` into parts of like length: their numbers, and the columns that are not all padding."""
    for rows in attention_mask.sum(dim=1).argsort(descending=True, stable=True).split(batch_size):
        columns = attention_mask[rows].any(dim=0).nonzero().squeeze(1)
        yield rows, slice(int(columns[0]), int(columns[-1]) + 1)


def by_length(lengths: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Order of rows `(B,)` that sorts each of `num_groups` equal blocks of neighbours by their `lengths`.

    Which rows an optimizer step trains on stays as it is; its micro-batches need less padding.
    """
    order = lengths.view(num_groups, -1).argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(num_groups, device=order.device)[:, None] * order.shape[1]).flatten()


def deal_rows(num_rows: int, num_steps: int, first_row: int, *key: int) -> torch.Tensor:
    """Deal rows at random to the optimizer steps of a pass, one of each block of neighbours to each step.

    Which rows of the whole buffer make up a step depends on `key` alone: not on the number of processes, which hold a
    contiguous part each, nor on how the step is cut into micro-batches. Completions of one prompt, which are
    neighbours, go to different steps.

    Args:
        num_rows (`int`): rows on this process, a multiple of `num_steps`.
        num_steps (`int`): optimizer steps of a pass over the buffer.
        first_row (`int`): number of this process's first row in the whole buffer.
        key (`int`): of the random numbers, see [`~minillm_trl.rollouts.sampling.keyed_uniforms`].

    Returns:
        `torch.Tensor` of shape `(num_rows,)`, int64: row numbers on this process, those of the first step first.
    """
    first_block = first_row // num_steps
    dealt = [
        keyed_uniforms(num_steps, *_trim_zeros((*key, first_block + block))).argsort() + block * num_steps
        for block in range(num_rows // num_steps)
    ]
    return torch.from_numpy(np.stack(dealt, axis=1).reshape(-1))


def _trim_zeros(key: tuple[int, ...]) -> tuple[int, ...]:
    """Cut off the zeros at the end of a key: runs that began when they made no difference are dealt rows as before."""
    return _trim_zeros(key[:-1]) if key[-1:] == (0,) else key


def window_counts(batches: Sequence[Batch], accumulation_steps: int) -> dict[str, torch.Tensor]:
    """Tokens and rows that are trained in each accumulation window of this process.

    Returns:
        `dict` of `torch.Tensor` of shape `(len(batches) / accumulation_steps,)`: `window_tokens` and `window_rows`.
        Rows that are marked as `faulty` count for nothing, empty completions as rows.
    """
    tokens = torch.stack([sequences(batch)[2].sum() for batch in batches])
    rows = torch.stack([(~batch["faulty"]).sum() for batch in batches])
    counts = {"window_tokens": tokens, "window_rows": rows}
    return {name: values.view(-1, accumulation_steps).sum(dim=1) for name, values in counts.items()}
