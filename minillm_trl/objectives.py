r"""MiniLLM's objective as pure functions of tensors.

For a prompt x and a completion y_1..y_T (its end-of-sequence token included), student q_theta, teacher p, and the
behavior policy mu that sampled y, all at the sampling temperature, the loss is

$$ \sum_t \underbrace{-\min(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon) A_t)}_{\text{long term}}
   + \underbrace{\mathrm{KL}(q_\theta(\cdot|y_{<t}) \,\|\, p(\cdot|y_{<t}))}_{\text{single step}} $$

with rho_t = q_theta(y_t) / mu(y_t) and A_t the (normalised) sum of the *future* log-ratios log p / q_old. Its expected
gradient at alpha = 0, gamma = 1, without normalisation and clipping, is the gradient of the sequence-level reverse KL.

Equation numbers refer to arXiv 2306.08543 (v6). Shapes: B sequences, T positions, V vocabulary. Log-probabilities are
in nats. Functions return per-token values; `masking` has the reductions. Baselines and whitening of returns are in
`advantages`, and also public here. `divergences` has the choices of the single step.
"""

import math

import torch

from .advantages import batch_advantages, leave_one_out_baseline, replace_by_group_mean, whiten
from .divergences import forward_kl, reverse_kl

__all__ = [
    "REWARD_ESTIMATORS",
    "WEIGHTING_LEVELS",
    "batch_advantages",
    "clipped_policy_gradient_loss",
    "expected_rewards",
    "forward_kl",
    "importance_weights",
    "language_modeling_loss",
    "leave_one_out_baseline",
    "mixture_logps",
    "reference_kl",
    "replace_by_group_mean",
    "reverse_kl",
    "reward_to_go",
    "token_rewards",
    "whiten",
]

REWARD_ESTIMATORS = ("sampled", "expected")
WEIGHTING_LEVELS = ("token", "decoupled", "prefix", "sequence")


