"""Reduce the logits of one chunk of tokens to scores, and compute the gradient of the logits in closed form.

[`score_logits`] is plain autograd. [`score_logits_in_place`] computes the same values without a graph, in the memory
of the logits; its gradient is compared with autograd's in the tests.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..objectives import forward_kl, reverse_kl


class TokenScores(NamedTuple):
    """Per-token values in nats, of shape `(B, T)` (in a request's loss `(n,)`); 0 outside the mask.

    Attributes:
        logps (`torch.Tensor`): log-probs of the tokens.
        entropy (`torch.Tensor`): entropy of the next-token distribution; detached.
        divergence (`torch.Tensor`, *optional*): divergence from the teacher; None without its hidden states.
        loss (`torch.Tensor`, *optional*): scalar, the sum of the request's loss over the scored tokens; None without a
            loss. With a loss, only this value carries the gradient.
        term_gradients (`torch.Tensor` of shape `(2, 2, V)`, *optional*): gradient of `loss` with respect to a bias on
            the logits. The first index is the path, log-probs or divergence; the second is the half of the
            completions. None unless the request has `half`.
    """

    logps: torch.Tensor
    entropy: torch.Tensor
    divergence: torch.Tensor | None
    loss: torch.Tensor | None = None
    term_gradients: torch.Tensor | None = None


Divergence = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
TokenLoss = Callable[[TokenScores, torch.Tensor], torch.Tensor]


def score_logits(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    temperature: float,
    kd_temperature: float,
    divergence_of: Divergence,
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
    return TokenScores(logps, entropy, divergence_of(log_probs, teacher_log_probs))


def score_logits_in_place(
    logits: torch.Tensor,
    targets: torch.Tensor,
    teacher_logits: torch.Tensor | None,
    temperature: float,
    kd_temperature: float,
    divergence_of: Divergence,
) -> tuple[TokenScores, Callable[..., torch.Tensor]]:
    r"""Score like [`score_logits`] without a graph, and return a function for the gradient of the logits.

    The function maps gradients of `logps` and `divergence`, `(n,)`, to the gradient of the logits `(n, V)`:

    $$ \partial \log q(y) / \partial z_v = 1_{v=y} - q_v, \qquad
       \partial \mathrm{KL}(q \| p) / \partial z_v = q_v (\log q_v - \log p_v - \mathrm{KL}), \qquad
       \partial \mathrm{KL}(p \| q) / \partial z_v = q_v - p_v $$

    With `halves`, the membership `(2, n)` of each token and the total `term_gradients`, it also adds to the latter.

    The logits of both models are overwritten, and only one more tensor of their size is allocated (more with two
    temperatures): the system clears fresh memory, which takes longer than the computation.
    """
    kd_log_probs = None
    if teacher_logits is not None and kd_temperature != temperature:
        kd_log_probs = torch.log_softmax(logits / kd_temperature, dim=-1)
    log_probs = _log_softmax_(logits, temperature)
    logps = log_probs.gather(1, targets[:, None]).squeeze(1)
    probs = log_probs.exp()
    divergence = divergence_gradient = None
    if teacher_logits is not None:
        kd_log_probs = log_probs if kd_log_probs is None else kd_log_probs
        kd_probs = probs if kd_log_probs is log_probs else kd_log_probs.exp()
        teacher_log_probs = _log_softmax_(teacher_logits, kd_temperature)
        divergence, divergence_gradient = _divergence_in_place(
            kd_log_probs, kd_probs, teacher_log_probs, divergence_of
        )
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

    return TokenScores(logps, entropy, divergence), gradient


def _divergence_in_place(
    log_probs: torch.Tensor, probs: torch.Tensor, teacher_log_probs: torch.Tensor, divergence_of: Divergence
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the divergence `(n,)` and its gradient with respect to the student's logits over temperature, `(n, V)`.

    `teacher_log_probs` are overwritten.

    Raises:
        ValueError: for a divergence other than the reverse and the forward KL.
    """
    if divergence_of is reverse_kl:
        gradient = teacher_log_probs.neg_().add_(log_probs).mul_(probs)
        divergence = gradient.sum(dim=-1)
        return divergence, gradient.addcmul_(probs, divergence[:, None], value=-1.0)
    if divergence_of is forward_kl:
        teacher_probs = teacher_log_probs.exp()
        divergence = teacher_log_probs.sub_(log_probs).mul_(teacher_probs).sum(dim=-1)
        return divergence, teacher_probs.neg_().add_(probs)
    raise ValueError(f"divergence must be reverse_kl or forward_kl with a loss, got {divergence_of!r}.")


def _log_softmax_(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return the log-probs at a temperature; the logits are overwritten."""
    if temperature != 1.0:
        logits.div_(temperature)
    # The CPU kernel supports writing to its input. On GPUs fresh memory is cheap.
    return torch.log_softmax(logits, dim=-1, out=logits if logits.device.type == "cpu" else None)
