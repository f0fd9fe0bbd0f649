"""`RolloutTeacher`: the teacher's hidden states, which updates read from the buffer or recompute."""

from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from ..hardware.precision import autocast_on
from ..models.lm_head import LMHead, TeacherHead
from ..models.teacher import is_sharded, teacher_hidden_states
from .buffer import Batch, sequences


class Teacher(Protocol):
    """The teacher of rollouts and updates: [`RolloutTeacher`] in this process, on servers
    [`~minillm_trl.teacher_server.remote_teacher.RemoteTeacher`], or
    [`~minillm_trl.rollouts.several_teachers.SeveralTeachers`].

    Attributes:
        model ([`~transformers.PreTrainedModel`], *optional*): the teacher; None on servers, and if there are several.
        models (`list[PreTrainedModel]`): all teachers in this process.
        is_served (`bool`): whether a teacher is on servers.
        head ([`TeacherHead`]): turns states into logits.
        is_sharded (`bool`): whether all processes must call the model together.
        student_top_k (`int`): number of the student's most likely tokens that [`hidden_states`] needs; 0 for none.
        state_width (`int`): H.
        state_dtype (`torch.dtype`): holds the states without loss.
    """

    @property
    def model(self) -> PreTrainedModel | None: ...

    @property
    def models(self) -> list[PreTrainedModel]: ...

    @property
    def is_served(self) -> bool: ...

    @property
    def state_width(self) -> int: ...

    @property
    def state_dtype(self) -> torch.dtype: ...

    @property
    def head(self) -> TeacherHead: ...

    def head_on(self, device: torch.device) -> TeacherHead:
        """Return the head for states on `device`: that of the updates, or of `rollout_device`."""

    @property
    def is_sharded(self) -> bool: ...

    @property
    def student_top_k(self) -> int: ...

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        length: int,
        student_top_ids: torch.Tensor | None = None,
        teacher_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the states `(B, T, H)` of the last `length` tokens of sequences `(B, P+T)`.

        `student_top_ids` `(B, T, K)` are the student's most likely tokens, where `student_top_k` asks for them, and
        `teacher_index` `(B,)` is the number of each row's teacher, if there are several.
        """

    def raise_failures(self) -> None:
        """Raise what kept a process from getting states, on all processes; each calls this once a rollout."""

    def hidden_states_of(self, batch: Batch) -> torch.Tensor:
        """Return the states of a batch's completions `(B, T, H)`."""

    def keep(self, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        """Return the states as the buffer keeps them; None if updates recompute them."""


@dataclass
class RolloutTeacher:
    """The frozen teacher of rollouts and updates.

    Args:
        model ([`~transformers.PreTrainedModel`]): the teacher, unwrapped, in eval mode.
        head ([`LMHead`]): its head, frozen, on the device of the updates.
        accelerator ([`~accelerate.Accelerator`]): the trainer's.
        batch_size (`int`): rows of one forward pass.
        kept_on (`str`): where the buffer keeps hidden states: on the `"device"`, the `"cpu"`, or not at all
            (`"recompute"`).
        device (`torch.device`, *optional*): device of `model`, if it is another one than that of the updates.
    """

    model: PreTrainedModel
    head: LMHead
    accelerator: Accelerator
    batch_size: int
    kept_on: str
    student_top_k: int = 0
    is_served: bool = False
    device: torch.device | None = None

    @property
    def models(self) -> list[PreTrainedModel]:
        """The teacher."""
        return [self.model]

    @property
    def state_width(self) -> int:
        """Width of the hidden states."""
        return self.head.weight.shape[1]

    @property
    def state_dtype(self) -> torch.dtype:
        """The head's dtype, to which it converts the hidden states."""
        return self.head.weight.dtype

    @property
    def is_sharded(self) -> bool:
        """Whether its weights are sharded over processes."""
        return is_sharded(self.model)

    def head_on(self, device: torch.device) -> LMHead:
        """Return the head for states on `device`; on that of the model, it shares the model's weights."""
        return self.head if device == self.head.weight.device else LMHead.of(self.model).frozen(device)

    def hidden_states(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        length: int,
        student_top_ids: torch.Tensor | None = None,
        teacher_index: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Run the teacher over sequences `(B, P+T)`; return the states `(B, T, H)` of their last `length` tokens.

        The teacher runs on its own device. The states are on the device of `input_ids`.
        """
        device = input_ids.device
        if self.device is not None:
            input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        with autocast_on(input_ids.device, self.accelerator):
            states = teacher_hidden_states(self.model, input_ids, attention_mask, length, self.batch_size)
        return states.to(device)

    def hidden_states_of(self, batch: Batch) -> torch.Tensor:
        """Return the hidden states of a batch's completions `(B, T, H)`, from the buffer or a forward pass."""
        if "teacher_hidden_states" in batch:
            return batch["teacher_hidden_states"].to(self.accelerator.device, non_blocking=True)
        input_ids, attention_mask, mask = sequences(batch)
        return self.hidden_states(input_ids, attention_mask, mask.shape[1])

    def keep(self, hidden_states: torch.Tensor | None) -> torch.Tensor | None:
        """Return the hidden states as the buffer keeps them; None if updates recompute them."""
        if hidden_states is None or self.kept_on == "recompute":
            return None
        return hidden_states.cpu() if self.kept_on == "cpu" else hidden_states

    def raise_failures(self) -> None:
        """Do nothing: an error of the teacher's own forward pass is raised where it occurs."""