def token_rewards(
    teacher_logps: torch.Tensor,
    student_logps: torch.Tensor,
    mask: torch.Tensor,
    scale: float = 1.0,
    clip: float | None = None,
    span_lengths: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Return the reward of each token (the summand of the return in Eq. 2), by default without scale and clip.

    $$ r_t = \mathrm{clip}\big((\log p(y_t|y_{<t}) - \log q_{old}(y_t|y_{<t})) / \mathrm{scale},
       -\mathrm{clip}, \mathrm{clip}\big) $$

    Args:
        teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs of the sampled tokens under the teacher.
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student of this rollout (q_old).
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        scale (`float`, *optional*, defaults to `1.0`): divisor, > 0; 0.5 in the authors' code.
        clip (`float`, *optional*): maximum absolute value of a scaled reward. None does not clip.
        span_lengths (`torch.Tensor` of shape `(B, T)`, *optional*): number of tokens whose rewards are added up in a
            log-prob, at least 1; multiplies `clip`, which so bounds their mean. By default 1.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats (over `scale`), detached: no gradient flows through a reward. 0 outside
        the mask. Without a clip, the reward is -inf where the teacher gives a sampled token probability zero, since
        the reverse KL is infinite there.

    Raises:
        ValueError: if `scale` or `clip` is not positive.
    """
    log_ratio = (teacher_logps - student_logps).detach().masked_fill(~mask, 0.0)
    return _scale_and_clip(log_ratio, scale, clip, span_lengths)


def expected_rewards(
    teacher_log_probs: torch.Tensor,
    student_log_probs: torch.Tensor,
    sampling_log_probs: torch.Tensor | None = None,
    scale: float = 1.0,
    clip: float | None = None,
) -> torch.Tensor:
    r"""Return the expectation of [`token_rewards`] over the next token, given the tokens before it.

    $$ \bar r_t = \sum_{v \in V} q_{old}(v|y_{<t})\, r_t(v), \qquad
       r_t(v) = \mathrm{clip}\big((\log p(v|y_{<t}) - \log q_{old}(v|y_{<t})) / \mathrm{scale}\big) $$

    Without scale and clip it is $-\mathrm{KL}(q_{old} \,\|\, p)$ of the next token. In place of a *future* reward, it
    keeps the expected gradient and removes the variance of sampling that token (Rao-Blackwell, as in arXiv 2504.10637
    and 2605.07865). The expectation is over the student, even if the mixture drew the token.

    Args:
        teacher_log_probs, student_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs of the teacher,
            and of the student of this rollout (q_old), at the temperature of the rewards.
        sampling_log_probs (`torch.Tensor` of shape `(..., V)`, *optional*): log-probs of this student at the sampling
            temperature, for the expectation. Required if the temperatures differ.
        scale, clip (`float`): as in [`token_rewards`].

    Returns:
        `torch.Tensor` of shape `(...)`, nats (over `scale`), detached: no gradient flows through a reward. Tokens that
        the student gives probability zero add nothing. Without a clip, -inf if only the teacher gives a token
        probability zero.

    Raises:
        ValueError: if `scale` or `clip` is not positive.
    """
    sampling_log_probs = student_log_probs if sampling_log_probs is None else sampling_log_probs
    impossible = sampling_log_probs == -math.inf  # 0 * inf = 0
    log_ratio = (teacher_log_probs - student_log_probs).detach().masked_fill(impossible, 0.0)
    return (sampling_log_probs.detach().exp() * _scale_and_clip(log_ratio, scale, clip)).sum(dim=-1)


def _scale_and_clip(
    log_ratio: torch.Tensor, scale: float, clip: float | None, span_lengths: torch.Tensor | None = None
) -> torch.Tensor:
    if not scale > 0.0 or not (clip is None or clip > 0.0):
        raise ValueError(f"scale and clip must be positive, got scale={scale} and clip={clip}.")
    rewards = log_ratio / scale
    if clip is None or span_lengths is None:
        return rewards if clip is None else rewards.clamp(-clip, clip)
    bounds = (clip * span_lengths).to(rewards.dtype)
    return rewards.clamp(-bounds, bounds)


def reward_to_go(
    rewards: torch.Tensor,
    mask: torch.Tensor,
    gamma: float = 1.0,
    include_current: bool = False,
    length_normalization: bool = True,
    discounted_length: bool = True,
    future_rewards: torch.Tensor | None = None,
) -> torch.Tensor:
    r"""Return the reward-to-go at every position, by default as the mean of the future rewards (Eq. 6).

    $$ R_{t+1} = \sum_{i=t+1}^{T} \gamma^{\,i-t-1} r_i, \qquad
       R^{norm}_{t+1} = R_{t+1} \Big/ \sum_{i=t+1}^{T} \gamma^{\,i-t-1} $$

    The reward of the current token is left out because the single-step term accounts for it exactly (Eq. 3).
    `include_current=True` returns $R_t$ with weights $\gamma^{i-t}$, for use without that term.

    Args:
        rewards (`torch.Tensor` of shape `(B, T)`): per-token rewards, nats. Must be finite where `mask` is True.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        gamma (`float`, *optional*, defaults to `1.0`): discount, in [0, 1]. `0.0` keeps only the first reward of the
            sum (0^0 = 1).
        include_current (`bool`, *optional*, defaults to `False`): whether the return at t includes $r_t$.
        length_normalization (`bool`, *optional*, defaults to `True`): whether to divide by the sum of the weights of
            the real tokens, so that the return does not grow with the remaining length.
        discounted_length (`bool`, *optional*, defaults to `True`): whether this sum is discounted like the return.
            `False` divides by the number of tokens, as the authors' code does. With gamma < 1, this shrinks returns
            with many tokens ahead of them.
        future_rewards (`torch.Tensor` of shape `(B, T)`, *optional*): replacement for the rewards after t in the
            return at t, such as [`expected_rewards`]. The current reward is always the sampled one, because it depends
            on the token whose score it multiplies; its expectation would multiply a score with mean 0.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached; 0 if no reward counts, as at the last token, and outside the
        mask.

    Raises:
        ValueError: if `gamma` is outside [0, 1].
    """
    if not 0.0 <= gamma <= 1.0:
        raise ValueError(f"gamma must lie in [0, 1], got {gamma}.")
    future_rewards = rewards if future_rewards is None else future_rewards
    # float64: the discounted sums of long completions lose digits in half precision
    current, future = (values.detach().double().masked_fill(~mask, 0.0) for values in (rewards, future_rewards))
    returns = _sums_ahead(future, gamma, include_current)
    if include_current:
        returns = returns + (current - future)
    if length_normalization:
        total_weight = _sums_ahead(mask.double(), gamma if discounted_length else 1.0, include_current)
        returns = returns / total_weight.masked_fill(total_weight == 0, 1.0)
    return returns.masked_fill(~mask, 0.0).to(rewards.dtype)


def _sums_ahead(values: torch.Tensor, gamma: float, include_current: bool) -> torch.Tensor:
    r"""Return $\sum_{i \ge t} \gamma^{i-t} x_i$ at each position, or $\sum_{i>t} \gamma^{i-t-1} x_i$.

    A scan by doubling: each of the log2(T) rounds extends the sums over `span` positions by the sums over the next
    `span`. Memory is O(T). Dividing cumulative sums by powers of gamma would underflow on long completions.
    """
    span = 1
    while span < values.shape[1]:
        ahead = torch.zeros_like(values)
        ahead[:, :-span] = values[:, span:]
        values, span = values + gamma**span * ahead, 2 * span
    return values if include_current else torch.nn.functional.pad(values, (0, 1))[:, 1:]


def mixture_logps(student_logps: torch.Tensor, teacher_logps: torch.Tensor, alpha: float) -> torch.Tensor:
    r"""Return log-probs of the sampled tokens under the teacher-mixed behavior policy (Eq. 4).

    $$ \log \mu(y_t) = \log\big(\alpha\, p(y_t) + (1-\alpha)\, q_{old}(y_t)\big) $$

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled.
        teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the teacher.
        alpha (`float`): the teacher's share, in [0, 1]. 0 returns `student_logps`, 1 `teacher_logps`.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats, detached.

    Raises:
        ValueError: if `alpha` is outside [0, 1].
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}.")
    if alpha == 0.0:
        return student_logps.detach()
    if alpha == 1.0:
        return teacher_logps.detach()
    return torch.logaddexp(math.log1p(-alpha) + student_logps, math.log(alpha) + teacher_logps).detach()


