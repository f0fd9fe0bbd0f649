r"""Log-probs of a teacher at k listed tokens, and its next-token distribution completed from them.

Listed are the k most likely tokens of the teacher, or of the student. With the set S of listed tokens and the
probability $P_R$ of the rest, the teacher is completed by the student's own shape outside S:

$$ \tilde p(v) = p(v) \text{ for } v \in S, \qquad
   \tilde p(v) = P_R\, q_\theta(v) \Big/ \sum_{u \notin S} q_\theta(u) \text{ for } v \notin S $$

The reverse KL to this completion is the one in which all tokens outside S are a single outcome:

$$ \mathrm{KL}(q_\theta \| \tilde p) = \sum_{v \in S} q_\theta(v) \log \frac{q_\theta(v)}{p(v)}
   + Q_R \log \frac{Q_R}{P_R}, \qquad Q_R = \sum_{u \notin S} q_\theta(u) $$

Merging outcomes never increases a KL (data-processing inequality), so it is a lower bound of the KL over the
vocabulary for any S, and equal to it if S is the whole vocabulary. Its gradient is the one that the full-vocabulary
formula gives for a constant $\tilde p$, since the derivative with respect to q(v) is $\log(Q_R / P_R) + 1$ outside S
in both. So the trainer's formulas stay as they are; only the teacher's logits come from here. All this holds for any
f-divergence, which covers every `single_step_divergence` but the one that needs the teacher's entropy.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

# Token ids travel through the rollout buffer as float32, which holds integers exactly up to here
MAX_VOCAB_SIZE = 2**24


class TopK(NamedTuple):
    """Log-probs of K tokens at each position, in nats.

    Attributes:
        ids (`torch.Tensor` of shape `(..., K)`): token ids; an id may occur twice.
        logps (`torch.Tensor` of shape `(..., K)`): their log-probs.
        rest (`torch.Tensor` of shape `(...)`): log of the probability of all other tokens; -inf if there are none.
    """

    ids: torch.Tensor
    logps: torch.Tensor
    rest: torch.Tensor

    def pack(self) -> torch.Tensor:
        """Return one float32 tensor `(..., 2K + 1)`, as the rollout buffer keeps a state for each token."""
        return torch.cat([self.ids.float(), self.logps.float(), self.rest.float()[..., None]], dim=-1)

    @classmethod
    def unpack(cls, packed: torch.Tensor) -> "TopK":
        """Undo [`pack`]."""
        size = packed.shape[-1] // 2
        return cls(packed[..., :size].long(), packed[..., size : 2 * size], packed[..., -1])


def largest_log_probs(logits: torch.Tensor, targets: torch.Tensor, k: int, temperature: float) -> TopK:
    """Return the log-probs of the k most likely tokens and, as the last one, of the target, and of all others.

    Args:
        logits (`torch.Tensor` of shape `(n, V)`): the teacher's.
        targets (`torch.Tensor` of shape `(n,)`): token ids whose log-prob is always included.
        k (`int`): number of most likely tokens; V is enough.
        temperature (`float`): temperature of the distribution, > 0.

    Returns:
        [`TopK`] with K = k + 1.
    """
    return listed_log_probs(logits, most_likely_tokens(logits, k), targets, temperature)


def listed_log_probs(logits: torch.Tensor, listed: torch.Tensor, targets: torch.Tensor, temperature: float) -> TopK:
    """Return the log-probs of the listed tokens and, as the last one, of the target, and of all others.

    Args:
        logits, targets, temperature: see [`largest_log_probs`].
        listed (`torch.Tensor` of shape `(n, k)`): token ids.

    Returns:
        [`TopK`] with K = k + 1.
    """
    log_probs = torch.log_softmax(logits / temperature, dim=-1)
    ids = torch.cat([listed.long(), targets[:, None]], dim=-1)
    rest = log_probs.scatter(1, ids, -math.inf).logsumexp(dim=-1)
    return TopK(ids, log_probs.gather(1, ids), rest)


def most_likely_tokens(logits: torch.Tensor, k: int) -> torch.Tensor:
    """Return the ids of the k most likely tokens, or of all if there are fewer, `(n, V) -> (n, k)`."""
    return logits.topk(min(k, logits.shape[-1]), dim=-1).indices


def complete(top: TopK, student_logits: torch.Tensor, temperature: float) -> torch.Tensor:
    r"""Return logits of the completed teacher $\tilde p$ (module docstring).

    Args:
        top ([`TopK`] of `n` positions): the teacher's log-probs at `temperature`.
        student_logits (`torch.Tensor` of shape `(n, V)`): the student's; detached here.
        temperature (`float`): the student's distribution is softmax(student_logits / temperature).

    Returns:
        `torch.Tensor` of shape `(n, V)`, detached: softmax(result / temperature) is $\tilde p$.
    """
    log_probs = student_logits.detach() / temperature
    log_probs.scatter_(1, top.ids, -math.inf)
    students_rest = log_probs.logsumexp(dim=-1)
    # without other tokens both are -inf, and nothing is shifted
    shift = (top.rest.to(log_probs.dtype) - students_rest).masked_fill(students_rest == -math.inf, 0.0)
    log_probs.add_(shift[:, None]).scatter_(1, top.ids, top.logps.to(log_probs.dtype))
    return log_probs.mul_(temperature)


@dataclass(frozen=True)
class TopKHead:
    """Takes the place of the teacher's LM head where only packed [`TopK`] are known.

    Args:
        temperature (`float`): temperature of the log-probs.
    """

    temperature: float

    def teacher_logits(
        self, states: torch.Tensor, vocab_size: int, student_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits `(n, V)` of the completed teacher.

        Args:
            states (`torch.Tensor` of shape `(n, 2K + 1)`): from [`TopK.pack`].
            vocab_size (`int`): V.
            student_logits (`torch.Tensor` of shape `(n, V)`, *optional*): shape of the rest. Without them it is
                uniform, which makes no difference to the log-probs of listed tokens.
        """
        if student_logits is None:
            student_logits = states.new_zeros(len(states), vocab_size)
        return complete(TopK.unpack(states), student_logits, self.temperature)
