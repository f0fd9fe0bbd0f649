"""Completions with NaN or infinite numbers: explain the fault, and leave them out of the update."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..loss import LOSS_INPUTS
from ..rollouts.buffer import Batch, sequences

logger = logging.getLogger(__name__)

_MAX_WARNINGS = 4  # per rollout, since a broken teacher makes every completion faulty


def explain_faults(
    teacher_logps: torch.Tensor,
    student_logps: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    completion_ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    expected_rewards: torch.Tensor | None = None,
) -> dict[int, str]:
    """Describe the first number that is not finite in each row of scored completions.

    All tensors have the shape `(B, T)`; only tokens where `mask` is True are checked.

    Returns:
        `dict[int, str]`: descriptions by row number.
    """
    checked = [("the teacher", teacher_logps), ("the student", student_logps), ("weight", weights)]
    if expected_rewards is not None:
        checked.append(("expected reward", expected_rewards))
    faults: dict[int, str] = {}
    for what, values in checked:
        bad = ~values.isfinite() & mask
        for row in bad.any(dim=1).nonzero().flatten().tolist():
            position = int(bad[row].int().argmax())
            token, value = int(completion_ids[row, position]), values[row, position].item()
            place = f"at token {token} ({tokenizer.decode([token])!r}), position {position} of the completion"
            if what == "weight":
                fault = (
                    f"the importance weight is {value} {place}: a product of q / mu has overflowed (set "
                    "importance_weight_cap, or importance_weighting='token')"
                )
            elif what == "expected reward":
                fault = (
                    f"the expected reward is {value} {place}: the teacher gives probability zero to a token that the "
                    "student may sample there (set reward_clip, or reward_estimator='sampled')"
                )
            elif value == -torch.inf:
                fault = f"{what} gives probability zero {place}, where the reverse KL is infinite"
            else:
                fault = f"{what}'s log-prob is {value} {place}"
            faults.setdefault(row, fault)
    return faults


def explain_values(batch: Batch) -> dict[int, str]:
    """Name a non-finite value among the inputs of the loss, for each row that is not yet marked as faulty."""
    mask = sequences(batch)[2]
    found: dict[int, str] = {}
    for name in (name for name in LOSS_INPUTS if name in batch):
        bad = (~batch[name].isfinite() & mask).any(dim=1) & ~batch["faulty"]
        for row in bad.nonzero().flatten().tolist():
            values = batch[name][row].expand(mask.shape[1])[mask[row]]
            found.setdefault(row, f"{name} contains {values[~values.isfinite()][0].item()}")
    return found


def warn_of_faults(faults: Mapping[int, str], prompts: Sequence[Any], prompt_index: Sequence[int]) -> None:
    """Log faults with the prompts of their rows; `prompt_index` has their rows in the dataset, -1 if unknown."""
    for row, fault in list(faults.items())[:_MAX_WARNINGS]:
        number = "" if prompt_index[row] < 0 else f" {prompt_index[row]}"
        logger.warning(f"Prompt{number} {str(prompts[row])[:80]!r}: {fault}.")
    if len(faults) > _MAX_WARNINGS:
        logger.warning(f"{len(faults) - _MAX_WARNINGS} more completions have NaN or infinite numbers.")


def name_rows(batch: Batch, rows: torch.Tensor) -> str:
    """Name rows of a micro-batch, chosen by a mask `(B,)`, by their prompts or, if unknown, by their numbers."""
    if "prompt_index" not in batch:  # a batch of `score_rollouts`
        return f"the rows {rows.nonzero().flatten().tolist()} of the batch"
    return f"the prompts {sorted(set(batch['prompt_index'][rows].tolist()))} of train_dataset"


def explain_empty_step(batch: Batch) -> list[str]:
    """Name the faulty rows of a micro-batch if its whole optimizer step has nothing left to train on."""
    if not batch["faulty"].any() or batch.get("window_tokens", 1) > 0:
        return []
    return [f"scores are not finite for {name_rows(batch, batch['faulty'])}"]


def explain_losses(loss: torch.Tensor, batch: Batch) -> list[str]:
    """Name the rows of a micro-batch whose loss `(B, T)` is not finite although their scores were finite."""
    bad = (~loss.isfinite() & sequences(batch)[2]).any(dim=1)
    return [f"the loss is not finite for {name_rows(batch, bad)}"] if bad.any() else []


def explain_loss(loss: float, batch: Batch) -> str:
    """Describe a micro-batch whose loss is not finite."""
    return f"the loss is {loss} for {name_rows(batch, torch.ones_like(batch['faulty']))}"


def leave_out_faulty(batch: Batch) -> Batch:
    """Mask the tokens of faulty rows, so that token counts and means leave them out.

    Args:
        batch (`dict` of `torch.Tensor`): result of [`MiniLLMTrainer.score_rollouts`]; `faulty` `(B,)` marks the rows.
    """
    mask = batch["completion_mask"]
    return {**batch, "completion_mask": mask.masked_fill(batch["faulty"][:, None], 0)}


def trained_rows(batch: Batch, pad_token_id: int) -> Batch:
    """Return the rows of a micro-batch that are not faulty.

    Masking the loss of a faulty row would not be enough: a NaN in the forward pass gives a NaN gradient even with
    weight 0. So faulty rows do not go through the student at all. If no row is left, a row of padding takes their
    place, as every process has to make its pass.
    """
    faulty = batch["faulty"]
    if not faulty.any():
        return batch
    rows = (~faulty).nonzero().squeeze(1)
    kept = rows if len(rows) else torch.zeros(1, dtype=torch.long, device=faulty.device)
    part = {name: values[kept.to(values.device)] if values.dim() else values for name, values in batch.items()}
    if len(rows) == 0:
        for name in ("prompt_ids", "completion_ids"):
            part[name] = torch.full_like(part[name], pad_token_id)
    return part
