"""Settle the end tokens of a run: in tokenizer, student and sampling, and in the saved model."""

from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import logging

from ..models.encoding import holds_conversations, stop_appending
from ..models.end_tokens import EndTokens, carry, check_eos, find_end_tokens, set_eos

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer

logger = logging.get_logger(__name__)


def settle_tokenizer(tokenizer: PreTrainedTokenizerBase, keep_eos: bool = False, **options: Any) -> EndTokens:
    """Find the end tokens of completions, set the tokenizer's EOS, and stop it from appending tokens to texts.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the student's.
        keep_eos (`bool`, *optional*, defaults to `False`): whether the user has chosen its EOS.
        options: further arguments of [`find_end_tokens`].

    Raises:
        ValueError: if no token ends a completion, or an option names a text that is no token.
    """
    if appended := stop_appending(tokenizer):
        logger.warning(
            f"The tokenizer appended {tokenizer.decode(appended)!r} to every text, which would end answers before "
            "they begin. Appending is now switched off, in the saved tokenizer too."
        )
    ends = find_end_tokens(tokenizer, keep_eos=keep_eos, **options)
    check_eos(tokenizer, ends)
    set_eos(tokenizer, ends)
    return ends


def settle_ends(
    trainer: "TeacherMixedTrainer",
    teacher: GenerationConfig | None,
    teacher_tokenizer: PreTrainedTokenizerBase | None,
) -> None:
    """Set the same end tokens in sampling, student and tokenizer of a trainer, once it has its teacher.

    Args:
        trainer ([`TeacherMixedTrainer`]): the trainer.
        teacher ([`~transformers.GenerationConfig`], *optional*): the teacher's.
        teacher_tokenizer ([`~transformers.PreTrainedTokenizerBase`], *optional*): the teacher's.

    Raises:
        ValueError: if no token ends a completion.
    """
    tokenizer, student = trainer._tokenizer, trainer._student
    ends = settle_tokenizer(
        tokenizer,
        conversational=trainer.train_dataset is None or holds_conversations(trainer.train_dataset),
        student=student.generation_config,
        teacher=teacher,
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
    else:  # by default, vLLM ends completions with the end tokens of the folder that it loads, and adds these
        given = trainer.vllm_generation.generation_kwargs
        trainer.vllm_generation.generation_kwargs = {"stop_token_ids": ends.ids, "ignore_eos": True, **given}
