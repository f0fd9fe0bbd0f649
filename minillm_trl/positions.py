r"""Which positions of a completion are trained, and with what weight, as pure functions.

By default every token of a completion counts the same. The methods here change that, and with it the objective:

| function | trains | source |
|---|---|---|
| [`rollout_horizon`] | the first K tokens, no others are sampled | prefix OPD, 2602.15260; POPD, TOPD, 2605.31490 |
| [`prefix_discrepancy_weights`] | all tokens, early ones more | IW-OPD, 2606.22600 |
| [`top_entropy_weights`] | the tokens at which the student is least sure | TIP, 2604.14084 |

Weights multiply the whole loss of a token, long term and single step. Shapes: B sequences, T positions.
"""

import math

import torch

__all__ = ["prefix_discrepancy_weights", "rollout_horizon", "top_entropy_weights"]


def rollout_horizon(step: int, limit: int, start: int | None = None, steps: int | None = None) -> int:
    r"""Return the number of tokens that training rollouts may have at an optimizer step.

    $$ K(s) = \mathrm{round}\big(K_0 + (K - K_0) \min(1,\ s / S)\big) $$

    A completion that is cut at K(s) is a complete sample of the problem with that horizon, so what is minimised is the
    reverse KL of the first K(s) tokens, KL(q(y_{1..K}) || p(y_{1..K})), a lower bound of the whole. It says nothing
    about later tokens, nor about where the text ends. The papers let the horizon grow (a linear growth is that of
    prefix OPD; for POPD it is our guess), or keep it (TOPD, at about a tenth of the limit).

    Args:
        step (`int`): optimizer steps so far, s.
        limit (`int`): the whole horizon K.
        start (`int`, *optional*): the first horizon K_0, in [1, `limit`]. None keeps the whole horizon.
        steps (`int`, *optional*): optimizer steps S in which it grows to `limit`, >= 1. None keeps it at `start`.

    Raises:
        ValueError: if `start` or `steps` is out of range.
    """
    if start is None:
        return limit
    if not 1 <= start <= limit:
        raise ValueError(f"start must lie in [1, {limit}], got {start}.")
    if steps is None:
        return start
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}.")
    return round(start + (limit - start) * min(1.0, step / steps))


def prefix_discrepancy_weights(rewards: torch.Tensor, mask: torch.Tensor, gamma: float) -> torch.Tensor:
    r"""Return IW-OPD's weight of each token, which falls with the discrepancy of the tokens before it (2606.22600).

    $$ w_t = 1 + \gamma \Big( 1 - \frac{\sum_{i<t} |r_i|}{\sum_{i \le T} |r_i|} \Big), \qquad
       r_i = \log p(y_i|y_{<i}) - \log q_{old}(y_i|y_{<i}) $$

    The first token has weight 1 + gamma; after the last discrepancy the weight is 1. The weight of a token depends on
    the whole completion, later tokens included, so it biases the gradient: the reverse KL is no longer minimised, but
    a sum over positions in which early ones count more.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): see [`~minillm_trl.objectives.token_rewards`]; a scale cancels.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        gamma (`float`): amplification of early tokens, >= 0; the paper uses 0.5.

    Returns:
        `torch.Tensor` of shape `(B, T)`, in [1, 1 + gamma], detached; 1 outside the mask. A completion without any
        discrepancy has weight 1 + gamma everywhere.

    Raises:
        ValueError: if `gamma` is negative.
    """
    if not gamma >= 0.0:
        raise ValueError(f"gamma must not be negative, got {gamma}.")
    sizes = rewards.detach().double().masked_fill(~mask, 0.0).abs()
    before, total = sizes.cumsum(dim=1) - sizes, sizes.sum(dim=1, keepdim=True)
    weights = 1.0 + gamma * (1.0 - before / total.masked_fill(total == 0.0, 1.0)).clamp(min=0.0)
    return weights.masked_fill(~mask, 1.0).to(rewards.dtype)


def top_entropy_weights(entropy: torch.Tensor, mask: torch.Tensor, quantile: float) -> torch.Tensor:
    r"""Return weights that train only the tokens of highest entropy of the student (TIP's entropy rule, 2604.14084).

    $$ w_t = \frac{N}{k}\, [t \in \mathcal{T}], \qquad k = \lceil \rho N \rceil $$

    $\mathcal{T}$ are the k tokens of highest entropy among all N. The factor N / k makes the mean over all tokens the
    paper's mean over the selected ones. The bias is on purpose: tokens at which the student is sure get no gradient
    at all, even where it is sure of something that the teacher would never write.

    Args:
        entropy (`torch.Tensor` of shape `(B, T)`): entropy of the student that sampled, nats.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        quantile (`float`): rho, in (0, 1]; the share of tokens to train. The paper's main setting is 0.5.

    Returns:
        `torch.Tensor` of shape `(B, T)`, detached; 0 outside the selection. Its mean over the mask is 1.

    Raises:
        ValueError: if `quantile` is outside (0, 1].
    """
    if not 0.0 < quantile <= 1.0:
        raise ValueError(f"quantile must lie in (0, 1], got {quantile}.")
    known = mask.flatten().nonzero().squeeze(1)
    kept = math.ceil(quantile * len(known))
    weights = entropy.new_zeros(entropy.numel())
    if kept:
        weights[known[entropy.flatten()[known].topk(kept).indices]] = len(known) / kept
    return weights.view_as(entropy)
