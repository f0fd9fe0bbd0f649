r"""MiniLLM's objective as pure functions of tensors.

For a prompt x and a completion y_1..y_T (its end-of-sequence token included), student q_theta, teacher p, and the
behavior policy mu that sampled y, all at the sampling temperature, the loss is

$$ \sum_t \underbrace{-\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t)}_{\text{long term}}
   + \underbrace{\mathrm{KL}(q_\theta(\cdot|y_{<t}) \,\|\, p(\cdot|y_{<t}))}_{\text{single step}} $$

with rho_t = q_theta(y_t) / mu(y_t) and A_t the (normalised) sum of the *future* log-ratios log p / q_old. Its expected
gradient at alpha = 0, gamma = 1, without normalisation and clipping, is the gradient of the sequence-level reverse KL.

Equation numbers refer to arXiv 2306.08543 (v6). Shapes: B sequences, T positions, V vocabulary. Log-probabilities are
in nats. Functions return per-token values; reduction is in `masking`.
"""

import math

import torch


def token_rewards(teacher_logps: torch.Tensor, student_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Per-token rewards $r_t = \log p(y_t|y_{<t}) - \log q_{old}(y_t|y_{<t})$ (the summand of Eq. 2's return).

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs of the sampled tokens under the teacher.
        student_logps (`torch.Tensor` of shape `(B, T)`): the same under the student that is frozen for this rollout.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached: no gradient flows through a reward. 0 outside the mask. Where
        the teacher gives a sampled token probability zero the reward is -inf, which is what the reverse KL is there.
    """
    return (teacher_logps - student_logps).detach().masked_fill(~mask, 0.0)


def reward_to_go(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    include_current: bool = False,
    length_normalization: bool = True,
) -> torch.Tensor:
    r"""Return of the future at every position, by default as the mean of the future rewards (Eq. 6).

    $$ R_{t+1} = \sum_{i=t+1}^{T} \gamma^{\,i-t-1} r_i, \qquad
       R^{norm}_{t+1} = R_{t+1} \Big/ \sum_{i=t+1}^{T} \gamma^{\,i-t-1} $$

    The reward of the current token is left out because the single-step term accounts for it exactly (Eq. 3);
    `include_current=True` gives $R_t$ with weights $\gamma^{i-t}$, for use without that term.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): per-token rewards, nats. Must be finite where `mask` is True.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        gamma (`float`, *optional*, defaults to `1.0`): discount, in [0, 1]. With `0.0` only the nearest counted reward
            is left (0^0 = 1).
        include_current (`bool`, *optional*, defaults to `False`): whether $r_t$ is part of the return at t.
        length_normalization (`bool`, *optional*, defaults to `True`): whether to divide by the sum of the weights of
            the real tokens, so that the return does not grow with the length that is left.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached; 0 where there is no counted token, so at the last token, and
        outside the mask.

    Raises:
        ValueError: if `gamma` lies outside [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}.")
    offset = 0 if include_current else 1
    position = torch.arange(rewards.shape[1], device=rewards.device)
    distance = position[:, None] - position[None, :] - offset  # (T, T), i - t - offset
    # float64: the discounted sums of long completions lose digits in half precision and under TF32
    weights = torch.pow(torch.tensor(gamma, dtype=torch.float64, device=rewards.device), distance.clamp(min=0))
    weights = weights.masked_fill(distance < 0, 0.0)
    returns = rewards.detach().double().masked_fill(~mask, 0.0) @ weights  # (B, T)
    if length_normalization:
        total_weight = mask.double() @ weights
        returns = returns / total_weight.masked_fill(total_weight == 0, 1.0)
    return returns.masked_fill(~mask, 0.0).to(rewards.dtype)


def mixture_logps(student_logps: torch.Tensor, teacher_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""Log-probs of the sampled tokens under the teacher-mixed behavior policy (Eq. 4).

    $$ \log \mu(y_t) = \log\big(\alpha\, p(y_t) + (1-\alpha)\, q_{old}(y_t)\big) $$

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled.
        teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the teacher.
        alpha (`float`): the teacher's share, in [0, 1]. 0 returns `student_logps`, 1 `teacher_logps`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached.

    Raises:
        ValueError: if `alpha` lies outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    if alpha == 0.0:
        return student_logps.detach()
    if alpha == 1.0:
        return teacher_logps.detach()
    return torch.logaddexp(math.log1p(-alpha) + student_logps, math.log(alpha) + teacher_logps).detach()


def clipped_policy_gradient_loss(
    logps: torch.Tensor,
    behavior_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float,
) -> torch.Tensor:
    r"""Per-token long-term loss with PPO's clip, the ratio doubling as importance weight (Algorithm 1).

    $$ \ell_t = -\min\big(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon)\, A_t\big), \qquad
       \rho_t = q_\theta(y_t) / \mu(y_t) $$

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student being trained; the only input with
            gradient.
        behavior_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the policy that sampled, see
            [`mixture_logps`].
        advantages (`torch.Tensor` of shape `(B, T)`): see [`reward_to_go`].
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon (`float`): half-width of the clip range, > 0; `float("inf")` switches clipping off.

    Returns:
        `torch.Tensor` of shape `(B, T)`; 0 with zero gradient outside the mask. At rho = 1 its value is -A_t and its
        gradient -A_t grad log q_theta(y_t).

    Raises:
        ValueError: if `epsilon` is not positive.
    """
    if not epsilon > 0.0:
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    # masked before exp: a padded slot may hold anything, and inf * 0 in the backward pass would be NaN
    log_ratio = (logps - behavior_logps.detach()).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    clipped_ratio = ratio.clamp(1.0 - epsilon, 1.0 + epsilon)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def reverse_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""Reverse KL of the next-token distributions, exact over the vocabulary (the single-step term of Eq. 3).

    $$ \mathrm{KL}(q_\theta \| p) = \sum_{v \in V} q_\theta(v)\, \big(\log q_\theta(v) - \log p(v)\big) $$

    Args:
        student_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs of the student; carries the
            gradient.
        teacher_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs of the teacher; detached here.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0. Tokens that the student gives probability zero add nothing; a
        token that only the teacher gives probability zero makes it infinite.
    """
    impossible = student_log_probs == -math.inf  # 0 log 0 = 0, kept out of the graph
    log_ratio = (student_log_probs - teacher_log_probs.detach()).masked_fill(impossible, 0.0)
    return (student_log_probs.exp() * log_ratio).sum(dim=-1)
