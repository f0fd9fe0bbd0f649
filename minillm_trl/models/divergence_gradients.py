r"""The divergences of `divergences` for a chunk of tokens, with their gradients in closed form.

The gradient is that of the student's logits z, with q = softmax(z). If D has the derivatives $g_v = \partial D /
\partial q_v$, it is $q_v (g_v - \sum_u q_u g_u)$:

| divergence | gradient of $z_v$ |
|---|---|
| reverse KL | $q_v (\log q_v - \log p_v - \mathrm{KL}(q \| p))$ |
| forward KL | $q_v - p_v$ |
| generalised JSD | $(1-\beta)\, q_v (\log q_v - \log m_v - \mathrm{KL}(q \| m))$ |
| skew forward KL | $(1-\alpha) (q_v \sum_u r_u - r_v)$, with $r = q p / m$ |
| skew reverse KL | $q_v (g_v - \sum_u q_u g_u)$, with $g = \log q - \log m - \alpha q / m$ |

The others are sums of the first two, with weights that no gradient flows through. Nothing here builds a graph. Shapes:
n tokens, V vocabulary.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from ..divergences import (
    entropy_aware_kl,
    forward_kl,
    generalized_jsd,
    log_mixture,
    mixed_kl,
    reverse_kl,
    skewed_forward_kl,
    skewed_reverse_kl,
    teacher_trust,
    trust_region_kl,
)

# A divergence of student and teacher log-probs `(..., V)`, or a `partial` of one that fixes its parameter
Divergence = Callable[..., torch.Tensor]
_Found = tuple[torch.Tensor, torch.Tensor]  # the divergence `(n,)`, and its gradient `(n, V)`


def divergence_of(
    divergence: Divergence, log_probs: torch.Tensor, teacher_log_probs: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Return a divergence `(n,)` by its own function, with autograd's gradient."""
    function, options = _resolve(divergence, tokens)
    return function(log_probs, teacher_log_probs, **options)


def divergence_in_place(
    divergence: Divergence,
    log_probs: torch.Tensor,
    probs: torch.Tensor,
    teacher_log_probs: torch.Tensor,
    tokens: torch.Tensor,
) -> _Found:
    """Return the divergence `(n,)` and its gradient with respect to the student's logits over temperature, `(n, V)`.

    Args:
        divergence (`Callable`): a function of `divergences`, or a `functools.partial` of one with its parameter.
        log_probs, probs (`torch.Tensor` of shape `(n, V)`): the student's distribution.
        teacher_log_probs (`torch.Tensor` of shape `(n, V)`): the teacher's; may be overwritten.
        tokens (`torch.Tensor` of shape `(n,)`): the sampled tokens.

    Raises:
        ValueError: for a function without a closed form here.
    """
    function, options = _resolve(divergence, tokens)
    if function not in _IN_PLACE:
        raise ValueError(f"divergence must be a function of minillm_trl.divergences with a loss, got {divergence!r}.")
    return _IN_PLACE[function](log_probs, probs, teacher_log_probs, **options)


def _resolve(divergence: Divergence, tokens: torch.Tensor) -> tuple[Divergence, dict[str, Any]]:
    """Return the function, and the keyword arguments that it needs besides the distributions."""
    function, options = divergence, {}
    if isinstance(divergence, partial):
        function, options = divergence.func, dict(divergence.keywords)
    if function is trust_region_kl:
        options["tokens"] = tokens
    return function, options


def _finite(log_p: torch.Tensor) -> torch.Tensor:
    """Replace -inf by the smallest number, in place, so that a token with probability zero adds zero and not NaN."""
    return log_p.clamp_(min=torch.finfo(log_p.dtype).min)


def _reverse(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor) -> _Found:
    gradient = log_p.neg_().add_(log_q).mul_(q)
    value = gradient.sum(dim=-1)
    return value, gradient.addcmul_(q, value[:, None], value=-1.0)


def _forward(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor) -> _Found:
    p = _finite(log_p).exp()
    value = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return value, p.neg_().add_(q)


