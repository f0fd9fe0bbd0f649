"""Reduce the logits of one chunk of tokens to scores, and compute the gradient of the logits in closed form.

[`score_logits`] is plain autograd. [`score_logits_in_place`] computes the same values without a graph, in the memory
of the logits; its gradient is compared with autograd's in the tests.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..divergences import reverse_kl
from .divergence_gradients import Divergence, divergence_in_place, divergence_of


class TokenScores(NamedTuple):
    """Per-token values in nats, of shape `(B, T)` (in a request's loss `(n,)`); 0 outside the mask.

    Attributes:
        logps (`torch.Tensor`): log-probs of the tokens.
        entropy (`torch.Tensor`): entropy of the next-token distribution; detached.
        divergence (`torch.Tensor`, *optional*): divergence from the teacher; None without its hidden states.
        reverse_kl (`torch.Tensor`, *optional*): reverse KL to the teacher, detached, for any divergence; None
            unless the request measures it.
        loss (`torch.Tensor`, *optional*): scalar, the sum of the request's loss over the scored tokens; None without a
            loss. With a loss, only this value carries the gradient.
        term_gradients (`torch.Tensor` of shape `(2, 2, V)`, *optional*): gradient of `loss` with respect to a bias on
            the logits. The first index is the path, log-probs or divergence; the second is the half of the
            completions. None unless the request has `half`.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor | None
    reverse_kl: torch.Tensor | None = None
    loss: torch.Tensor | None = None
    term_gradients: torch.Tensor | None = None


TokenLoss = Callable[[TokenScores, torch.Tensor], torch.Tensor]


def score_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    temperature: float,
    kd_temperature: float,
    divergence: Divergence,
    measure_reverse_kl: bool = False,
) -> TokenScores:
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    with torch.no_grad():
        entropy = -(log_probs.exp() * log_probs).sum(dim=-1)
    if teacher_logits is None:
        return TokenScores(logps, entropy, None)
    if kd_temperature != temperature:
        log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
    teacher_log_probs = torch.log_softmax(teacher_logits / kd_temperature, dim=-1)
    value = divergence_of(divergence, log_probs, teacher_log_probs, targets)
    measured = None
    if measure_reverse_kl:
        with torch.no_grad():
            measured = value.detach() if divergence is reverse_kl else reverse_kl(log_probs, teacher_log_probs)
    return TokenScores(logps, entropy, value, measured)


def score_logits_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    temperature: float,
    kd_temperature: float,
    divergence: Divergence,
    measure_reverse_kl: bool = False,
) -> tuple[TokenScores, Callable[..., torch.Tensor]]:
    r"""Score like [`score_logits`] without a graph, and return a function for the gradient of the logits.

    The function maps gradients of `logps` and `divergence`, `(n,)`, to the gradient of the logits `(n, V)`:

    $$ \partial \log q(y) / \partial z_v = 1_{v=y} - q_v, \qquad
       \partial \mathrm{KL}(q \| p) / \partial z_v = q_v (\log q_v - \log p_v - \mathrm{KL}) $$

    [`divergence_in_place`] has the gradients of the other divergences.

    With `halves`, the membership `(2, n)` of each token and the total `term_gradients`, it also adds to the latter.

    The logits of both models are overwritten, and for the reverse KL only one more tensor of their size is allocated
    (more with two temperatures, and for other divergences): the system clears fresh memory, which takes longer than
    the computation.
    """
    kd_log_probs = None
    if teacher_logits is not None and kd_temperature != temperature:
        kd_log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
    log_probs = _log_softmax_(logits, temperature)
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    probs = log_probs.exp()
    value = measured = divergence_gradient = None
    if teacher_logits is not None:
        kd_log_probs = log_probs if kd_log_probs is None else kd_log_probs
        kd_probs = probs if kd_log_probs is log_probs else kd_log_probs.exp()
        teacher_log_probs = _log_softmax_(teacher_logits, kd_temperature)
        if measure_reverse_kl and divergence is not reverse_kl:
            measured = torch.linalg.vecdot(kd_probs, kd_log_probs - teacher_log_probs)
        value, divergence_gradient = divergence_in_place(
            divergence, kd_log_probs, kd_probs, teacher_log_probs, targets
        )
        if measure_reverse_kl and divergence is reverse_kl:
            measured = value
    entropy = -log_probs.mul_(probs).sum(dim=-1)  # after the divergence, since this overwrites `log_probs`

    def gradient(
        of_logps: torch.Tensor,
        of_divergence: torch.Tensor | None = None,
        halves: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        of_logps = of_logps[:, None] / temperature
        total = probs.mul_(-of_logps).scatter_add_(1, targets[:, None], of_logps)
        if halves is not None:
            membership, term_gradients = halves[0].to(total.dtype), halves[1]
            term_gradients[0] += membership @ total
        if divergence_gradient is not None and of_divergence is not None:
            of_divergence = of_divergence / kd_temperature
            if halves is not None:
                term_gradients[1] += (membership * of_divergence) @ divergence_gradient
            total.addcmul_(divergence_gradient, of_divergence[:, None])
        return total

    return TokenScores(logps, entropy, value, measured), gradient


def _log_softmax_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probs at a temperature; the logits are overwritten."""
    if temperature != 1.0:
        logits.div_(temperature)
    # The CPU kernel supports writing to its input. On GPUs fresh memory is cheap.
    return torch.log_softmax(logits, dim=-1, out=logits if logits.device.type == "cpu" else None)
