"""The loss of each token, combined from the terms in `objectives`.

The clip itself is in `objectives.clipped_policy_gradient_loss`; `clipped_tokens` repeats its rule for the metrics.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from .models.fused_head import TokenScores
from .objectives import clipped_policy_gradient_loss, reference_kl

# Entries of a rollout that the loss needs besides the scores
LOSS_INPUTS = (
    *("advantages", "old_per_token_logps", "student_logps", "long_term_weights", "single_step_weights"),
    *("importance_sampling_ratio", "ref_per_token_logps", "token_weights", "sampled_reverse_kl"),
)
# Fields of MiniLLMConfig that are arguments of `loss_terms`
LOSS_OPTIONS = (
    *("importance_weighting", "epsilon", "epsilon_high", "delta"),
    *("single_step_decomposition", "beta", "use_bias_correction_kl"),
)


class ClippedTokens(NamedTuple):
    """Masks `(B, T)` of tokens at which the clip removes the gradient of the long term.

    Attributes:
        by_mixing (`torch.Tensor`): clipped from the start, because q_old / mu is outside the clip range.
        by_drift (`torch.Tensor`): clipped only after the student has moved away from q_old.
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
    """Find the tokens clipped by teacher mixing, and those clipped by the student's drift.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the current student (q_theta).
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled (q_old).
        old_logps (`torch.Tensor` of shape `(B, T)`): log-probs in the denominator of the clipped ratio: of mu, or of
            q_old for decoupled weights, with which nothing is clipped by mixing.
        advantages (`torch.Tensor` of shape `(B, T)`): factor of the ratio.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon, epsilon_high, delta (`float`): clip range, see
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
    """Terms of the loss at each token, in the shape of the scores, in nats except for `weights`.

    Attributes:
        loss (`torch.Tensor`): weighted sum of the terms. It and the terms have a gradient.
        long_term (`torch.Tensor`): clipped policy-gradient term.
        single_step (`torch.Tensor`, *optional*): divergence from the teacher; None for one with another tokenizer.
        reverse_kl (`torch.Tensor`): reverse KL to the teacher, for metrics.
        reference_kl (`torch.Tensor`, *optional*): KL to the reference model; None without one.
        weights (`torch.Tensor`): factor of the advantage of each token, before clipping.
        clipped ([`ClippedTokens`]): tokens without a long-term gradient.
    """

    loss: torch.Tensor
    long_term: torch.Tensor
    single_step: torch.Tensor | None
    reverse_kl: torch.Tensor
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
    r"""Compute the loss of each token from the scores and the rollout's values of that token alone.

    $$ \ell_t = w_t \big( W_t\, \ell^{\mathrm{long}}_t + W'_t\, D(q_\theta, p)_t \big) + \beta\, \rho_t\, k_t $$

    Args:
        rollout (`Mapping[str, torch.Tensor]`): the entries `LOSS_INPUTS` of [`MiniLLMTrainer.score_rollouts`], of
            which those from `importance_sampling_ratio` on are optional; in the shape of the scores.
        scores ([`TokenScores`]): scores of the student being trained, with its divergence D from the teacher, by
            default the reverse KL.
        mask (`torch.Tensor`): True on the completion's tokens.
        importance_weighting (`str`): see [`~minillm_trl.objectives.importance_weights`]. With `"token"`, the clipped
            ratio is to the behavior policy; otherwise to the student that sampled, so that only the drift is clipped.
        epsilon, epsilon_high, delta (`float`): see [`~minillm_trl.objectives.clipped_policy_gradient_loss`].
        single_step_decomposition (`bool`): whether the loss includes the divergence.
        beta (`float`): weight of the KL to the reference model.
        use_bias_correction_kl (`bool`): whether to multiply this KL by the ratio, so that its expectation is that
            under the student.

    Returns:
        [`LossTerms`].
    """
    old_logps = rollout["old_per_token_logps" if importance_weighting == "token" else "student_logps"]
    weights = rollout["long_term_weights"] * (scores.logps - old_logps).masked_fill(~mask, 0.0).exp()
    long_term = rollout["long_term_weights"] * clipped_policy_gradient_loss(
        scores.logps, old_logps, rollout["advantages"], mask, epsilon, epsilon_high, delta
    )
    if "importance_sampling_ratio" in rollout:  # from vLLM's distribution to the student's
        long_term = long_term * rollout["importance_sampling_ratio"]
    loss = long_term
    if single_step_decomposition:
        assert scores.divergence is not None  # the request had the teacher's hidden states
        loss = loss + rollout["single_step_weights"] * scores.divergence
    if "token_weights" in rollout:
        loss = rollout["token_weights"] * loss
    kl = None
    if "ref_per_token_logps" in rollout:
        kl = reference_kl(scores.logps, rollout["ref_per_token_logps"], mask)
        loss = loss + beta * (kl * weights if use_bias_correction_kl else kl)
    clipped = clipped_tokens(
        scores.logps, rollout["student_logps"], old_logps, rollout["advantages"], mask, epsilon, epsilon_high, delta
    )
    reverse_kl = scores.divergence if scores.reverse_kl is None else scores.reverse_kl
    if reverse_kl is None:  # no distributions to compare: an estimate from the sampled tokens
        reverse_kl = rollout["sampled_reverse_kl"]
    return LossTerms(loss, long_term, scores.divergence, reverse_kl, kl, weights, clipped)


def loss_of_tokens(
    rollout: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> Callable[[TokenScores, torch.Tensor], torch.Tensor]:
    """Return the loss of chosen tokens as a function of their scores and their numbers among all tokens.

    Args:
        rollout (`Mapping[str, torch.Tensor]`): as in [`loss_terms`], of shape `(B, T)`.
        options (`Mapping`): the `LOSS_OPTIONS`.
    """
    flat = {name: values.reshape(-1) for name, values in rollout.items()}

    def loss(scores: TokenScores, tokens: torch.Tensor) -> torch.Tensor:
        everywhere = torch.ones_like(tokens, dtype=torch.bool)
        return loss_terms({name: values[tokens] for name, values in flat.items()}, scores, everywhere, **options).loss

    return loss
