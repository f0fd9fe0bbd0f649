"""Make a student out of a teacher: drop decoder layers, narrow feed-forward layers.

The functions here neither load nor save. [`shrink`] copies the weights that are kept and then checks its result: the
small model must compute what the large one computes with the dropped parts skipped.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..errors import UserError
from .layers import FeedForward, decoder_layers, feed_forward_layers, skipping, width_field

_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class Sizes:
    """Number of parameters of a model.

    Attributes:
        total (`int`): all of them; tied weights count once.
        per_token (`int`): those that a decoding step multiplies with: layers, norms and head, but not the rows of an
            embedding, of which a step reads one.
    """

    total: int
    per_token: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "Sizes":
        """Count the parameters of `model`."""
        total = sum(parameter.numel() for parameter in model.parameters())
        head = model.get_output_embeddings()
        embedding = _embedding(model)
        return cls(total, total - (0 if head is not None and embedding is head.weight else embedding.numel()))


def _embedding(model: PreTrainedModel) -> torch.Tensor:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight


def evenly_spaced(num_layers: int, num_kept: int) -> list[int]:
    """Choose `num_kept` of `num_layers` layers: the first, the last, and the others at equal distances between them.

    Raises:
        ValueError: if not between 2 and `num_layers` layers are to be kept.
    """
    _check_number(num_layers, num_kept)
    return [round(position * (num_layers - 1) / (num_kept - 1)) for position in range(num_kept)]


def most_influential(influence: torch.Tensor, num_kept: int) -> list[int]:
    """Choose the `num_kept` layers with the largest influence `(L,)`, in their order; of equal ones the earlier.

    Raises:
        ValueError: if not between 2 and L layers are to be kept.
    """
    _check_number(len(influence), num_kept)
    return sorted(influence.argsort(descending=True, stable=True)[:num_kept].tolist())


def _check_number(num_layers: int, num_kept: int) -> None:
    if not 2 <= num_kept <= num_layers:
        raise UserError(f"num_layers={num_kept}: a model of {num_layers} layers can keep 2 to {num_layers} of them.")


@torch.no_grad()
def shrink(
    model: PreTrainedModel, layers: Sequence[int], channels: Sequence[torch.Tensor] | None = None
) -> PreTrainedModel:
    """Copy a model with some of its decoder layers and, optionally, some channels of its feed-forward layers.

    Args:
        model ([`~transformers.PreTrainedModel`]): the teacher; left as it is.
        layers (`Sequence[int]`): numbers of the layers that are kept, ascending.
        channels (`Sequence[torch.Tensor]`, *optional*): for each layer of `model`, the numbers of the intermediate
            channels that are kept, ascending, equally many in every layer; all by default.

    Returns:
        [`~transformers.PreTrainedModel`]: in eval mode, with a configuration of its own, the generation config of
        `model`, and weights of its own in the same dtypes.

    Raises:
        ValueError: if the architecture cannot be shrunk, layers are not ascending numbers of layers, or the result
            differs from `model` with the other layers and channels skipped.
    """
    prefix, modules = decoder_layers(model)
    if list(layers) != sorted(set(layers)) or not layers or not 0 <= layers[0] <= layers[-1] < len(modules):
        raise UserError(f"layers={list(layers)} must be ascending numbers between 0 and {len(modules) - 1}.")
    weights = _kept_layers(model.state_dict(), prefix, layers)
    changes: dict[str, Any] = {}
    if channels is not None:
        new = {old: position for position, old in enumerate(layers)}
        for index, (layer, kept) in enumerate(zip(feed_forward_layers(model), channels, strict=True)):
            if index in new:
                _narrow(model, weights, _renumber(layer, prefix, index, new[index]), layer, kept)
        changes[width_field(model.config.get_text_config())] = len(channels[0])
    small = _empty(model, _shrunk_config(model.config, layers, changes))
    try:
        small.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{type(model).__name__} cannot be shrunk: {str(error)[:400]}") from error
    small.generation_config = copy.deepcopy(model.generation_config)
    _check_attributes(modules, decoder_layers(small)[1], layers)
    _check_outputs(model, small.eval(), layers, channels)
    return small


def _kept_layers(state: dict[str, torch.Tensor], prefix: str, layers: Sequence[int]) -> dict[str, torch.Tensor]:
    """Return the state of a model without its other layers, with the kept layers renumbered."""
    new = {old: position for position, old in enumerate(layers)}
    pattern = re.compile(rf"{re.escape(prefix)}\.(\d+)\.")
    kept = {}
    for name, value in state.items():
        match = pattern.match(name)
        if match is None:
            kept[name] = value
        elif (old := int(match[1])) in new:
            kept[f"{prefix}.{new[old]}.{name[match.end() :]}"] = value
    return kept


def _renumber(layer: FeedForward, prefix: str, old: int, new: int) -> FeedForward:
    before, after = f"{prefix}.{old}.", f"{prefix}.{new}."
    return FeedForward(
        tuple(after + name.removeprefix(before) for name in layer.up), after + layer.down.removeprefix(before)
    )


def _narrow(
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    renumbered: FeedForward,
    layer: FeedForward,
    kept: torch.Tensor,
) -> None:
    """Cut the weights of a feed-forward layer, under its new names, down to the channels that are kept."""
    transposed = isinstance(model.get_submodule(layer.down), Conv1D)  # Conv1D has its inputs in the rows
    for name in renumbered.up:
        weights[f"{name}.weight"] = weights[f"{name}.weight"].index_select(1 if transposed else 0, kept)
        if f"{name}.bias" in weights:
            weights[f"{name}.bias"] = weights[f"{name}.bias"].index_select(0, kept)
    down = f"{renumbered.down}.weight"
    weights[down] = weights[down].index_select(0 if transposed else 1, kept)


def _shrunk_config(config: PreTrainedConfig, layers: Sequence[int], changes: dict[str, Any]) -> PreTrainedConfig:
    """Copy a configuration with fewer layers; fields that hold a value for each layer keep those of the kept ones."""
    if config.get_text_config() is not config:
        raise UserError(f"A multimodal model ({config.model_type}) cannot be shrunk. Save its language model alone.")
    values = config.to_dict()
    number_field = config.attribute_map.get("num_hidden_layers", "num_hidden_layers")
    number = values[number_field]
    for name, value in values.items():
        if "layer" in name and isinstance(value, list) and len(value) == number:
            values[name] = [value[layer] for layer in layers]
    return type(config).from_dict({**values, number_field: len(layers), **changes})


def _empty(model: PreTrainedModel, config: PreTrainedConfig) -> PreTrainedModel:
    """Make a model of the same class whose parameters are still to be filled."""
    config._attn_implementation = model.config._attn_implementation
    with no_init_weights():
        small = type(model)(config)
    small.tie_weights()
    return torch.nn.Module.to(small, device=model.device, dtype=model.dtype)


def _check_attributes(modules: torch.nn.ModuleList, small: torch.nn.ModuleList, layers: Sequence[int]) -> None:
    """Refuse layers that depend on their number, as for the width of their attention window."""
    for new, old in enumerate(layers):
        before, after = _plain_attributes(modules[old]), _plain_attributes(small[new])
        for name in before.keys() & after.keys():
            if before[name] != after[name] and name.rpartition(".")[2] not in _SIZES:
                raise UserError(
                    f"{type(modules[old]).__name__} cannot be shrunk: {name} is {before[name]!r} in layer {old}, but "
                    f"{after[name]!r} where it becomes layer {new}."
                )


_SIZES = {"layer_idx", "layer_id", "in_features", "out_features", "intermediate_size", "nf", "nx", "training"}


def _plain_attributes(layer: torch.nn.Module) -> dict[str, Any]:
    return {
        f"{name}.{attribute}": value
        for name, module in layer.named_modules()
        for attribute, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
    }


def _check_outputs(
    model: PreTrainedModel, small: PreTrainedModel, layers: Sequence[int], channels: Sequence[torch.Tensor] | None
) -> None:
    """Refuse a result that does not compute what the model computes with the dropped parts skipped."""
    vocab_size = len(_embedding(model))
    ids = (torch.arange(_CHECKED_TOKENS, device=model.device)[None] * 7919) % vocab_size
    training = model.training
    with skipping(model.eval(), layers, channels):
        expected = model(ids, use_cache=False).logits.float()
    model.train(training)
    found = small(ids, use_cache=False).logits.float()
    if not torch.allclose(found, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())):
        raise UserError(
            f"{type(model).__name__} cannot be shrunk: its logits differ by up to "
            f"{float((found - expected).abs().max()):.3g} from those of the model with the dropped parts skipped."
        )