def importance_weights(
    student_logps: torch.Tensor, behavior_logps: torch.Tensor, mask: torch.Tensor, level: str, cap: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Return weights that turn expectations over the behavior policy into expectations over the student.

    With $w_t = q_{old}(y_t) / \mu(y_t)$, for the long and the single-step term (Eq. 5 before its truncation):

    | `level` | long term | single step |
    |---|---|---|
    | `"token"` | 1 | 1 |
    | `"decoupled"` | $w_t$ | 1 |
    | `"prefix"` | $\prod_{i \le t} w_i$ | $\prod_{i < t} w_i$ |
    | `"sequence"` | $\prod_{i \le T} w_i$ | $\prod_{i \le T} w_i$ |

    `"token"` (the paper's) needs no extra weight: [`clipped_policy_gradient_loss`] takes the clipped ratio to the
    behavior policy. With the other levels, the clipped ratio is to the student that sampled and covers only its drift;
    the weight above multiplies the loss. Only `"sequence"` makes the expected gradient exact. The variance grows from
    the first row to the last. The single-step term at t depends only on the tokens before t.

    Args:
        student_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student that sampled (q_old).
        behavior_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the policy that sampled (mu).
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        level (`str`): a row of the table.
        cap (`float`, *optional*): upper bound of the weights, which trades variance for bias. None does not cap.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]` of shape `(B, T)`: the two columns of the table, detached; 1 outside the
        mask, except for `"sequence"`, which has the same weight in the whole row.

    Raises:
        ValueError: if `level` is unknown or `cap` is not positive.
    """
    if level not in WEIGHTING_LEVELS:
        raise ValueError(f"level must be one of {WEIGHTING_LEVELS}, got {level!r}.")
    if cap is not None and not cap > 0.0:
        raise ValueError(f"cap must be positive, got {cap}.")
    # float64: products over long completions overflow in float32
    log_weights = (student_logps - behavior_logps).detach().double().masked_fill(~mask, 0.0)
    nothing = torch.zeros_like(log_weights)
    if level == "token":
        long_term, single_step = nothing, nothing
    elif level == "decoupled":
        long_term, single_step = log_weights, nothing
    elif level == "prefix":
        long_term = log_weights.cumsum(dim=1)
        single_step = long_term - log_weights
    else:
        long_term = single_step = log_weights.sum(dim=1, keepdim=True).expand_as(log_weights)
    long_term, single_step = long_term.exp(), single_step.exp()
    if cap is not None:
        long_term, single_step = long_term.clamp(max=cap), single_step.clamp(max=cap)
    return long_term.to(student_logps.dtype), single_step.to(student_logps.dtype)


def clipped_policy_gradient_loss(
    logps: torch.Tensor,
    behavior_logps: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    epsilon: float,
    epsilon_high: float | None = None,
    delta: float | None = None,
) -> torch.Tensor:
    r"""Return the long-term loss of each token with PPO's clip; the ratio is also the importance weight (Algorithm 1).

    $$ \ell_t = -\min\big(\rho_t A_t,\ \mathrm{clip}(\rho_t, 1-\epsilon, 1+\epsilon)\, A_t\big), \qquad
       \rho_t = q_\theta(y_t) / \mu(y_t) $$

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student being trained; the only input that gets a
            gradient.
        behavior_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the policy that sampled, see
            [`mixture_logps`].
        advantages (`torch.Tensor` of shape `(B, T)`): see [`reward_to_go`].
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        epsilon (`float`): half-width of the clip range, > 0; `float("inf")` disables clipping.
        epsilon_high (`float`, *optional*): width of its upper half, if different.
        delta (`float`, *optional*): upper bound of the ratio for negative advantages too, for which PPO's clip has no
            bound; above 1 + `epsilon_high`. None sets no bound.

    Returns:
        `torch.Tensor` of shape `(B, T)`; 0 with zero gradient outside the mask. At rho = 1, the value is -A_t and the
        gradient -A_t grad log q_theta(y_t).

    Raises:
        ValueError: if `epsilon` or `epsilon_high` is not positive, or `delta` is not above the clip range.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    if not (epsilon > 0.0 and epsilon_high > 0.0):
        raise ValueError(f"epsilon must be positive, got epsilon={epsilon} and epsilon_high={epsilon_high}.")
    if delta is not None and not delta > 1.0 + epsilon_high:
        raise ValueError(f"delta must be above 1 + epsilon_high = {1.0 + epsilon_high}, got {delta}.")
    # mask before exp: padding may hold any value, and inf * 0 in the backward pass would be NaN
    log_ratio = (logps - behavior_logps.detach()).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    advantages = advantages.detach().masked_fill(~mask, 0.0)
    clipped_ratio = ratio.clamp(1.0 - epsilon, 1.0 + epsilon_high)
    if delta is not None:
        ratio = ratio.clamp(max=delta)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


def reference_kl(logps: torch.Tensor, reference_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    r"""Estimate the KL to a reference model from the sampled tokens, as GRPO does for `beta`.

    $$ \exp(\delta_t) - \delta_t - 1, \qquad \delta_t = \log q_{ref}(y_t) - \log q_\theta(y_t) $$

    It is never negative; for $y_t \sim q_\theta$ its expectation is $\mathrm{KL}(q_\theta \| q_{ref})$.

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs under the student being trained; carries the gradient.
        reference_logps (`torch.Tensor` of shape `(B, T)`): log-probs under the reference model; detached here.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats; 0 with zero gradient outside the mask.
    """
    difference = (reference_logps.detach() - logps).masked_fill(~mask, 0.0)
    return difference.exp() - difference - 1.0


def language_modeling_loss(
    logps: torch.Tensor, forward_kl: torch.Tensor | None = None, kd_ratio: float = 0.0
) -> torch.Tensor:
    r"""Return the loss of each token of the plain-text corpus (L_PT of Algorithm 1).

    $$ \ell_t = -(1-\lambda) \log q_\theta(d_t|d_{<t}) + \lambda\, \mathrm{KL}(p \| q_\theta) $$

    Args:
        logps (`torch.Tensor` of shape `(B, T)`): log-probs of the corpus's tokens; carries the gradient.
        forward_kl (`torch.Tensor` of shape `(B, T)`, *optional*): see [`forward_kl`]; required if `kd_ratio` > 0.
        kd_ratio (`float`, *optional*, defaults to `0.0`): lambda, in [0, 1]. The paper has 0, the authors' code 0.5.

    Returns:
        `torch.Tensor` of shape `(B, T)`, nats.

    Raises:
        ValueError: if `kd_ratio` is outside [0, 1], or positive without `forward_kl`.
    """
    if not 0.0 <= kd_ratio <= 1.0:
        raise ValueError(f"kd_ratio must lie in [0, 1], got {kd_ratio}.")
    if kd_ratio == 0.0:
        return -logps
    if forward_kl is None:
        raise ValueError(f"kd_ratio={kd_ratio} requires forward_kl.")
    return -(1.0 - kd_ratio) * logps + kd_ratio * forward_kl
