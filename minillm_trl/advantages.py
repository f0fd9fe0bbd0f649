r"""What turns returns into advantages: baselines, whitening, and the rewards of functions.

The returns and their length normalisation are in `objectives.reward_to_go`. Pure functions of tensors, public in
`minillm_trl.objectives`. Shapes: B sequences, T positions, N completions of all
processes, F reward functions.
"""

import torch


def leave_one_out_baseline(returns: torch.Tensor, mask: torch.Tensor, groups: torch.Tensor) -> torch.Tensor:
    r"""Return the mean return of the other rows in a row's group that reach the same position.

    $$ b_{i,t} = \frac{1}{|G_{i,t}|} \sum_{j \in G_{i,t}} R_{j,t}, \qquad
       G_{i,t} = \{ j \ne i :\ j \text{ is in the group of } i,\ y_{j,t} \text{ exists} \} $$

    It is unbiased if the rows were sampled independently: given all other rows and the tokens before t,
    $\mathbb{E}[\nabla \log q(y_{i,t}|y_{i,<t})\, b_{i,t}] = 0$. The mean excludes the row itself, since its return
    depends on its token. Whether a token exists at t depends only on the tokens before t.

    Args:
        returns (`torch.Tensor` of shape `(B, T)`): see [`~minillm_trl.objectives.reward_to_go`], nats.
        mask (`torch.Tensor` of shape `(B, T)`): True on the tokens that have a return.
        groups (`torch.Tensor` of shape `(B,)`, int64): number of each row's group, from 0: a single group for the
            whole buffer, or one for each prompt.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached; 0 outside the mask, and if no other row reaches t.
    """
    # float64, so that subtracting a row from its group's sum loses no digits of the returns
    values = returns.detach().double().masked_fill(~mask, 0.0)
    alive = mask.double()
    totals = values.new_zeros(int(groups.max()) + 1 if len(groups) else 0, values.shape[1])
    sums, counts = (totals.index_add(0, groups, addend)[groups] - addend for addend in (values, alive))
    return (sums / counts.clamp(min=1.0)).masked_fill(~mask, 0.0).to(returns.dtype)


def whiten(values: torch.Tensor, mask: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    r"""Shift and scale to mean 0 and variance 1: $(A_t - \bar A) / \sqrt{\mathrm{var}(A) + 10^{-8}}$.

    Args:
        values (`torch.Tensor` of shape `(B, T)`): advantages.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        moments (`torch.Tensor` of shape `(3,)`, float64): count, sum and sum of squares for mean and variance, see
            [`~minillm_trl.masking.masked_moments`], which the caller sums over all processes. A count above the number
            of tokens includes additional zeros.

    Returns:
        `torch.Tensor` of shape `(B, T)`, detached; 0 outside the mask, and everywhere if all values are equal.
    """
    count, total, squares = moments
    mean = total / count
    variance = (squares / count - mean.square()).clamp(min=0.0)
    whitened = (values.detach().double() - mean) * torch.rsqrt(variance + 1e-8)
    return whitened.masked_fill(~mask, 0.0).to(values.dtype)


def replace_by_group_mean(rewards: torch.Tensor, replaced: torch.Tensor, group_size: int) -> torch.Tensor:
    """Replace rewards by the mean of the other rewards in their group, which thereby keeps that mean.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): rewards by function; each group is `group_size` consecutive rows.
            NaN where a function does not apply.
        replaced (`torch.Tensor` of shape `(N, F)`): True on rewards to replace.
        group_size (`int`): completions of a prompt.

    Returns:
        `torch.Tensor` of shape `(N, F)`; NaN if the group has no other reward.
    """
    kept = rewards.masked_fill(replaced, torch.nan)
    mean = kept.view(-1, group_size, rewards.shape[1]).nanmean(dim=1).repeat_interleave(group_size, dim=0)
    return torch.where(replaced, mean, rewards)


def batch_advantages(
    rewards: torch.Tensor, weights: torch.Tensor, scale: bool = True, normalize_each: bool = False
) -> torch.Tensor:
    r"""Compute advantages of reward functions, relative to the batch mean, for one completion per prompt.

    $$ A_b = (R_b - \bar R) / (\mathrm{std}(R) + 10^{-4}), \qquad R_b = \sum_f w_f r_{b,f} $$

    This is GRPO's formula with all completions as one group.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): rewards of all processes by function; NaN where a function does not
            apply.
        weights (`torch.Tensor` of shape `(F,)`): weight of each function.
        scale (`bool`, *optional*, defaults to `True`): whether to divide by the standard deviation.
        normalize_each (`bool`, *optional*, defaults to `False`): whether to normalise each function's rewards before
            they are added (GRPO's `"normalize_then_sum"`).

    Returns:
        `torch.Tensor` of shape `(N,)`, detached; 0 for completions without a reward.
    """

    def normalized(values: torch.Tensor, scale: bool) -> torch.Tensor:
        count = (~values.isnan()).sum(dim=0)
        centered = values - values.nanmean(dim=0)
        if not scale:
            return centered
        # as in GRPO, the sample standard deviation, which is 0 here for a single value
        std = (centered.square().nansum(dim=0) / (count - 1).clamp(min=1)).sqrt()
        return centered / (std + 1e-4)

    rewards = rewards.detach()
    unscored = rewards.isnan().all(dim=1)
    summands = normalized(rewards, True) if normalize_each else rewards
    total = (summands * weights).nansum(dim=1).masked_fill(unscored, torch.nan)
    return normalized(total, scale or normalize_each).nan_to_num(nan=0.0)
