"""Score completions under a teacher with another tokenizer, by spans of their text (see `spans`)."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UserError
from ..models.encoding import Prompt, encode_prompts
from ..models.end_tokens import find_turn_end
from ..models.token_bytes import inner_pairs, token_bytes
from .buffer import Batch, assemble_rows, sequences
from .rollout_teacher import RolloutTeacher
from .sampling import left_pad
from .scores import RolloutScorer, TeacherStates
from .spans import certain_cuts, credited_tokens, read_text

logger = logging.getLogger(__name__)

_PROBE = "word of two"


def check_two_tokenizers(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, conversational: bool
) -> None:
    """Check that texts of the student can be read by the teacher.

    Raises:
        UserError: if a tokenizer is of a kind that cannot be aligned, or the teacher has no chat template for
            conversations.
    """
    TwoTokenizers(student, teacher)
    if conversational and teacher.chat_template is None:
        raise UserError(
            f"Prompts are conversations, but the teacher's tokenizer {teacher.name_or_path!r} has no chat template. "
            "Save one with it, or give prompts as texts."
        )
    if student.get_vocab() == teacher.get_vocab():
        logger.warning(
            "cross_tokenizer=True gives up the single step and teacher-mixed sampling, but student and teacher have "
            "the same vocabulary. Drop it."
        )


class SpanScores(NamedTuple):
    """Log-probs of spans, at the student's tokens to which they are credited.

    Attributes:
        teacher, student (`torch.Tensor` of shape `(B, T)`): sums over the tokens of the spans that are credited here,
            in nats, detached; 0 at all other tokens. Their difference is the reward.
        lengths (`torch.Tensor` of shape `(B, T)`, int64): tokens of the student in the spans that are credited here,
            at least 1.
        faults (`dict[int, str]`): descriptions of the rows that the teacher cannot read, whose log-prob is -inf.
    """

    teacher: torch.Tensor
    student: torch.Tensor
    lengths: torch.Tensor
    faults: dict[int, str]


class _Reading(NamedTuple):
    """A completion as the teacher reads it: its tokens, and the number of the student's token that has the credit for
    each token of the teacher `(m,)` and of the student `(n,)`, -1 for none."""

    ids: list[int]
    of_teacher: np.ndarray
    of_student: np.ndarray
    fault: str | None = None


class TwoTokenizers:
    """The tokenizers of student and teacher, and the bytes of their tokens.

    Args:
        student, teacher ([`~transformers.PreTrainedTokenizerBase`]): the two tokenizers.

    Raises:
        UserError: if the bytes of the tokens are unknown, or the teacher's tokenizer changes a plain text.
    """

    def __init__(self, student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase):
        self.student = student
        self.teacher = teacher
        self.student_bytes = token_bytes(student, "student")
        self.teacher_bytes = token_bytes(teacher, "teacher")
        special = {*teacher.all_special_ids}
        special |= {id_ for id_, token in teacher.added_tokens_decoder.items() if token.special}
        self.pairs = inner_pairs([token for id_, token in enumerate(self.teacher_bytes) if id_ not in special])
        spelled = b"".join(self.teacher_bytes[id_] for id_ in self.encode([_PROBE])[0])
        if spelled != _PROBE.encode():
            raise UserError(
                f"The teacher's tokenizer {self.teacher.name_or_path!r} reads the text {_PROBE!r} as "
                f"{spelled.decode(errors='replace')!r}: it changes texts, or adds a space before them. So "
                "cross_tokenizer=True cannot give it the completions that the student wrote. Choose another teacher."
            )
        if self.teacher.eos_token_id is None:
            raise UserError(
                f"The teacher's tokenizer {self.teacher.name_or_path!r} has no EOS token, so the teacher has no "
                "log-prob for the end of a completion. Set its eos_token."
            )

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the teacher's tokens of texts; the name of a special token in a text is text."""
        if not texts:
            return []
        encoded = self.teacher(text=list(texts), add_special_tokens=False, split_special_tokens=True)
        return [list(ids) for ids in encoded["input_ids"]]

    def prompt_text(self, ids: Sequence[int]) -> str:
        """Return the text of a prompt's tokens, without special tokens before it."""
        special, start = {*self.student.all_special_ids}, 0
        while start < len(ids) and ids[start] in special:
            start += 1
        return b"".join(self.student_bytes[id_] for id_ in ids[start:]).decode(errors="replace")

    def read(self, completions: Sequence[Sequence[int]], student_ends: Sequence[int], end: int) -> list[_Reading]:
        """Read completions of the student with the teacher's tokens.

        Args:
            completions (`Sequence[Sequence[int]]`): token ids of the student.
            student_ends (`Sequence[int]`): ids that end a completion.
            end (`int`): the teacher's end token, which stands for any of them.
        """
        ended = [bool(ids) and ids[-1] in student_ends for ids in completions]
        texts = [
            read_text([self.bytes_of(id_) for id_ in (ids[:-1] if stops else ids)], stops)
            for ids, stops in zip(completions, ended, strict=True)
        ]
        encoded = self.encode([text.text for text in texts])
        readings = []
        for ids, stops, text, teacher_ids in zip(completions, ended, texts, encoded, strict=True):
            data, last = text.text.encode(), len(ids) - 1
            spelled = [self.teacher_bytes[id_] for id_ in teacher_ids]
            teacher_ends = np.cumsum([len(token) for token in spelled], dtype=np.int64)
            cuts = certain_cuts(data, self.pairs)
            unknown = next((id_ for id_ in ids if not self.bytes_of(id_)), None)
            fault = None if unknown is None else f"the token {unknown} has no text that the teacher could read"
            if b"".join(spelled) != data:  # a single span, as no place in one text is known in the other
                teacher_ends, cuts = np.full(len(teacher_ids), len(data)), cuts[:0]
                if b"".join(spelled) != self._normalized(text.text):
                    fault = f"the teacher's tokenizer has no tokens for a part of {text.text[:80]!r}"
            students, teachers = credited_tokens(text.ends, teacher_ends, cuts, last)
            students[len(students) - text.unread :] = -1
            if stops:
                teacher_ids.append(end)
                students, teachers = np.append(students, last), np.append(teachers, last)
            readings.append(_Reading(teacher_ids, teachers, students, fault))
        return readings

    def bytes_of(self, id_: int) -> bytes:
        """Return the bytes of a token of the student; none for a row of its vocabulary that is no token."""
        return self.student_bytes[id_] if id_ < len(self.student_bytes) else b""

    def _normalized(self, text: str) -> bytes:
        normalizer: Any = self.teacher.backend_tokenizer.normalizer
        return (text if normalizer is None else normalizer.normalize_str(text)).encode()


