"""Scores of a rollout under both models, from one pass of each head over the last hidden states, in chunks of tokens.

Nothing here carries a gradient: the scores of a rollout are constants of the updates on it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models.fused_head import CHUNK_ELEMENTS
from ..models.lm_head import LMHead


class RolloutScores(NamedTuple):
    """Scores of completions under both models; all detached, in nats at the completions' tokens `(B, T)`, 0 elsewhere.

    Attributes:
        student_logps, teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs at the sampling temperature.
        student_kd_logps, teacher_kd_logps (`torch.Tensor` of shape `(B, T)`): log-probs at the KD temperature.
        expected_rewards (`torch.Tensor` of shape `(B, T)`): see [`~minillm_trl.objectives.expected_rewards`]; None
            unless they are wanted.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H)`): the teacher's last hidden states, from which the
            single-step term is computed in every inner pass without the teacher; None where they are to be recomputed.

    The log-probs of a model whose states were not given are None.
    """

    student_logps: torch.Tensor | None = None
    student_kd_logps: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None
    teacher_kd_logps: torch.Tensor | None = None
    expected_rewards: torch.Tensor | None = None
    teacher_hidden_states: torch.Tensor | None = None


class HeadStates(NamedTuple):
    """A model's last hidden states `(B, T, H)` that predict the tokens of completions, and the head over them."""

    hidden_states: torch.Tensor
    head: LMHead


def with_head(hidden_states: torch.Tensor | None, head: LMHead) -> HeadStates | None:
    """Pair hidden states with the head that reads them; None without hidden states."""
    return None if hidden_states is None else HeadStates(hidden_states, head)


@dataclass(frozen=True)
class RolloutScorer:
    """Computes [`RolloutScores`] from hidden states.

    Args:
        temperature (`float`): of the policy that samples.
        kd_temperature (`float`): of the rewards and of the single-step term.
        vocab_size (`int`): number of leading vocabulary rows that both models share; others are excluded from both.
        expected_reward (`Callable`, *optional*): maps the log-probs `(n, V)` of the teacher and of the student at the
            KD temperature, and of the student at the sampling temperature, to expected rewards `(n,)`, see
            [`~minillm_trl.objectives.expected_rewards`]. None where rewards are sampled.
    """

    temperature: float
    kd_temperature: float
    vocab_size: int
    expected_reward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None

    @torch.no_grad()
    def score(
        self,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        student: HeadStates | None = None,
        teacher: HeadStates | None = None,
    ) -> RolloutScores:
        """Score the tokens of completions `(B, T)` where the mask is True, under the models whose states are given.

        Expected rewards are a function of both models' distributions, so they are there only if both are given.
        Memory beyond the inputs is bounded by `CHUNK_ELEMENTS`, not by B * T * V.
        """
        rows = completion_mask.flatten().nonzero().squeeze(1)  # (N,)
        targets = completion_ids.flatten()[rows]
        models = [
            None if model is None else HeadStates(model.hidden_states.flatten(0, 1)[rows], model.head)
            for model in (student, teacher)
        ]
        size = max(1, CHUNK_ELEMENTS // self.vocab_size)
        chunks = [slice(start, start + size) for start in range(0, max(len(rows), 1), size)]
        pieces = [self._score_chunk(targets[part], part, *models) for part in chunks]

        def scatter(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
            if parts[0] is None:
                return None
            flat = torch.cat(parts)
            return flat.new_zeros(completion_mask.numel()).index_put((rows,), flat).view_as(completion_mask)

        return RolloutScores(*(scatter(parts) for parts in zip(*pieces, strict=True)))

    def _score_chunk(
        self, targets: torch.Tensor, part: slice, student: HeadStates | None, teacher: HeadStates | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the first five fields of [`RolloutScores`] for a chunk of the tokens, from their states `(N, H)`."""
        found: list[torch.Tensor | None] = []
        log_probs: list[torch.Tensor] = []
        for model in (student, teacher):
            if model is None:
                found += [None, None]
                continue
            sampling, kd = self._log_probs(model.head.logits(model.hidden_states[part], self.vocab_size))
            found += [logps.gather(1, targets[:, None]).squeeze(1) for logps in (sampling, kd)]
            log_probs += [sampling, kd]
        if self.expected_reward is None or len(log_probs) < 4:
            return *found, None
        student_sampling, student_kd, _, teacher_kd = log_probs
        return *found, self.expected_reward(teacher_kd, student_kd, student_sampling)

    def _log_probs(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sampling = torch.log_softmax(logits / self.temperature, dim=-1)
        if self.kd_temperature == self.temperature:
            return sampling, sampling
        return sampling, torch.log_softmax(logits / self.kd_temperature, dim=-1)


class RolloutRequest(NamedTuple):
    """Sequences that the student scores as it runs, see [`~minillm_trl.models.fused_head.add_scoring`].

    Attributes:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts, right-padded completions.
        completion_mask (`torch.Tensor` of shape `(B, T)`): True on the tokens to score.
        scorer ([`RolloutScorer`]): what is computed.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H_teacher)`, *optional*): needed for expected rewards.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    scorer: RolloutScorer
    teacher_hidden_states: torch.Tensor | None = None

    def score(
        self, hidden_states: torch.Tensor, head: LMHead, vocab_size: int, teacher_head: LMHead | None
    ) -> RolloutScores:
        """Score from the student's hidden states `(B, T, H)`."""
        states = self.teacher_hidden_states
        ids = self.input_ids[:, -self.completion_mask.shape[1] :]
        teacher = None if states is None else HeadStates(states, teacher_head)
        return self.scorer.score(ids, self.completion_mask, HeadStates(hidden_states, head), teacher)
