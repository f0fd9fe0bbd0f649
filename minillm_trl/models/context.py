"""How many tokens models can take, prompt and completion together."""

from transformers import PreTrainedConfig, PreTrainedModel

from ..errors import UserError


def longrope_limit(config: PreTrainedConfig) -> int | None:
    """Return `original_max_position_embeddings` of a model with LongRoPE (Phi-3, Phi-4), None for any other.

    As soon as one row of a batch is longer, LongRoPE rotates all positions of all rows by other frequencies. What is
    in the cache by then was rotated by the first ones, so states of sampling would be wrong, and scores would depend
    on the other rows of a batch.
    """
    parameters = getattr(config.get_text_config(), "rope_parameters", None) or {}
    of_layers = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    limits = [rope["original_max_position_embeddings"] for rope in of_layers if rope.get("rope_type") == "longrope"]
    return min(limits, default=None)


def context_limit(config: PreTrainedConfig) -> int | None:
    """Return the longest sequence that a model with this configuration can take, None if it states none."""
    limits = longrope_limit(config), getattr(config.get_text_config(), "max_position_embeddings", None)
    return min((limit for limit in limits if limit), default=None)


def max_context(*models: PreTrainedModel) -> int | None:
    """Return the longest sequence that every model can take, None where no configuration states one."""
    limits = [context_limit(model.config) for model in models]
    return min((limit for limit in limits if limit is not None), default=None)


def check_longrope(model: PreTrainedModel, longest: int, max_new_tokens: int) -> None:
    """Check that sampling does not cross the limit of [`longrope_limit`].

    Args:
        model ([`~transformers.PreTrainedModel`]): that samples.
        longest (`int`): number of tokens of the longest prompt.
        max_new_tokens (`int`): length limit of the completions.

    Raises:
        ValueError: naming the lengths and the limit.
    """
    limit = longrope_limit(model.config)
    if limit is None or longest + max_new_tokens <= limit:
        return
    raise UserError(
        f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} cross original_max_position_embeddings="
        f"{limit} of {type(model).__name__}, beyond which LongRoPE rotates all positions of a batch otherwise, also "
        "those in the cache. Shorten the prompts or lower max_new_tokens."
    )


def name_context(*models: PreTrainedModel) -> str:
    """Return what messages call the limit of [`max_context`]."""
    of_longrope = {longrope_limit(model.config) for model in models} - {None}
    if max_context(*models) in of_longrope:
        return "original_max_position_embeddings (beyond which LongRoPE rotates otherwise)"
    return "context"
