"""`RolloutSampler`: takes prompts and keys of random numbers, returns completions with their scores."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from transformers import PreTrainedModel

from ..models.lm_head import LMHead
from .buffer import assemble_rows
from .compiled_steps import CompiledDecoding
from .engine_drafts import EngineDrafts
from .rollout_teacher import RolloutTeacher, Teacher
from .sampling import Completions, left_pad, sample_prompts
from .scores import HeadStates, RolloutScorer, RolloutScores, TeacherStates
from .several_teachers import SeveralTeachers
from .teacher_replacement import sample_with_replacement


@dataclass
class ScoredRows:
    """Scores of the rows of a rollout, in the batches in which they were computed.

    Args:
        parts (`list[tuple[list[int], RolloutScores]]`): row numbers, and the scores of their completions.
    """

    parts: list[tuple[list[int], RolloutScores]] = field(default_factory=list)

    def field(self, name: str, shape: torch.Size) -> torch.Tensor | None:
        """Return one field of the scores for all rows, padded to `shape` `(B, T)`; None if a part lacks it."""
        values = [(rows, getattr(scores, name)) for rows, scores in self.parts]
        if not values or any(value is None for _, value in values):
            return None
        return assemble_rows(values, *shape)

    def assemble(self, shape: torch.Size) -> RolloutScores:
        """Return the scores of all rows, padded to `shape` `(B, T)`."""
        return RolloutScores(*(self.field(name, shape) for name in RolloutScores._fields))

    def to(self, device: torch.device, stay: Collection[str] = ()) -> "ScoredRows":
        """Return the scores on `device`, except for the fields `stay`."""
        return ScoredRows([(rows, scores.to(device, stay)) for rows, scores in self.parts])


class SampledTurn(NamedTuple):
    """Completions of one call of the sampler.

    Attributes:
        completions (`list[list[int]]`): token ids in the order of the prompts, the end-of-sequence token included.
        scores ([`ScoredRows`]): their scores, detached; empty without `with_scores`.
    """

    completions: list[list[int]]
    scores: ScoredRows


@dataclass(frozen=True)
class RolloutSampler:
    r"""Sample from the mixture of teacher and student, and score the samples.

    A batch is scored from the hidden states that sampling it computed, before they are freed. So no model has to run
    again for the log-probs. Tokens are drawn at the temperature of `scorer`, from the vocabulary that it scores.

    Args:
        teacher ([`Teacher`]): the teacher.
        scorer ([`RolloutScorer`]): computes the scores from hidden states.
        alpha (`float`): share of the teacher in the mixture; 0 samples from the student alone.
        eos_token_ids (`Sequence[int]`): ids that end a completion.
        pad_token_id (`int`): pads prompts and completions.
        batch_size (`int`, *optional*): rows decoded together; all by default.
        shared_coins (`bool`, *optional*, defaults to `True`), mixing (`str`, *optional*, defaults to `"coins"`): see
            [`sample_prompts`].
        compiled ([`CompiledDecoding`], *optional*): runs the student's steps compiled.
        on_every_process (`Callable[[bool], bool]`, *optional*): for a teacher that is sharded over processes, see
            [`~minillm_trl.rollouts.sampling.sample_completions`].
        drafts ([`EngineDrafts`], *optional*): an engine that drafts in the student's place, with
            `mixing="speculative"`.
        skd_top_k (`int`, *optional*): replaces the student's tokens outside the teacher's top K by the teacher's, see
            `teacher_replacement`. Such completions are not scored.
    """

    teacher: Teacher
    scorer: RolloutScorer
    alpha: float
    eos_token_ids: Sequence[int]
    pad_token_id: int
    batch_size: int | None = None
    shared_coins: bool = True
    mixing: str = "coins"
    compiled: CompiledDecoding | None = None
    on_every_process: Callable[[bool], bool] | None = None
    drafts: EngineDrafts | None = None
    skd_top_k: int | None = None

    def sample(
        self,
        student: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        coin_key: tuple[int, ...],
        max_new_tokens: int,
        with_scores: bool = True,
        given: Sequence[list[int] | None] = (),
        teacher_index: Sequence[int] = (),
    ) -> SampledTurn:
        """Sample one completion for each prompt without a given one.

        Args:
            student ([`~transformers.PreTrainedModel`]): the student with its current weights, unwrapped, in eval mode.
            prompt_ids (`Sequence[Sequence[int]]`): prompts without padding. In a conversation with tools, each turn is
                a separate call: its prompts hold the previous turns and the tools' answers.
            keys (`Sequence[tuple[int, ...]]`): key of each prompt's random numbers.
            coin_key (`tuple[int, ...]`): key of the coins, see [`sample_prompts`].
            max_new_tokens (`int`): length limit.
            with_scores (`bool`, *optional*, defaults to `True`): whether to score the completions. The turns of a
                conversation are scored together after the last one.
            given (`Sequence[list[int] | None]`, *optional*): the completion of each prompt, cut at `max_new_tokens`;
                None for prompts to sample for. With a given completion, the turn is not scored.
            teacher_index (`Sequence[int]`): number of each prompt's teacher, if there are several.
        """
        if any(completion is not None for completion in given):
            with_scores = False
            rows = [row for row, completion in enumerate(given) if completion is None]
            prompt_ids, keys = [prompt_ids[row] for row in rows], [keys[row] for row in rows]
            teacher_index = [teacher_index[row] for row in rows] if teacher_index else ()
        turn = self._sample(student, prompt_ids, keys, coin_key, max_new_tokens, with_scores, teacher_index)
        return turn._replace(completions=_fill(given, turn.completions, max_new_tokens))

    def _sample(
        self,
        student: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        coin_key: tuple[int, ...],
        max_new_tokens: int,
        with_scores: bool,
        teacher_index: Sequence[int] = (),
    ) -> SampledTurn:
        """Sample one completion for each prompt."""
        scores = ScoredRows()
        if isinstance(self.teacher, SeveralTeachers) and (self.alpha > 0 or self.skd_top_k is not None):
            return self._sample_by_teacher(
                self.teacher, student, prompt_ids, keys, coin_key, max_new_tokens, with_scores, teacher_index
            )
        if self.skd_top_k is not None:
            return SampledTurn(self._correct(student, prompt_ids, keys, coin_key, max_new_tokens), scores)

        def score(rows: list[int], sampled: Completions) -> None:
            numbers = [teacher_index[row] for row in rows] if teacher_index else []
            found = self._score(student, [prompt_ids[row] for row in rows], sampled, numbers)
            scores.parts.append((rows, found))

        completions = sample_prompts(
            student,
            prompt_ids,
            keys=keys,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
            temperature=self.scorer.temperature,
            batch_size=self.batch_size,
            teacher=self.teacher.model,
            alpha=self.alpha,
            coin_key=coin_key,
            shared_coins=self.shared_coins,
            mixing=self.mixing,
            vocab_size=self.scorer.vocab_size,
            keep_states=with_scores,
            compiled=self.compiled,
            on_every_process=self.on_every_process,
            drafts=self.drafts,
            on_batch=score if with_scores else None,
        )
        return SampledTurn(completions, scores)

    def _sample_by_teacher(
        self,
        teachers: SeveralTeachers,
        student: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        coin_key: tuple[int, ...],
        max_new_tokens: int,
        with_scores: bool,
        teacher_index: Sequence[int],
    ) -> SampledTurn:
        """Sample the rows of one teacher after those of another, since each row mixes with its own teacher.

        A row's completion is what a run with its teacher alone would sample from the same key, if it has coins of its
        own; rows that share their coins share them with rows of their teacher.
        """
        completions: list[list[int]] = [[] for _ in prompt_ids]
        scores = ScoredRows()
        for number, (name, member) in enumerate(teachers.members.items()):
            rows = [row for row, own in enumerate(teacher_index) if own == number]
            if not rows:
                continue
            coins = (*coin_key, number) if self.shared_coins else coin_key
            with teachers.phases[name]:
                turn = replace(self, teacher=member)._sample(
                    student,
                    [prompt_ids[row] for row in rows],
                    [keys[row] for row in rows],
                    coins,
                    max_new_tokens,
                    with_scores,
                )
            for row, ids in zip(rows, turn.completions, strict=True):
                completions[row] = ids
            for part, found in turn.scores.parts:
                states = found.teacher_hidden_states
                tagged = None if states is None else teachers.tag(states, number)
                scores.parts.append(([rows[row] for row in part], found._replace(teacher_hidden_states=tagged)))
        return SampledTurn(completions, scores)

    def _correct(
        self,
        student: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        keys: Sequence[tuple[int, ...]],
        coin_key: tuple[int, ...],
        max_new_tokens: int,
    ) -> list[list[int]]:
        """Sample completions whose improbable tokens are the teacher's."""
        assert self.skd_top_k is not None
        assert isinstance(self.teacher, RolloutTeacher), "a teacher on a server is refused with skd_top_k"
        drafter = replace(self, alpha=0.0, skd_top_k=None)

        def draft(texts: Sequence[Sequence[int]], places: Sequence[tuple[int, ...]], limit: int) -> list[list[int]]:
            return drafter.sample(student, texts, places, coin_key, limit, with_scores=False).completions

        return sample_with_replacement(
            draft,
            self.teacher,
            self.scorer,
            prompt_ids,
            keys,
            top_k=self.skd_top_k,
            max_new_tokens=max_new_tokens,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.pad_token_id,
        )

    def _score(
        self,
        student: PreTrainedModel,
        prompt_ids: Sequence[Sequence[int]],
        sampled: Completions,
        teacher_index: Sequence[int],
    ) -> RolloutScores:
        """Score a batch from its hidden states; sampling without coins leaves none of the teacher."""
        states, own = sampled.teacher_hidden_states, None
        if sampled.student_hidden_states is not None:
            own = HeadStates(sampled.student_hidden_states, LMHead.of(student))
        if states is None and self.scorer.expected_reward is not None:  # a function of both models' states
            prompts = [part.to(sampled.ids.device) for part in left_pad(prompt_ids, self.pad_token_id)]
            ids, mask = (torch.cat(pair, dim=1) for pair in zip(prompts, sampled[:2], strict=True))
            top_ids = None
            if self.teacher.student_top_k:
                lister = replace(self.scorer, expected_reward=None, measure_entropy=False)
                top_ids = lister.score(sampled.ids, sampled.mask, own).student_top_ids
            numbers = torch.tensor(teacher_index, device=ids.device) if teacher_index else None
            states = self.teacher.hidden_states(ids, mask, sampled.mask.shape[1], top_ids, numbers)
        teacher = None if states is None else TeacherStates(states, self.teacher.head_on(states.device))
        scores = self.scorer.score(sampled.ids, sampled.mask, own, teacher)
        return scores._replace(teacher_hidden_states=self.teacher.keep(states))


def _fill(given: Sequence[list[int] | None], sampled: list[list[int]], max_new_tokens: int) -> list[list[int]]:
    """Return the given completions, cut at the limit, with the sampled ones in the places of None."""
    if len(sampled) >= len(given):
        return sampled
    rest = iter(sampled)
    return [next(rest) if ids is None else ids[:max_new_tokens] for ids in given]
