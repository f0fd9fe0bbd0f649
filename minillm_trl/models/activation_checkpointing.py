"""Bridge two names: transformers 5.23 calls gradient checkpointing activation checkpointing, TRL 1.16 does not."""

import warnings

from transformers import TrainingArguments

_RENAMED = ("checkpointing", "checkpointing_kwargs")


def use_new_names(args: TrainingArguments) -> None:
    """Copy the old fields to the new ones, so that transformers does not warn about TRL's default.

    Args:
        args ([`~transformers.TrainingArguments`]): arguments before their `__post_init__`; a new field that is set
            keeps its value.
    """
    for name in _RENAMED:
        if getattr(args, f"activation_{name}", False) is None:
            setattr(args, f"activation_{name}", getattr(args, f"gradient_{name}"))


def ignore_old_names() -> None:
    """Ignore the deprecation warnings for model methods that TRL calls by their old names in each rollout."""
    warnings.filterwarnings(
        "ignore",
        message="`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated",
        category=FutureWarning,
    )
