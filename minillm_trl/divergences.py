r"""Divergences of next-token distributions, as pure functions of tensors: the choices of `single_step_divergence`.

With the student q and the teacher p at one position, H the entropy, and all sums over the vocabulary:

| function | formula | source |
|---|---|---|
| [`reverse_kl`] | KL(q \|\| p) | MiniLLM, Eq. 3 |
| [`forward_kl`] | KL(p \|\| q) | word-level KD |
| [`mixed_kl`] | (1 - s) KL(q \|\| p) + s KL(p \|\| q) | 2605.16826 |
| [`generalized_jsd`] | beta KL(p \|\| m) + (1 - beta) KL(q \|\| m), m = beta p + (1 - beta) q | GKD, 2306.13649 |
| [`skewed_forward_kl`] | KL(p \|\| alpha p + (1 - alpha) q) | DistiLLM, 2402.03898 |
| [`skewed_reverse_kl`] | KL(q \|\| alpha q + (1 - alpha) p) | DistiLLM, 2402.03898 |
| [`entropy_aware_kl`] | KL(q \|\| p) + [H(p) > tau] KL(p \|\| q) | EOPD, 2603.07079 |
| [`trust_region_kl`] | w KL(q \|\| p) + (1 - w) KL(p \|\| q), w = min(1, p(y_t) / q(y_t)) | TrOPD, 2606.01249 |

All take normalised log-probs of shape `(..., V)`, in nats, and return the divergence `(...)`, in nats and >= 0. The
gradient flows through the student only. A token with probability zero under the first argument of a KL adds nothing;
the KL is infinite if only its second argument has probability zero. `models/divergence_gradients.py` has the same
divergences with their gradients in closed form.
"""

import math
from collections.abc import Callable
from functools import partial

import torch

__all__ = [
    "DIVERGENCES",
    "choose_divergence",
    "entropy_aware_kl",
    "forward_kl",
    "generalized_jsd",
    "mixed_kl",
    "reverse_kl",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "teacher_trust",
    "trust_region_kl",
]

# Names of the functions, which are also the values of `MiniLLMConfig.single_step_divergence`, with the parameter that
# each one takes from the field of the same name
DIVERGENCES: dict[str, str | None] = {
    "reverse_kl": None,
    "forward_kl": None,
    "mixed_kl": "forward_kl_share",
    "generalized_jsd": "jsd_beta",
    "skewed_forward_kl": "skew_alpha",
    "skewed_reverse_kl": "skew_alpha",
    "entropy_aware_kl": "teacher_entropy_threshold",
    "trust_region_kl": None,
}


