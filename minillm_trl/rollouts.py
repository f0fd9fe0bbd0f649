"""Numbers that describe a batch of rollouts and what the loss does with it."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .fused_head import TokenScores
from .masking import masked_sum

# Tensors by name, see MiniLLMTrainer.score_rollouts. Buffered batches are handed out again in every inner pass, so
# they are never written to.
Batch = dict[str, torch.Tensor]


def window_token_counts(batches: Sequence[Batch], accumulation_steps: int) -> torch.Tensor:
    """Completion tokens in each accumulation window of this process, `(len(batches) / accumulation_steps,)`."""
    counts = torch.stack([batch["completion_mask"].sum() for batch in batches])
    return counts.view(-1, accumulation_steps).sum(dim=1)


class ClippedTokens(NamedTuple):
    """Bool tensors `(B, T)`: where the clip removes the gradient of the long term.

    `by_mixing` holds already for the student that sampled (q_old / mu is outside the range); `by_drift` only since it
    moved.
    """

    by_mixing: torch.Tensor
    by_drift: torch.Tensor


def clipped_tokens(
    logps: torch.Tensor,
    student_logps: torch.Tensor,
    behavior_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float,
) -> ClippedTokens:
    """Tell tokens clipped by teacher mixing from tokens clipped by the student's drift.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student now (q_theta).
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled (q_old).
        behavior_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the policy that sampled (mu).
        advantages (`torch.Tensor` of shape `(B, T)`): what the ratio multiplies.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon (`float`): half-width of the clip range.
    """

    def is_clipped(numerator: torch.Tensor) -> torch.Tensor:
        ratio = (numerator - behavior_logps).exp()
        too_high = (ratio > 1 + epsilon) & (advantages > 0)
        too_low = (ratio < 1 - epsilon) & (advantages < 0)
        return (too_high | too_low) & mask

    by_mixing = is_clipped(student_logps)
    return ClippedTokens(by_mixing, is_clipped(logps) & ~by_mixing)


@torch.no_grad()
def loss_totals(
    batch: Batch, scores: TokenScores, long_term: torch.Tensor, mask: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """What [`loss_metrics`] needs of one process's batch, as one vector, so that one gather serves all metrics.

    Args:
        batch (`dict` of `torch.Tensor`): see [`MiniLLMTrainer.score_rollouts`].
        scores ([`TokenScores`]): the student's scores, with reverse KL.
        long_term (`torch.Tensor` of shape `(B, T)`): per-token long-term loss.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon (`float`): half-width of the clip range.
    """
    behavior_logps = batch["old_per_token_logps"]
    clipped = clipped_tokens(scores.logps, batch["student_logps"], behavior_logps, batch["advantages"], mask, epsilon)
    weights = (scores.logps - behavior_logps).masked_fill(~mask, 0.0).exp().masked_fill(~mask, 0.0)
    totals = [
        mask.sum(),
        torch.tensor(len(mask), device=mask.device),
        *(masked_sum(each, mask) for each in (long_term, scores.reverse_kl, scores.entropy, batch["advantages"])),
        *(each.sum() for each in clipped),
        weights.sum(),
        weights.square().sum(),
        weights.max(),
    ]
    return torch.stack([each.double() for each in totals])


def loss_metrics(gathered: torch.Tensor) -> dict[str, float]:
    """Metrics of one micro-batch over all processes.

    Args:
        gathered (`torch.Tensor` of shape `(processes, K)`): [`loss_totals`] of every process.

    Returns:
        `dict`: means over the real tokens in nats; `objective/reverse_kl` is the sum over a completion's tokens, mean
        over completions (states from the behavior policy; in evaluation from the student, so an unbiased estimate of
        the objective); `importance_weight/effective_sample_size` is a share, sum^2 / (n * sum of squares).
    """
    tokens, sequences, long_term, kl, entropy, advantage, mixing, drift, weights, squares, _ = gathered.sum(0).tolist()
    tokens = max(tokens, 1.0)
    return {
        "objective/long_term": long_term / tokens,
        "objective/single_step": kl / tokens,
        "objective/reverse_kl": kl / max(sequences, 1.0),
        "objective/advantage": advantage / tokens,
        "entropy": entropy / tokens,
        "clip_ratio/mixing": mixing / tokens,
        "clip_ratio/drift": drift / tokens,
        "importance_weight/mean": weights / tokens,
        "importance_weight/max": gathered[:, -1].max().item(),
        "importance_weight/effective_sample_size": weights**2 / (tokens * squares) if squares else 1.0,
    }
