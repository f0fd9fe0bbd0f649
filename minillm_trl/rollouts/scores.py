"""Scores of a rollout under both models, from one pass of each head over the last hidden states, in chunks of tokens.

Nothing here has a gradient: updates treat the scores of a rollout as constants.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..models.fused_head import token_chunks
from ..models.lm_head import LMHead, TeacherHead


class RolloutScores(NamedTuple):
    """Scores of completions under both models; all detached, in nats at the completions' tokens `(B, T)`, 0 elsewhere.

    Attributes:
        student_logps, teacher_logps (`torch.Tensor` of shape `(B, T)`): log-probs at the sampling temperature.
        student_kd_logps, teacher_kd_logps (`torch.Tensor` of shape `(B, T)`): log-probs at the KD temperature.
        expected_rewards (`torch.Tensor` of shape `(B, T)`): see [`~minillm_trl.objectives.expected_rewards`]; None
            if rewards are sampled.
        entropy (`torch.Tensor` of shape `(B, T)`): the student's entropy at the sampling temperature; None unless the
            scorer measures it.
        student_top_ids (`torch.Tensor` of shape `(B, T, K)`, int32): the student's most likely tokens, the likeliest
            first; None unless the scorer lists them.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H)`): the teacher's last hidden states, from which every
            inner pass computes the single-step term without running the teacher; None if it recomputes them.

    The log-probs of a model are None if its hidden states were not given.
    """

    student_logps: torch.Tensor | None = None
    student_kd_logps: torch.Tensor | None = None
    teacher_logps: torch.Tensor | None = None
    teacher_kd_logps: torch.Tensor | None = None
    expected_rewards: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    student_top_ids: torch.Tensor | None = None
    teacher_hidden_states: torch.Tensor | None = None

    def to(self, device: torch.device, stay: Collection[str] = ()) -> "RolloutScores":
        """Return the scores on `device`, except for the fields `stay`."""
        values = self._asdict()
        moved = {name: value.to(device) for name, value in values.items() if value is not None and name not in stay}
        return self._replace(**moved)


class HeadStates(NamedTuple):
    """A model's last hidden states `(B, T, H)` that predict the tokens of completions, and the head over them."""

    hidden_states: torch.Tensor
    head: LMHead


class TeacherStates(NamedTuple):
    """The teacher's states `(B, T, H)` of the tokens of completions, and the head that reads them."""

    hidden_states: torch.Tensor
    head: TeacherHead


@dataclass(frozen=True)
class RolloutScorer:
    """Compute [`RolloutScores`] from hidden states.

    Args:
        temperature (`float`): temperature of the sampling policy.
        kd_temperature (`float`): temperature of the rewards and of the single-step term.
        vocab_size (`int`): number of leading vocabulary rows that both models share; other rows are excluded.
        expected_reward (`Callable`, *optional*): maps the log-probs `(n, V)` of the teacher and of the student at the
            KD temperature, and of the student at the sampling temperature, to expected rewards `(n,)`, see
            [`~minillm_trl.objectives.expected_rewards`]. None if rewards are sampled.
        measure_entropy (`bool`, *optional*, defaults to `False`): whether to score the student's entropy.
        student_top_k (`int`, *optional*, defaults to `0`): number of the student's most likely tokens to list.
    """

    temperature: float
    kd_temperature: float
    vocab_size: int
    expected_reward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor] | None = None
    measure_entropy: bool = False
    student_top_k: int = 0

    @torch.no_grad()
    def score(
        self,
        completion_ids: torch.Tensor,
        completion_mask: torch.Tensor,
        student: HeadStates | None = None,
        teacher: TeacherStates | None = None,
    ) -> RolloutScores:
        """Score the tokens of completions `(B, T)` where the mask is True, under each model whose states are given.

        Expected rewards need the distributions, and so the states, of both models. Memory beyond the inputs is bounded
        by `CHUNK_ELEMENTS`, not by B * T * V.
        """
        rows = completion_mask.flatten().nonzero().squeeze(1)  # (N,)
        targets = completion_ids.flatten()[rows]
        if student is not None:
            student = student._replace(hidden_states=student.hidden_states.flatten(0, 1)[rows])
        if teacher is not None:
            teacher = teacher._replace(hidden_states=teacher.hidden_states.flatten(0, 1)[rows])
        chunks = token_chunks(len(rows), self.vocab_size)
        pieces = [self._score_chunk(targets[part], part, student, teacher) for part in chunks]

        def scatter(parts: tuple[torch.Tensor | None, ...]) -> torch.Tensor | None:
            known = [part for part in parts if part is not None]  # all of them, or none
            if not known:
                return None
            flat = torch.cat(known)
            full = flat.new_zeros(completion_mask.numel(), *flat.shape[1:]).index_put((rows,), flat)
            return full.view(*completion_mask.shape, *flat.shape[1:])

        return RolloutScores(*(scatter(parts) for parts in zip(*pieces, strict=True)))

    def _score_chunk(
        self, targets: torch.Tensor, part: slice, student: HeadStates | None, teacher: TeacherStates | None
    ) -> tuple[torch.Tensor | None, ...]:
        """Return the first seven fields of [`RolloutScores`] for one chunk of the N tokens; states are `(N, H)`."""
        found: list[torch.Tensor | None] = []
        log_probs: list[torch.Tensor] = []
        student_logits = teacher_logits = None
        if student is not None:
            student_logits = student.head.logits(student.hidden_states[part], self.vocab_size)
        if teacher is not None:
            teacher_logits = teacher.head.teacher_logits(teacher.hidden_states[part], self.vocab_size, student_logits)
        for logits in (student_logits, teacher_logits):
            if logits is None:
                found += [None, None]
                continue
            sampling, kd = self._log_probs(logits)
            found += [logps.gather(1, targets[:, None]).squeeze(1) for logps in (sampling, kd)]
            log_probs += [sampling, kd]
        expected = entropy = top_ids = None
        if self.expected_reward is not None and len(log_probs) == 4:
            student_sampling, student_kd, _, teacher_kd = log_probs
            expected = self.expected_reward(teacher_kd, student_kd, student_sampling)
        if self.measure_entropy and student is not None:
            entropy = -torch.linalg.vecdot(log_probs[0].exp(), log_probs[0])
        if self.student_top_k and student is not None:
            top_ids = log_probs[0].topk(self.student_top_k, dim=-1).indices.int()
        return *found, expected, entropy, top_ids

    def _log_probs(self, logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sampling = torch.log_softmax(logits / self.temperature, dim=-1)
        if self.kd_temperature == self.temperature:
            return sampling, sampling
        return sampling, torch.log_softmax(logits / self.kd_temperature, dim=-1)


class RolloutRequest(NamedTuple):
    """Sequences for the student to score in its forward pass, see [`~minillm_trl.models.fused_head.add_scoring`].

    Attributes:
        input_ids, attention_mask (`torch.Tensor` of shape `(B, P+T)`): left-padded prompts, right-padded completions.
        completion_mask (`torch.Tensor` of shape `(B, T)`): True on the tokens to score.
        scorer ([`RolloutScorer`]): computes the scores.
        teacher_hidden_states (`torch.Tensor` of shape `(B, T, H_teacher)`, *optional*): needed for expected rewards.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    completion_mask: torch.Tensor
    scorer: RolloutScorer
    teacher_hidden_states: torch.Tensor | None = None

    def score(
        self, hidden_states: torch.Tensor, head: LMHead, vocab_size: int, teacher_head: TeacherHead | None
    ) -> RolloutScores:
        """Score the tokens from the student's hidden states `(B, T, H)`."""
        ids = self.input_ids[:, -self.completion_mask.shape[1] :]
        teacher = None
        if self.teacher_hidden_states is not None:
            assert teacher_head is not None, "the student was given no teacher head"
            teacher = TeacherStates(self.teacher_hidden_states, teacher_head)
        return self.scorer.score(ids, self.completion_mask, HeadStates(hidden_states, head), teacher)