def _kl(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return KL(first || second) from log-probs `(..., V)`; both may have a gradient."""
    impossible = first == -math.inf  # 0 log 0 = 0, without a gradient
    return (first.exp() * (first - second).masked_fill(impossible, 0.0)).sum(dim=-1)


def log_mixture(share: float, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Return log(share * exp(first) + (1 - share) * exp(second)), for a share in (0, 1)."""
    return torch.logaddexp(first + math.log(share), second + math.log1p(-share))


def reverse_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""Return the reverse KL of next-token distributions, exact over the vocabulary (single-step term of Eq. 3).

    $$ \mathrm{KL}(q_\theta \| p) = \sum_{v \in V} q_\theta(v)\, \big(\log q_\theta(v) - \log p(v)\big) $$

    Args:
        student_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs of the student; carries the
            gradient.
        teacher_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs of the teacher; detached here.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0. Tokens with probability zero under the student add nothing;
        infinite if a token has probability zero only under the teacher.
    """
    return _kl(student_log_probs, teacher_log_probs.detach())


def forward_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    r"""Return the forward KL of next-token distributions, exact over the vocabulary (L_PT in the authors' code).

    $$ \mathrm{KL}(p \| q_\theta) = \sum_{v \in V} p(v)\, \big(\log p(v) - \log q_\theta(v)\big) $$

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0. It differs from the cross-entropy to the teacher by the teacher's
        entropy, so its gradient is the same. Tokens with probability zero under the teacher add nothing.
    """
    return _kl(teacher_log_probs.detach(), student_log_probs)


def mixed_kl(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, forward_kl_share: float = 0.5
) -> torch.Tensor:
    r"""Return a weighted sum of both KL divergences: $(1-s)\,\mathrm{KL}(q \| p) + s\,\mathrm{KL}(p \| q)$.

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        forward_kl_share (`float`, *optional*, defaults to `0.5`): s, in [0, 1]; 0.5 is half of Jeffreys' divergence.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0.

    Raises:
        ValueError: if `forward_kl_share` is outside [0, 1].
    """
    if not 0.0 <= forward_kl_share <= 1.0:
        raise ValueError(f"forward_kl_share must lie in [0, 1], got {forward_kl_share}.")
    if forward_kl_share in (0.0, 1.0):  # so that an infinite term with weight 0 adds nothing
        return (forward_kl if forward_kl_share else reverse_kl)(student_log_probs, teacher_log_probs)
    reverse = reverse_kl(student_log_probs, teacher_log_probs)
    return (1.0 - forward_kl_share) * reverse + forward_kl_share * forward_kl(student_log_probs, teacher_log_probs)


def generalized_jsd(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, jsd_beta: float = 0.5
) -> torch.Tensor:
    r"""Return the generalised Jensen-Shannon divergence of GKD (arXiv 2306.13649, Eq. 1).

    $$ \mathrm{JSD}_\beta = \beta\, \mathrm{KL}(p \,\|\, m) + (1-\beta)\, \mathrm{KL}(q_\theta \,\|\, m), \qquad
       m = \beta\, p + (1-\beta)\, q_\theta $$

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        jsd_beta (`float`, *optional*, defaults to `0.5`): beta, in [0, 1]. As in TRL, 0 and 1 are the limits of
            $\mathrm{JSD}_\beta / \beta$ and $\mathrm{JSD}_\beta / (1-\beta)$: the forward KL at 0, the reverse KL at
            1. Without that division the formula itself is 0 at both ends, so values near an end give a small loss.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, in [0, log 2] for beta in (0, 1). The mixture depends on the student
        too: the gradient flows through both terms.

    Raises:
        ValueError: if `jsd_beta` is outside [0, 1].
    """
    if not 0.0 <= jsd_beta <= 1.0:
        raise ValueError(f"jsd_beta must lie in [0, 1], got {jsd_beta}.")
    if jsd_beta in (0.0, 1.0):
        return (reverse_kl if jsd_beta else forward_kl)(student_log_probs, teacher_log_probs)
    teacher_log_probs = teacher_log_probs.detach()
    mixture = log_mixture(jsd_beta, teacher_log_probs, student_log_probs)
    return jsd_beta * _kl(teacher_log_probs, mixture) + (1.0 - jsd_beta) * _kl(student_log_probs, mixture)


def skewed_forward_kl(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, skew_alpha: float = 0.1
) -> torch.Tensor:
    r"""Return DistiLLM's skew KL (arXiv 2402.03898): $\mathrm{KL}(p \,\|\, \alpha p + (1-\alpha) q)$.

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        skew_alpha (`float`, *optional*, defaults to `0.1`): alpha, in [0, 1); the authors use 0.1, and 0 is
            [`forward_kl`].

    Returns:
        `torch.Tensor` of shape `(...)`, nats, in [0, -log alpha]: finite even where the student has probability zero.

    Raises:
        ValueError: if `skew_alpha` is outside [0, 1).
    """
    _check_skew(skew_alpha)
    if skew_alpha == 0.0:
        return forward_kl(student_log_probs, teacher_log_probs)
    teacher_log_probs = teacher_log_probs.detach()
    return _kl(teacher_log_probs, log_mixture(skew_alpha, teacher_log_probs, student_log_probs))


def skewed_reverse_kl(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, skew_alpha: float = 0.1
) -> torch.Tensor:
    r"""Return DistiLLM's skew reverse KL (arXiv 2402.03898): $\mathrm{KL}(q \,\|\, \alpha q + (1-\alpha) p)$.

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        skew_alpha (`float`, *optional*, defaults to `0.1`): alpha, in [0, 1); the authors use 0.1, and 0 is
            [`reverse_kl`].

    Returns:
        `torch.Tensor` of shape `(...)`, nats, in [0, -log alpha]: finite even where the teacher has probability zero.
        The gradient flows through both arguments.

    Raises:
        ValueError: if `skew_alpha` is outside [0, 1).
    """
    _check_skew(skew_alpha)
    if skew_alpha == 0.0:
        return reverse_kl(student_log_probs, teacher_log_probs)
    return _kl(student_log_probs, log_mixture(skew_alpha, student_log_probs, teacher_log_probs.detach()))


def _check_skew(skew_alpha: float) -> None:
    if not 0.0 <= skew_alpha < 1.0:
        raise ValueError(f"skew_alpha must lie in [0, 1), got {skew_alpha}.")


def entropy_aware_kl(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, teacher_entropy_threshold: float = 0.8
) -> torch.Tensor:
    r"""Return the reverse KL, plus the forward KL where the teacher is unsure (EOPD, arXiv 2603.07079).

    $$ \mathrm{KL}(q_\theta \| p) + [H(p) > \tau]\, \mathrm{KL}(p \| q_\theta), \qquad
       H(p) = -\sum_{v} p(v) \log p(v) $$

    The paper differs in two details. It estimates the reverse KL from the sampled token, as a policy gradient, where
    this one is exact. It cuts the forward KL to the teacher's likeliest tokens to save memory, where this one has the
    whole vocabulary. We know the value of tau and that the terms add up from descriptions of the authors' code.

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        teacher_entropy_threshold (`float`, *optional*, defaults to `0.8`): tau in nats, >= 0. At 0, the forward KL is
            added everywhere except where the teacher is certain.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0.

    Raises:
        ValueError: if `teacher_entropy_threshold` is negative.
    """
    if not teacher_entropy_threshold >= 0.0:
        raise ValueError(f"teacher_entropy_threshold must not be negative, got {teacher_entropy_threshold}.")
    entropy = torch.special.entr(teacher_log_probs.exp()).sum(dim=-1)
    forward = forward_kl(student_log_probs, teacher_log_probs)
    return reverse_kl(student_log_probs, teacher_log_probs) + forward.masked_fill(
        entropy <= teacher_entropy_threshold, 0.0
    )


def teacher_trust(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    r"""Return the probability that the teacher trusts a sampled token: $w_t = \min(1,\ p(y_t) / q_\theta(y_t))$.

    It is the acceptance probability of speculative decoding, and the trust region of TrOPD (arXiv 2606.01249).

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): normalised log-probs.
        tokens (`torch.Tensor` of shape `(...)`): the sampled tokens.

    Returns:
        `torch.Tensor` of shape `(...)`, in [0, 1], detached.
    """
    chosen = tokens[..., None]
    log_ratio = teacher_log_probs.gather(-1, chosen) - student_log_probs.gather(-1, chosen)
    return log_ratio.squeeze(-1).detach().clamp(max=0.0).exp()


def trust_region_kl(
    student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    r"""Return the reverse KL where the teacher trusts the sampled token, else the forward KL (TrOPD, 2606.01249).

    $$ w_t\, \mathrm{KL}(q_\theta \| p) + (1 - w_t)\, \mathrm{KL}(p \| q_\theta), \qquad
       w_t = \min\big(1,\ p(y_t) / q_\theta(y_t)\big) $$

    The paper tosses a coin with probability $w_t$ at each token; this is the expectation over the coin, which has the
    same expected gradient and less variance. Where it differs otherwise: the reverse KL is exact, not estimated from
    the sampled token; the forward KL has the whole vocabulary, not the teacher's likeliest tokens; and its third
    term, the imitation of prefixes that the teacher wrote, is left out. $w_t$ depends on the sampled token, so the
    divergence is no function of the two distributions alone.

    Args:
        student_log_probs, teacher_log_probs (`torch.Tensor` of shape `(..., V)`): as in [`reverse_kl`].
        tokens (`torch.Tensor` of shape `(...)`): the sampled tokens $y_t$.

    Returns:
        `torch.Tensor` of shape `(...)`, nats, >= 0. No gradient flows through $w_t$. Infinite if the teacher gives
        probability zero to a token that is not the sampled one; it is the forward KL if it does so to the sampled
        one, where $w_t = 0$.
    """
    trust = teacher_trust(student_log_probs, teacher_log_probs, tokens)
    # 0 times an infinite reverse KL is 0, also in the gradient
    reverse = reverse_kl(student_log_probs, teacher_log_probs.masked_fill((trust == 0.0)[..., None], 0.0))
    return trust * reverse + (1.0 - trust) * forward_kl(student_log_probs, teacher_log_probs)


def choose_divergence(name: str, **parameters: float) -> Callable[..., torch.Tensor]:
    """Return the divergence of a name in `DIVERGENCES`, with the one of the `parameters` that it takes fixed."""
    function = globals()[name]
    parameter = DIVERGENCES[name]
    return function if parameter is None else partial(function, **{parameter: parameters[parameter]})
