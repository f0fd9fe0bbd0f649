"""The rollout buffer: its batches, and the assignment of its rows to optimizer steps."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from .keyed_random import keyed_uniforms

# Tensors by name, see MiniLLMTrainer.score_rollouts. Every inner pass reads the same buffered batches, so never modify
# their tensors in place.
Batch = dict[str, torch.Tensor]


def sequences(batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and attention mask `(B, P+T)` of whole sequences, and the bool mask `(B, T)` of trained tokens.

    Tokens of tools and environments (`tool_mask` 0) are context, but neither rewarded nor trained.
    """
    input_ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention_mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1).long()
    mask = batch["completion_mask"].bool()
    if "tool_mask" in batch:
        mask = mask & batch["tool_mask"].bool()
    return input_ids, attention_mask, mask


def fill_empty_completions(output: dict[str, Any], pad_token_id: int) -> tuple[dict[str, Any], list[int]]:
    """Give each empty completion of a rollout function one padding token, as GRPO reads every last token.

    Returns:
        `tuple`: the output with padded `completion_ids`, `logprobs` and `env_mask`, and the numbers of the empty rows.
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
    """Scatter parts into one zero-padded tensor `(num_rows, length, ...)`.

    Args:
        parts (`Sequence[tuple[Sequence[int], torch.Tensor]]`): row numbers and values `(n, t, ...)`, t <= length.
        num_rows (`int`): rows of the result.
        length (`int`): columns of the result.
    """
    first = parts[0][1]
    values = first.new_zeros(num_rows, length, *first.shape[2:])
    for rows, part in parts:
        values[torch.tensor(rows, device=values.device), : part.shape[1]] = part
    return values


def assemble_fields(parts: Sequence[tuple[Sequence[int], Any]], shape: torch.Size) -> Any:
    """Join named tuples of tensors field by field with [`assemble_rows`]; a field that is None stays None.

    Args:
        parts (`Sequence[tuple[Sequence[int], NamedTuple]]`): row numbers, and named tuples of one class.
        shape (`torch.Size`): `(num_rows, length)` of the result.
    """
    kind = type(parts[0][1])
    known = {name for name in kind._fields if getattr(parts[0][1], name) is not None}
    return kind(
        *(
            assemble_rows([(rows, getattr(part, name)) for rows, part in parts], *shape) if name in known else None
            for name in kind._fields
        )
    )


def trim(batch: Batch) -> Batch:
    """Remove the columns that are padding in every row: the prompts' first and the completions' last."""
    prompt = int(batch["prompt_mask"].bool().any(dim=0).int().argmax())
    length = max(int(batch["completion_mask"].sum(dim=1).max()), 1)
    return {
        name: values if values.dim() < 2 else values[:, prompt:] if name.startswith("prompt_") else values[:, :length]
        for name, values in batch.items()
    }


def pin_states(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with teacher states that are kept on the CPU in pinned memory, if the updates run on CUDA.

    From pinned memory the device copies by itself, while the process continues; other memory is copied twice.
    """
    states = batch.get("teacher_hidden_states")
    if states is None or states.device.type != "cpu" or device.type != "cuda":
        return batch
    return {**batch, "teacher_hidden_states": states.pin_memory()}


def parts_by_length(attention_mask: torch.Tensor, batch_size: int) -> Iterator[tuple[torch.Tensor, slice]]:
    """Split rows `(B, L)` by length: yield the row numbers of each part, and its columns that are not all padding."""
    for rows in attention_mask.sum(dim=1).argsort(descending=True, stable=True).split(batch_size):
        columns = attention_mask[rows].any(dim=0).nonzero().squeeze(1)
        yield rows, slice(int(columns[0]), int(columns[-1]) + 1)


def by_length(lengths: torch.Tensor, num_groups: int) -> torch.Tensor:
    """Return the order of rows `(B,)` that sorts each of `num_groups` consecutive blocks by descending length.

    With a block for each optimizer step, a step keeps its rows, and its micro-batches need less padding.
    """
    order = lengths.view(num_groups, -1).argsort(dim=1, descending=True, stable=True)
    return (order + torch.arange(num_groups, device=order.device)[:, None] * order.shape[1]).flatten()


def deal_rows(num_rows: int, num_steps: int, first_row: int, *key: int) -> torch.Tensor:
    """Stratified shuffle: each block of `num_steps` rows gives one row to each optimizer step.

    Which rows of the whole buffer make up a step depends on `key` alone: not on the number of processes, which hold
    contiguous parts of the buffer, nor on the split into micro-batches. Completions of the same prompt, which are
    neighbours, go to different steps.

    Args:
        num_rows (`int`): rows on this process, a multiple of `num_steps`.
        num_steps (`int`): optimizer steps of a pass over the buffer.
        first_row (`int`): number of this process's first row in the whole buffer.
        key (`int`): key of the random numbers, see [`~minillm_trl.rollouts.keyed_random.keyed_uniforms`].

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
    """Remove trailing zeros, which once made no difference, so that older runs resume with the same order of rows."""
    return _trim_zeros(key[:-1]) if key[-1:] == (0,) else key


def window_counts(batches: Sequence[Batch], accumulation_steps: int) -> dict[str, torch.Tensor]:
    """Count the trained tokens and rows of each accumulation window on this process.

    Returns:
        `dict` of `torch.Tensor` of shape `(len(batches) / accumulation_steps,)`: `window_tokens` and `window_rows`.
        Rows marked as `faulty` do not count; empty completions count as rows.
    """
    tokens = torch.stack([sequences(batch)[2].sum() for batch in batches])
    rows = torch.stack([(~batch["faulty"]).sum() for batch in batches])
    counts = {"window_tokens": tokens, "window_rows": rows}
    return {name: values.view(-1, accumulation_steps).sum(dim=1) for name, values in counts.items()}
