"""Several teachers, one for each value of a column of the dataset: every row has its own.

What the rollout buffer keeps for a token ends with the number of its teacher. So rows may be shuffled, split and
trimmed like those of a single teacher, and the head of each token's teacher reads its state.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from ..models.lm_head import TeacherHead
from .buffer import Batch, sequences
from .rollout_teacher import Teacher


@dataclass(frozen=True)
class SeveralHeads:
    """The heads of several teachers.

    Args:
        heads (`Sequence[TeacherHead]`): the heads, by the numbers of their teachers.
        widths (`Sequence[int]`): entries of a state that belong to each of them.
    """

    heads: Sequence[TeacherHead]
    widths: Sequence[int]

    def teacher_logits(
        self, states: torch.Tensor, vocab_size: int, student_logits: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the logits `(n, vocab_size)` of each token's own teacher.

        Args:
            states (`torch.Tensor` of shape `(n, W + 1)`): from [`SeveralTeachers.tag`].
            vocab_size (`int`): leading vocabulary rows that all models share.
            student_logits (`torch.Tensor` of shape `(n, vocab_size)`, *optional*): those of the student.
        """
        numbers = states[:, -1].long()
        logits: torch.Tensor | None = None
        for number, (head, width) in enumerate(zip(self.heads, self.widths, strict=True)):
            tokens = (numbers == number).nonzero().squeeze(1)
            own = None if student_logits is None else student_logits[tokens]
            found = head.teacher_logits(states[tokens, :width], vocab_size, own)
            if len(tokens) == len(states):
                return found
            if logits is None:
                logits = found.new_empty(len(states), vocab_size)
            logits[tokens] = found
        assert logits is not None, "there are no teachers"
        return logits


@dataclass(frozen=True)
class SeveralTeachers:
    """What [`RolloutTeacher`] is for a single teacher.

    Args:
        members (`Mapping[str, Teacher]`): the teachers by their names; their order gives their numbers. None of them
            is sharded over processes.
        phases (`Mapping[str, AbstractContextManager]`): contexts within which the weights of a teacher are on the
            device. They are entered one after another, so with `offload_teacher` the device holds one of the teachers.
    """

    members: Mapping[str, Teacher]
    phases: Mapping[str, AbstractContextManager]
    model: None = None
    is_sharded: bool = False

    @property
    def models(self) -> list[PreTrainedModel]:
        """The teachers in this process."""
        return [model for member in self.members.values() for model in member.models]

    @property
    def is_served(self) -> bool:
        """Whether one of them is on servers."""
        return any(member.is_served for member in self.members.values())

    @property
    def student_top_k(self) -> int:
        """Number of the student's most likely tokens that one of them needs."""
        return max(member.student_top_k for member in self.members.values())

    @property
    def state_width(self) -> int:
        """Entries of a token's state: those of the widest teacher, and the number of the teacher."""
        return max(member.state_width for member in self.members.values()) + 1

    @property
    def state_dtype(self) -> torch.dtype:
        """The dtype that holds the states of all teachers."""
        dtypes = [member.state_dtype for member in self.members.values()]
        widest = dtypes[0]
        for dtype in dtypes[1:]:
            widest = torch.promote_types(widest, dtype)
        return widest

    @property
    def head(self) -> SeveralHeads:
        """Turns states into logits."""
        members = self.members.values()
        return SeveralHeads([member.head for member in members], [member.state_width for member in members])

    def head_on(self, device: torch.device) -> SeveralHeads:
        """Return what turns states on `device` into logits."""
        members = self.members.values()
        return SeveralHeads([member.head_on(device) for member in members], [member.state_width for member in members])

    def tag(self, states: torch.Tensor, number: int) -> torch.Tensor:
        """Return the states `(..., W + 1)` of one teacher: padded, with the number of the teacher as last entry."""
        tagged = states.new_zeros(*states.shape[:-1], self.state_width, dtype=self.state_dtype)
        tagged[..., : states.shape[-1]] = states
        tagged[..., -1] = number
        return tagged

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        length: int,
        student_top_ids: torch.Tensor | None = None,
        teacher_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the tagged states `(B, T, W + 1)` of the last `length` tokens of sequences `(B, P+T)`.

        Args:
            input_ids, attention_mask, length, student_top_ids: see [`Teacher`].
            teacher_index (`torch.Tensor` of shape `(B,)`): number of each row's teacher.
        """
        assert teacher_index is not None, "rows of several teachers need the number of their teacher"
        found = torch.zeros(len(input_ids), length, self.state_width, dtype=self.state_dtype, device=input_ids.device)
        for number, (name, member) in enumerate(self.members.items()):
            rows = (teacher_index == number).nonzero().squeeze(1)
            if not len(rows):
                continue
            top_ids = None if student_top_ids is None else student_top_ids[rows]
            with self.phases[name]:
                states = member.hidden_states(input_ids[rows], attention_mask[rows], length, top_ids)
            found[rows] = self.tag(states, number)
        return found

    def hidden_states_of(self, batch: Batch) -> torch.Tensor:
        """Return the tagged states of a batch's completions, from the buffer or a forward pass of each teacher."""
        if "teacher_hidden_states" in batch:
            return batch["teacher_hidden_states"].to(batch["prompt_ids"].device, non_blocking=True)
        input_ids, attention_mask, mask = sequences(batch)
        return self.hidden_states(input_ids, attention_mask, mask.shape[1], teacher_index=batch["teacher_index"])

    def keep(self, states: torch.Tensor | None) -> torch.Tensor | None:
        """Return the states as the buffer keeps them, in the same place for all teachers."""
        return next(iter(self.members.values())).keep(states)

    def raise_failures(self) -> None:
        """Raise what kept a process from getting states, on all processes; each calls this once a rollout."""
        for member in self.members.values():
            member.raise_failures()
