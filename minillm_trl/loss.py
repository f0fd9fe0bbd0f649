"""The loss of each token, put together from the terms of `objectives`."""

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .models.fused_head import TokenScores
from .objectives import clipped_policy_gradient_loss, reference_kl

# What a rollout brings to the loss of its tokens, beside their scores
LOSS_INPUTS = (
    *("advantages", "old_per_token_logps", "student_logps", "long_term_weights", "single_step_weights"),
    *("importance_sampling_ratio", "ref_per_token_logps"),
)
# Fields of MiniLLMConfig that are arguments of `loss_terms`
LOSS_OPTIONS = (
    *("importance_weighting", "epsilon", "epsilon_high", "delta"),
    *("single_step_decomposition", "beta", "use_bias_correction_kl"),
)


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
    old_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> ClippedTokens:
    """Tell tokens clipped by teacher mixing from tokens clipped by the student's drift.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student now (q_theta).
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled (q_old).
        old_logps (`torch.Tensor` of shape `(B, T)`): log-probs that the clipped ratio is relative to: mu's, or q_old's
            where the weights are decoupled, so that nothing is clipped by mixing.
        advantages (`torch.Tensor` of shape `(B, T)`): what the ratio multiplies.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon, epsilon_high, delta (`float`): of the clip range, see
            [`~minillm_trl.objectives.clipped_policy_gradient_loss`].
    """
    high = 1 + (epsilon if epsilon_high is None else epsilon_high)
    bound = torch.inf if delta is None else delta

    def is_clipped(numerator: torch.Tensor) -> torch.Tensor:
        ratio = (numerator - old_logps).exp()
        positive = (ratio > high) & (advantages > 0)
        negative = ((ratio < 1 - epsilon) | (ratio > bound)) & (advantages < 0)
        return (positive | negative) & mask

    by_mixing = is_clipped(student_logps)
    return ClippedTokens(by_mixing, is_clipped(logps) & ~by_mixing)


class LossTerms(NamedTuple):
    """Tensors of the shape of the scores, nats unless stated; `reference_kl` is None without a reference model.

    `loss` and the terms carry the gradient; `weights` is what multiplies the advantage of each token, before clipping.
    """

    loss: torch.Tensor
    long_term: torch.Tensor
    single_step: torch.Tensor
    reference_kl: torch.Tensor | None
    weights: torch.Tensor
    clipped: ClippedTokens


def loss_terms(
    rollout: Mapping[str, torch.Tensor],
    scores: TokenScores,
    mask: torch.Tensor,
    *,
    importance_weighting: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    single_step_decomposition: bool = True,
    beta: float = 0.0,
    use_bias_correction_kl: bool = True,
) -> LossTerms:
    r"""Loss of each token, a function of the scores and the rollout's values of that token alone.

    $$ \ell_t = W_t\, \ell^{\mathrm{long}}_t + W'_t\, \mathrm{KL}(q_\theta \| p)_t + \beta\, \rho_t\, k_t $$

    Args:
        rollout (`Mapping[str, torch.Tensor]`): the entries of [`MiniLLMTrainer.score_rollouts`] that `LOSS_INPUTS`
            names, the last two if there are; of the shape of the scores.
        scores ([`TokenScores`]): of the student being trained, with its divergence from the teacher.
        mask (`torch.Tensor`): True on the completion's tokens.
        importance_weighting (`str`): see [`~minillm_trl.objectives.importance_weights`]. With `"token"` the clipped
            ratio is to the behavior policy, otherwise to the student that sampled, so that the drift alone is clipped.
        epsilon, epsilon_high, delta (`float`): see [`~minillm_trl.objectives.clipped_policy_gradient_loss`].
        single_step_decomposition (`bool`): whether the divergence is part of the loss.
        beta (`float`): weight of the KL to the reference model.
        use_bias_correction_kl (`bool`): whether it is multiplied by the ratio, which makes its expectation that under
            the student.
    """
    old_logps = rollout["old_per_token_logps" if importance_weighting == "token" else "student_logps"]
    clip_range = {"epsilon": epsilon, "epsilon_high": epsilon_high, "delta": delta}
    weights = rollout["long_term_weights"] * (scores.logps - old_logps).masked_fill(~mask, 0.0).exp()
    long_term = rollout["long_term_weights"] * clipped_policy_gradient_loss(
        scores.logps, old_logps, rollout["advantages"], mask, **clip_range
    )
    if "importance_sampling_ratio" in rollout:  # from vLLM's distribution to the student's
        long_term = long_term * rollout["importance_sampling_ratio"]
    loss = long_term
    if single_step_decomposition:
        loss = loss + rollout["single_step_weights"] * scores.divergence
    kl = None
    if "ref_per_token_logps" in rollout:
        kl = reference_kl(scores.logps, rollout["ref_per_token_logps"], mask)
        loss = loss + beta * (kl * weights if use_bias_correction_kl else kl)
    clipped = clipped_tokens(
        scores.logps, rollout["student_logps"], old_logps, rollout["advantages"], mask, **clip_range
    )
    return LossTerms(loss, long_term, scores.divergence, kl, weights, clipped)
