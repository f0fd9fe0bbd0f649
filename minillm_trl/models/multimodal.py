"""Models that take more than text."""

from typing import TYPE_CHECKING

from ..errors import UserError

if TYPE_CHECKING:  # it takes a second to import, which merging need not wait for before it has read its options
    from transformers import PreTrainedConfig

_PARTS = ("vision_config", "audio_config")


def refuse_multimodal(config: "PreTrainedConfig", argument: str) -> None:
    """Refuse a model that takes images or sound where it would be saved as a model of text, without its processor.

    Args:
        config ([`~transformers.PreTrainedConfig`]): configuration of the model.
        argument (`str`): what names the model, with its value, for the message.

    Raises:
        ValueError: naming the argument, the model's type and the fix.
    """
    for part in (name for name in _PARTS if getattr(config, name, None) is not None):
        raise UserError(
            f"{argument} is multimodal (model_type={config.model_type!r}, with a {part}). Text alone is trained and "
            "saved here, without the processor that such a model needs. Take a text-only model of the family, such as "
            "one with model_type='gemma3_text' for Gemma 3."
        )
