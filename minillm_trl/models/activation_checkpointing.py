"""transformers 5.23 renamed gradient checkpointing to activation checkpointing, and TRL 1.16 has the old names."""

import warnings

from transformers import TrainingArguments

_RENAMED = ("checkpointing", "checkpointing_kwargs")


def use_new_names(args: TrainingArguments) -> None:
    """Give the fields of the new names the values of the old ones, before transformers warns of TRL's default.

    Args:
        args ([`~transformers.TrainingArguments`]): not complete yet; a field of a new name that was set is kept.
    """
    for name in _RENAMED:
        if getattr(args, f"activation_{name}", False) is None:
            setattr(args, f"activation_{name}", getattr(args, f"gradient_{name}"))


def ignore_old_names() -> None:
    """Ignore the warnings for methods of models that TRL calls by their old names in each rollout."""
    warnings.filterwarnings(
        "ignore",
        message="`(is_gradient_checkpointing|gradient_checkpointing_(enable|disable))` is deprecated",
        category=FutureWarning,
    )
