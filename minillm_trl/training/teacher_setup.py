"""The teachers of a run, in this process or on servers, and what they share with the student."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..config import MiniLLMConfig
from ..errors import UserError
from ..hardware.precision import half_precision
from ..models.context import max_context, name_context
from ..models.encoding import holds_conversations
from ..models.init_kwargs import parsed_kwargs
from ..models.lm_head import LMHead, check_head
from ..models.teacher import TeacherOffload, adapter_on_base, is_sharded, place_new_teacher, shared_vocab_size
from ..models.weight_formats import refuse_8bit_teacher
from ..rollouts.cross_tokenizer import CrossTokenizerScorer, TwoTokenizers
from ..rollouts.rollout_teacher import RolloutTeacher, Teacher
from ..rollouts.scores import RolloutScorer
from ..rollouts.several_teachers import SeveralTeachers
from ..teacher_server.remote_teacher import RemoteTeacher, ServedTeacher
from .rollout_device import check_placed
from .teacher_choice import GivenTeachers, OneTeacher, naming_teacher

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer


class TeacherSetup(NamedTuple):
    """A teacher, and what it shares with the student.

    Attributes:
        teacher ([`Teacher`]): gives hidden states.
        vocab_size (`int`): leading rows of the vocabulary that both models share.
        max_context (`int`, *optional*): tokens that both models can read; None without a limit.
        context_name (`str`): name of this limit in messages.
        phase (`AbstractContextManager`): the teacher is on the device within it.
    """

    teacher: Teacher
    vocab_size: int
    max_context: int | None
    context_name: str
    phase: AbstractContextManager


def use_teachers(
    given: GivenTeachers,
    student: PreTrainedModel,
    base: Any,
    args: MiniLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    device: torch.device | None = None,
) -> TeacherSetup:
    """Load and place the teacher of a run, or several teachers by name; a folder named twice is loaded once.

    Args:
        given: a teacher or, by name, several ones.
        student ([`~transformers.PreTrainedModel`]): the student.
        base: with `teacher_shares_base`, the student whose base the teachers' adapters share.
        args ([`MiniLLMConfig`]), tokenizer ([`~transformers.PreTrainedTokenizerBase`]),
            accelerator ([`~accelerate.Accelerator`]): those of the trainer.
        device (`torch.device`, *optional*): device of `rollout_device`, for teachers in this process.

    Raises:
        ValueError: if a teacher and the student do not match, or a head cannot be reproduced.
    """

    def use(teacher: OneTeacher) -> TeacherSetup:
        if isinstance(teacher, ServedTeacher):
            return use_served_teacher(teacher, student, args, tokenizer, accelerator)
        return use_local_teacher(teacher, student, base, args, tokenizer, accelerator, device)

    if not isinstance(given, dict):
        return use(given)
    setups: dict[str, TeacherSetup] = {}
    loaded: dict[str, TeacherSetup] = {}
    for name, teacher in given.items():
        with naming_teacher(name):
            if isinstance(teacher, str):
                setups[name] = loaded.setdefault(teacher, loaded.get(teacher) or use(teacher))
            else:
                setups[name] = use(teacher)
            if setups[name].teacher.is_sharded:
                raise UserError(
                    "it is sharded over processes, which would need it for different numbers of rows. Pass its name "
                    "or folder instead."
                )
    vocab_size = min(setup.vocab_size for setup in setups.values())
    members = {name: _of_vocabulary(setup.teacher, vocab_size) for name, setup in setups.items()}
    several = SeveralTeachers(members, {name: setup.phase for name, setup in setups.items()})
    tightest = min(setups.values(), key=lambda setup: setup.max_context or float("inf"))
    return TeacherSetup(several, vocab_size, tightest.max_context, tightest.context_name, nullcontext())


def _of_vocabulary(teacher: Teacher, vocab_size: int) -> Teacher:
    """Return the teacher with the vocabulary that all teachers share, over which a server has to normalise."""
    if not isinstance(teacher, RemoteTeacher):
        return teacher
    return replace(teacher, scoring=teacher.served.scoring(vocab_size))


def use_local_teacher(
    teacher_model: str | PreTrainedModel,
    student: PreTrainedModel,
    base: Any,
    args: MiniLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
    device: torch.device | None = None,
) -> TeacherSetup:
    """Load and place a teacher in this process; with `teacher_shares_base`, it is an adapter on `base`.

    Its head is on the device of the updates too, if the teacher is on another `device`.

    Raises:
        ValueError: if teacher and student do not match, or the head cannot be reproduced.
    """
    if args.teacher_shares_base:
        teacher = adapter_on_base(base, teacher_model)
    else:
        teacher = place_new_teacher(
            teacher_model,
            accelerator,
            init_kwargs=parsed_kwargs(args.teacher_model_init_kwargs),
            default_dtype=half_precision(accelerator) or torch.float32,
            shard=args.shard_teacher,
            trust_remote_code=args.trust_remote_code,
            allow_pickled_weights=args.allow_pickled_weights,
            device=device,
        )
        if device is not None:
            check_placed(teacher, device, args.rollout_device)
    is_8bit = getattr(teacher, "is_loaded_in_8bit", False)  # also if its files are, or the caller's
    refuse_8bit_teacher(is_8bit, args.teacher_mixed_alpha)
    check_head(teacher, "teacher")
    # with cross_tokenizer, the teacher reads its own tokens, see `use_own_tokenizer`
    reader = student if args.cross_tokenizer else teacher
    vocab_size = shared_vocab_size(student, reader, tokenizer)
    _check_replacement(args.skd_top_k, vocab_size, is_sharded(teacher))
    of_rollouts = RolloutTeacher(
        teacher,
        LMHead.of(teacher).frozen(accelerator.device),
        accelerator,
        batch_size=args.per_device_train_batch_size,
        kept_on=args.teacher_hidden_states,
        device=device,
    )
    phase = TeacherOffload(teacher) if args.offload_teacher else nullcontext()
    return TeacherSetup(of_rollouts, vocab_size, max_context(student, reader), name_context(student, reader), phase)


def use_own_tokenizer(trainer: "TeacherMixedTrainer", tokenizer: PreTrainedTokenizerBase) -> CrossTokenizerScorer:
    """Let the teacher of a trainer read completions with its own tokenizer, once its end tokens are settled."""
    teacher, scorer = trainer._teacher, trainer.scoring.scorer
    assert isinstance(teacher, RolloutTeacher), "a teacher on a server is refused with cross_tokenizer"
    vocab_size = shared_vocab_size(teacher.model, teacher.model, tokenizer)
    return CrossTokenizerScorer(
        TwoTokenizers(trainer._tokenizer, tokenizer),
        teacher,
        RolloutScorer(scorer.temperature, scorer.kd_temperature, vocab_size),
        trainer.eos_token_ids,
        trainer.train_dataset is None or holds_conversations(trainer.train_dataset),
        max_context(teacher.model),
        parsed_kwargs(trainer.chat_template_kwargs),
    )


def _check_replacement(skd_top_k: int | None, vocab_size: int, sharded: bool) -> None:
    """Check that the teacher can replace tokens, see `rollouts/teacher_replacement.py`.

    Raises:
        UserError: if the teacher is sharded over processes, or no token is outside its top K.
    """
    if skd_top_k is None:
        return
    if sharded:
        raise UserError(
            f"skd_top_k={skd_top_k} calls the teacher by the drafts of each process, but this teacher is sharded, so "
            "all processes have to call it together. Pass its name or folder instead, or drop skd_top_k."
        )
    if skd_top_k >= vocab_size:
        raise UserError(
            f"skd_top_k={skd_top_k} replaces no token: the vocabulary has {vocab_size} tokens. Lower it, or drop it."
        )


def use_served_teacher(
    served: ServedTeacher,
    student: PreTrainedModel,
    args: MiniLLMConfig,
    tokenizer: PreTrainedTokenizerBase,
    accelerator: Accelerator,
) -> TeacherSetup:
    """Use a teacher on servers."""
    vocab_size = served.shared_vocab_size(student, tokenizer)
    teacher = RemoteTeacher(served, served.scoring(vocab_size), accelerator, args.teacher_hidden_states)
    return TeacherSetup(teacher, vocab_size, served.max_context(student), name_context(student), nullcontext())
