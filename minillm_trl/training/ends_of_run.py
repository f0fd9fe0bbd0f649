"""Lets a run end completions with the right tokens: tokenizer, student, sampling, and what is saved."""

from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.encoding import holds_conversations, stop_appending
from ..models.end_tokens import EndTokens, carry, check_eos, find_end_tokens, set_eos

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer

logger = logging.get_logger(__name__)


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase, keep_eos: bool = False, **options: Any) -> EndTokens:
    """Find what ends a completion, and give the tokenizer its EOS, which it no longer appends to prompts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        keep_eos (`bool`, *optional*, defaults to `False`): whether its EOS is what the user has chosen.
        options: of [`find_end_tokens`].

    Raises:
        ValueError: if nothing ends a completion, or an option names no token.
    """
    if appended := stop_appending(tokenizer):
        logger.warning(
            f"The tokenizer appended {tokenizer.decode(appended)!r} to every text, which would end answers before "
            "they begin. It no longer does, and is saved so."
        )
    ends = find_end_tokens(tokenizer, keep_eos=keep_eos, **options)
    check_eos(tokenizer, ends)
    set_eos(tokenizer, ends)
    return ends


def settle_ends(trainer: "TeacherMixedTrainer", teacher_tokenizer: PreTrainedTokenizerBase | None) -> None:
    """Let sampling, student and tokenizer of a trainer that has its teacher end with the right tokens.

    Args:
        trainer ([`TeacherMixedTrainer`]): the trainer.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the teacher's.

    Raises:
        ValueError: if nothing ends a completion.
    """
    tokenizer, student = trainer._tokenizer, trainer._student
    before = {*trainer.eos_token_ids}
    ends = settle_tokenizer(
        tokenizer,
        conversational=trainer.train_dataset is None or holds_conversations(trainer.train_dataset),
        student=student.generation_config,
        teacher=trainer.teacher_model.generation_config,
        teacher_tokenizer=teacher_tokenizer,
        eos_tokens=trainer.args.eos_tokens,
        chat_template_kwargs=trainer.chat_template_kwargs,
    )
    carry(ends, student)
    if trainer.accelerator.is_main_process:
        ends.announce(tokenizer)
    trainer.eos_token_ids = ends.ids
    if not trainer.use_vllm:  # TRL's own sampling
        for name, value in (("eos_token_id", ends.ids), ("pad_token_id", tokenizer.pad_token_id)):
            setattr(trainer.generation_config, name, value)
            trainer.generation_kwargs[name] = value
    elif {*ends.ids} != before:  # vLLM ends with what the student's folder says
        given = trainer.vllm_generation.generation_kwargs
        trainer.vllm_generation.generation_kwargs = {"stop_token_ids": ends.ids, **given}
