"""The rollout buffer: its batches, and how its rows are dealt to optimizer steps."""

from collections.abc import Sequence

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


def deal_rows(num_rows: int, num_steps: int, first_row: int, *key: int) -> torch.Tensor:
    """Deal rows at random to the optimizer steps of a pass, one of each block of neighbours to each step.

    Which rows of the whole buffer make up a step depends on `key` alone: not on the number of processes, which hold a
    contiguous part each, nor on how the step is cut into micro-batches. Completions of one prompt, which are
    neighbours, go to different steps.

    Args:
        num_rows (`int`): rows on this process, a multiple of `num_steps`.
        num_steps (`int`): optimizer steps of a pass over the buffer.
        first_row (`int`): number of this process's first row in the whole buffer.
        key (`int`): of the random numbers, see [`~minillm_trl.sampling.keyed_uniforms`].

    Returns:
        `torch.Tensor` of shape `(num_rows,)`, int64: row numbers on this process, those of the first step first.
    """
    first_block = first_row // num_steps
    dealt = [
        keyed_uniforms(num_steps, *key, first_block + block).argsort() + block * num_steps
        for block in range(num_rows // num_steps)
    ]
    return torch.from_numpy(np.stack(dealt, axis=1).reshape(-1))


def window_token_counts(batches: Sequence[Batch], accumulation_steps: int) -> torch.Tensor:
    """Trained tokens in each accumulation window of this process, `(len(batches) / accumulation_steps,)`."""
    counts = torch.stack([sequences(batch)[2].sum() for batch in batches])
    return counts.view(-1, accumulation_steps).sum(dim=1)