def _sum_of_both(
    log_q: torch.Tensor,
    q: torch.Tensor,
    log_p: torch.Tensor,
    p: torch.Tensor,
    of_reverse: torch.Tensor,
    of_forward: torch.Tensor,
) -> _Found:
    """Return a sum of reverse and forward KL with a weight `(n,)` for each token; `log_p` and `p` are overwritten.

    Where the teacher excludes a token, the reverse KL is infinite, but adds nothing with weight 0.
    """
    infinite = log_p.isneginf().any(dim=-1) & (of_reverse > 0.0)
    # far from the smallest number, so that sums over the vocabulary stay finite, and 0 with weight 0
    log_p.clamp_(min=torch.finfo(log_p.dtype).min / 4)
    log_ratio = log_p.neg_().add_(log_q)  # log q - log p
    reverse, forward = torch.linalg.vecdot(q, log_ratio), -torch.linalg.vecdot(p, log_ratio)
    value = (of_reverse * reverse + of_forward * forward).masked_fill_(infinite, torch.inf)
    gradient = log_ratio.sub_(reverse[:, None]).mul_(q).mul_(of_reverse[:, None])
    return value, gradient.addcmul_(p.neg_().add_(q), of_forward[:, None])


def _mixed(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, forward_kl_share: float = 0.5) -> _Found:
    share = log_q.new_full((len(log_q),), forward_kl_share)
    return _sum_of_both(log_q, q, log_p, log_p.exp(), 1.0 - share, share)


def _entropy_aware(
    log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, teacher_entropy_threshold: float = 0.8
) -> _Found:
    p = log_p.exp()
    unsure = torch.special.entr(p).sum(dim=-1) > teacher_entropy_threshold
    return _sum_of_both(log_q, q, log_p, p, torch.ones_like(log_q[:, 0]), unsure.to(log_q.dtype))


def _trust_region(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, tokens: torch.Tensor) -> _Found:
    trust = teacher_trust(log_q, log_p, tokens)
    return _sum_of_both(log_q, q, log_p, log_p.exp(), trust, 1.0 - trust)


def _jsd(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, jsd_beta: float = 0.5) -> _Found:
    if jsd_beta in (0.0, 1.0):
        return (_reverse if jsd_beta else _forward)(log_q, q, log_p)
    log_m = log_mixture(jsd_beta, _finite(log_p), log_q)
    forward = torch.linalg.vecdot(log_p.exp(), log_p.sub_(log_m))
    log_ratio = log_m.neg_().add_(log_q)
    reverse = torch.linalg.vecdot(q, log_ratio)
    gradient = log_ratio.sub_(reverse[:, None]).mul_(q).mul_(1.0 - jsd_beta)
    return jsd_beta * forward + (1.0 - jsd_beta) * reverse, gradient


def _skewed_forward(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, skew_alpha: float = 0.1) -> _Found:
    if skew_alpha == 0.0:
        return _forward(log_q, q, log_p)
    p, log_ratio = _finite(log_p).exp(), log_p.sub_(log_mixture(skew_alpha, log_p, log_q))  # log p - log m
    value = torch.linalg.vecdot(p, log_ratio)
    r = log_ratio.exp_().mul_(q)
    return value, torch.addcmul(-r, q, r.sum(dim=-1, keepdim=True)).mul_(1.0 - skew_alpha)


def _skewed_reverse(log_q: torch.Tensor, q: torch.Tensor, log_p: torch.Tensor, skew_alpha: float = 0.1) -> _Found:
    if skew_alpha == 0.0:
        return _reverse(log_q, q, log_p)
    log_ratio = log_mixture(skew_alpha, log_q, log_p).neg_().add_(log_q)  # log q - log m
    value = torch.linalg.vecdot(q, log_ratio)
    derivative = log_ratio.sub_(skew_alpha * log_ratio.exp())
    return value, derivative.sub_(torch.linalg.vecdot(q, derivative)[:, None]).mul_(q)


_IN_PLACE: dict[Divergence, Callable[..., _Found]] = {
    reverse_kl: _reverse,
    forward_kl: _forward,
    mixed_kl: _mixed,
    generalized_jsd: _jsd,
    skewed_forward_kl: _skewed_forward,
    skewed_reverse_kl: _skewed_reverse,
    entropy_aware_kl: _entropy_aware,
    trust_region_kl: _trust_region,
}
