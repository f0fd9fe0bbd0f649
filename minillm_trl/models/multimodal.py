"""Refuse multimodal models."""

from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:  # importing it takes a second, and parsing the options of `merge` does not need it
    from transformers import PreTrainedConfig

_PARTS = ("vision_config", "audio_config")


def refuse_multimodal(config: "PreTrainedConfig", argument: str) -> None:
    """Refuse a model with images or sound as inputs, which would be saved as a text model without its processor.

    Args:
        config ([`~transformers.PreTrainedConfig`]): configuration of the model.
        argument (`str`): argument that names the model, with its value, for the message.

    Raises:
        ValueError: naming the argument, the model's type and the fix.
    """
    for part in (name for name in _PARTS if getattr(config, name, None) is not None):
        raise UserError(
            f"{argument} is multimodal (model_type={config.model_type!r}, with a {part}). Only text models can be "
            "trained and saved here. Take a text-only model of the family, such as one with model_type='gemma3_text' "
            "for Gemma 3."
        )
