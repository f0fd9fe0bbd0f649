"""Completions with a number that is not finite: what is wrong with them, and how an update leaves them out."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..loss import LOSS_INPUTS
from ..rollouts.buffer import Batch, sequences

logger = logging.getLogger(__name__)

_MOST_WARNINGS = 4  # of a rollout: a broken teacher spoils every completion


def explain_faults(
    teacher_logps: torch.Tensor,
    student_logps: torch.Tensor,
    weights: torch.Tensor,
    mask: torch.Tensor,
    completion_ids: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase,
    expected_rewards: torch.Tensor | None = None,
) -> dict[int, str]:
    """Say what is not finite first in each row of scored completions, all `(B, T)`, where `mask` is True.

    Returns:
        `dict[int, str]`: by the number of the row.
    """
    checked = [("the teacher", teacher_logps), ("the student", student_logps), ("weight", weights)]
    if expected_rewards is not None:
        checked.append(("expected reward", expected_rewards))
    faults: dict[int, str] = {}
    for what, values in checked:
        bad = ~values.isfinite() & mask
        for row in bad.any(dim=1).nonzero().flatten().tolist():
            position = int(bad[row].int().argmax())
            token, value = completion_ids[row, position].item(), values[row, position].item()
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
    """Name, for each row that is not marked as faulty, a value of the loss's inputs that is not finite."""
    mask, found = sequences(batch)[2], {}
    for name in (name for name in LOSS_INPUTS if name in batch):
        bad = (~batch[name].isfinite() & mask).any(dim=1) & ~batch["faulty"]
        for row in bad.nonzero().flatten().tolist():
            values = batch[name][row].expand(mask.shape[1])[mask[row]]
            found.setdefault(row, f"its {name} have the value {values[~values.isfinite()][0].item()}")
    return found


def warn_of_faults(faults: Mapping[int, str], prompts: Sequence[Any], prompt_index: Sequence[int]) -> None:
    """Warn of faults by the prompts of their rows; `prompt_index` is their places in the dataset, -1 if not known."""
    for row, fault in list(faults.items())[:_MOST_WARNINGS]:
        number = "" if prompt_index[row] < 0 else f" {prompt_index[row]}"
        logger.warning(f"Prompt{number} {str(prompts[row])[:80]!r}: {fault}.")
    if len(faults) > _MOST_WARNINGS:
        logger.warning(f"The same or the like holds for {len(faults) - _MOST_WARNINGS} more completions.")


def name_rows(batch: Batch, rows: torch.Tensor) -> str:
    """Name the rows `(B,)` of a micro-batch by their prompts, or by their numbers where these are not known."""
    if "prompt_index" not in batch:  # a batch of `score_rollouts`
        return f"the rows {rows.nonzero().flatten().tolist()} of the batch"
    return f"the prompts {sorted(set(batch['prompt_index'][rows].tolist()))} of train_dataset"


def explain_empty_step(batch: Batch) -> list[str]:
    """Say which rows a micro-batch has lost if nothing is left to train in its whole optimizer step."""
    if not batch["faulty"].any() or batch.get("window_tokens", 1) > 0:
        return []
    return [f"what is scored is not finite with {name_rows(batch, batch['faulty'])}"]


def explain_losses(loss: torch.Tensor, batch: Batch) -> list[str]:
    """Say which rows of a micro-batch have a loss `(B, T)` that is not finite although their scores were."""
    bad = (~loss.isfinite() & sequences(batch)[2]).any(dim=1)
    return [f"what is scored is not finite with {name_rows(batch, bad)}"] if bad.any() else []


def leave_out_faulty(batch: Batch) -> Batch:
    """Take the tokens of faulty rows out of the completions, so that nothing that counts or averages tokens has them.

    Args:
        batch (`dict` of `torch.Tensor`): of [`MiniLLMTrainer.score_rollouts`]; `faulty`, of shape `(B,)`, marks rows.
    """
    mask = batch["completion_mask"]
    return {**batch, "completion_mask": mask.masked_fill(batch["faulty"][:, None], 0)}


def trained_rows(batch: Batch, pad_token_id: int) -> Batch:
    """The rows of a micro-batch that are trained: all but those that are faulty.

    A faulty row does not go through the student at all, as a number that is not finite in a forward pass gives a
    gradient that is not finite even where its loss counts nothing. Where no row is left there is one of padding, for
    each process has to make its pass.
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