@dataclass(frozen=True)
class CrossTokenizerScorer:
    """Score completions under a teacher that reads their text with its own tokenizer.

    Args:
        tokenizers ([`TwoTokenizers`]): both tokenizers.
        teacher ([`RolloutTeacher`]): the teacher.
        scorer ([`RolloutScorer`]): has the temperatures, and the teacher's vocabulary.
        student_ends (`Sequence[int]`): ids that end a completion of the student.
        conversational (`bool`): whether prompts are conversations.
        max_context (`int`, *optional*): tokens that the teacher can read.
        chat_template_kwargs (`dict`, *optional*): arguments of the teacher's chat template.
    """

    tokenizers: TwoTokenizers
    teacher: RolloutTeacher
    scorer: RolloutScorer
    student_ends: Sequence[int]
    conversational: bool
    max_context: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def score(self, batch: Batch, student_logps: torch.Tensor, prompts: Sequence[Prompt] | None = None) -> SpanScores:
        """Score the completions of a batch.

        The teacher reads the prompt as it would in order to continue it, and the completion's text is tokenized on
        its own, so no token crosses the border of the two.

        Args:
            batch (`dict` of `torch.Tensor`): prompts and completions in the student's tokens.
            student_logps (`torch.Tensor` of shape `(B, T)`): log-probs of the student that sampled, at the temperature
                of the rewards.
            prompts (`Sequence`, *optional*): the prompts as texts or conversations, each of which goes through the
                teacher's own chat template; by default the texts of the prompts' tokens.

        Raises:
            UserError: if prompts are conversations, but were not given.
        """
        mask = sequences(batch)[2]
        if prompts is None:
            if self.conversational:
                raise UserError(
                    "The teacher reads conversations through its own chat template, so the student's tokens of the "
                    "prompts are not enough to score them. Let the trainer sample, or give prompts as texts."
                )
            pairs = zip(batch["prompt_ids"].cpu(), batch["prompt_mask"].bool().cpu(), strict=True)
            prompts = [self.tokenizers.prompt_text(ids[real].tolist()) for ids, real in pairs]
        completions = zip(batch["completion_ids"].cpu(), mask.cpu(), strict=True)
        readings = self.tokenizers.read(
            [ids[real].tolist() for ids, real in completions], self.student_ends, self._end()
        )
        prompt_ids = encode_prompts(self.tokenizers.teacher, prompts, self.chat_template_kwargs)
        faults = {row: reading.fault for row, reading in enumerate(readings) if reading.fault is not None}
        for row, (before, reading) in enumerate(zip(prompt_ids, readings, strict=True)):
            count = len(before) + len(reading.ids)
            if self.max_context is not None and count > self.max_context:
                faults[row] = (
                    f"prompt and completion have {count} tokens of the teacher, its context {self.max_context}"
                )
                readings[row] = reading._replace(ids=[], of_teacher=reading.of_teacher[:0])
                prompt_ids[row] = before[:1]  # the prompt alone may exceed it
        faults = {
            row: fault for row, fault in faults.items() if mask[row].any()
        }  # others repeat a row to fill a batch
        logps = self._teacher_logps(prompt_ids, readings, mask.device)
        teacher = _credit(logps, [reading.of_teacher for reading in readings], mask.shape[1])
        of_student = [reading.of_student for reading in readings]
        student = _credit(student_logps.masked_fill(~mask, 0.0), of_student, mask.shape[1])
        lengths = _credit(torch.ones_like(student_logps), of_student, mask.shape[1]).long().clamp(min=1)
        for row in faults:
            teacher[row, mask[row].nonzero()[-1]] = -torch.inf
        return SpanScores(teacher, student, lengths, faults)

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        """Check that the teacher can read prompts, and a token of a completion after each.

        Raises:
            UserError: naming the first prompt for which this is not so.
        """
        prompt_ids = encode_prompts(self.tokenizers.teacher, prompts, self.chat_template_kwargs)
        for prompt, ids in zip(prompts, prompt_ids, strict=True):
            if self.max_context is not None and len(ids) >= self.max_context:
                raise UserError(
                    f"The prompt that begins with {str(prompt)[:80]!r} has {len(ids)} tokens of the teacher, whose "
                    f"context of {self.max_context} has no room for a completion. Shorten or drop it."
                )

    def _end(self) -> int:
        """Return the token with which the teacher ends a text, or an assistant's turn."""
        tokenizer = self.tokenizers.teacher
        turn_end = find_turn_end(tokenizer, self.chat_template_kwargs) if self.conversational else None
        return tokenizer.eos_token_id if turn_end is None else turn_end

    @torch.no_grad()
    def _teacher_logps(
        self, prompt_ids: Sequence[Sequence[int]], readings: Sequence[_Reading], device: torch.device
    ) -> torch.Tensor:
        """Return the teacher's log-probs of its own tokens of the completions, `(B, T_teacher)`."""
        before, before_mask = left_pad(prompt_ids, 0)
        length = max(1, *(len(reading.ids) for reading in readings))  # a sharded teacher runs on every process
        ids = torch.zeros(len(readings), length, dtype=torch.long)
        mask = torch.zeros(len(readings), length, dtype=torch.bool)
        for row, reading in enumerate(readings):
            ids[row, : len(reading.ids)] = torch.tensor(reading.ids, dtype=torch.long)
            mask[row, : len(reading.ids)] = True
        whole, attended = torch.cat([before, ids], dim=1), torch.cat([before_mask, mask], dim=1)
        states = self.teacher.hidden_states(whole.to(device), attended.to(device), length)
        with self.teacher.accelerator.autocast():
            scores = self.scorer.score(
                ids.to(device), mask.to(device), teacher=TeacherStates(states, self.teacher.head)
            )
        assert scores.teacher_kd_logps is not None  # its states were given
        return scores.teacher_kd_logps


def _credit(logps: torch.Tensor, credits: Sequence[np.ndarray], length: int) -> torch.Tensor:
    """Return the sums `(B, length)` of log-probs `(B, M)` at the tokens to which they are credited; -1 is dropped."""
    parts = [([row], torch.from_numpy(numbers)[None] + 1) for row, numbers in enumerate(credits)]
    columns = assemble_rows(parts, len(credits), logps.shape[1]).to(logps.device)
    sums = logps.new_zeros(len(credits), length + 1).double()  # the first column has what is dropped
    return sums.scatter_add_(1, columns, logps.double())[:, 1:].to(logps.dtype)
