"""The decoder layers of a model and their feed-forward layers: find them, and compute without some of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from ..errors import UserError

_WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")  # of Llama and most others, OPT, GPT-2


@dataclass(frozen=True)
class FeedForward:
    """The projections of a feed-forward layer, by their names within the model.

    Attributes:
        up (`tuple[str, ...]`): into the intermediate channels; two where the layer is gated.
        down (`str`): back out of them.
    """

    up: tuple[str, ...]
    down: str


def decoder_layers(model: PreTrainedModel) -> tuple[str, torch.nn.ModuleList]:
    """Return the decoder layers of a model and their name within it.

    Raises:
        ValueError: if they cannot be told from other lists of modules.
    """
    number = model.config.get_text_config().num_hidden_layers
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == number
    ]
    depth = min((name.count(".") for name, _ in lists), default=0)
    outermost = [(name, module) for name, module in lists if name.count(".") == depth]
    if len(outermost) != 1:
        raise UserError(
            f"{type(model).__name__} cannot be shrunk: {len(outermost)} of its lists of modules have as many entries "
            f"as the model has layers ({number}), where one is expected."
        )
    return outermost[0]


def intermediate_size(config: PreTrainedConfig) -> int:
    """Return the number of intermediate channels of a model's feed-forward layers."""
    config = config.get_text_config()
    size = getattr(config, width_field(config))
    return 4 * config.hidden_size if size is None else size  # GPT-2 leaves it open


def width_field(config: PreTrainedConfig) -> str:
    """Return the name of the field with the width of the feed-forward layers.

    Raises:
        ValueError: if the configuration has no such field.
    """
    for field in _WIDTH_FIELDS:
        if hasattr(config, field):
            return field
    raise UserError(f"The feed-forward layers of {config.model_type} cannot be narrowed: their width is not known.")


def feed_forward_layers(model: PreTrainedModel) -> list[FeedForward]:
    """Find the feed-forward layer of each decoder layer.

    Raises:
        ValueError: for layers that are a mixture of experts, that keep two projections in one weight, or that are not
            recognised otherwise.
    """
    prefix, layers = decoder_layers(model)
    size = intermediate_size(model.config)
    hidden = model.config.get_text_config().hidden_size
    found = []
    for index, layer in enumerate(layers):
        groups: dict[str, dict[tuple[int, int], list[str]]] = {}
        for name, module in layer.named_modules():
            if isinstance(module, torch.nn.Linear | Conv1D):
                parent = name.rpartition(".")[0]
                groups.setdefault(parent, {}).setdefault(_shape(module), []).append(name)
        fitting = [
            (shapes[hidden, size], shapes[size, hidden])
            for parent, shapes in groups.items()
            if "attn" not in parent and "attention" not in parent
            if len(shapes.get((hidden, size), ())) in (1, 2) and len(shapes.get((size, hidden), ())) == 1
        ]
        if len(fitting) != 1:
            raise UserError(
                f"The feed-forward layers of {type(model).__name__} cannot be narrowed: layer {index} has no plain "
                f"pair of projections from {hidden} to {size} channels and back (mixtures of experts and fused "
                "projections have none). Leave intermediate_size out, and drop layers only."
            )
        (up, (down,)) = fitting[0]
        found.append(FeedForward(tuple(f"{prefix}.{index}.{name}" for name in up), f"{prefix}.{index}.{down}"))
    return found


def _shape(module: torch.nn.Linear | Conv1D) -> tuple[int, int]:
    """Return the numbers of input and output channels."""
    rows, columns = module.weight.shape
    return (rows, columns) if isinstance(module, Conv1D) else (columns, rows)


@contextmanager
def skipping(
    model: PreTrainedModel, layers: Sequence[int], channels: Sequence[torch.Tensor] | None = None
) -> Iterator[None]:
    """Let a model compute without some of its layers and channels within the block; its weights stay as they are.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model.
        layers (`Sequence[int]`): the layers that are kept; the others hand their input on.
        channels (`Sequence[torch.Tensor]`, *optional*): the intermediate channels that are kept, by layer.
    """

    def hand_on(_: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> Any:
        states = input_states(arguments, keywords)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def mask(kept: torch.Tensor) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple) -> tuple:
            (states,) = arguments
            masked = torch.zeros_like(states)
            masked[..., kept] = states[..., kept]
            return (masked,)

        return hook

    _, modules = decoder_layers(model)
    handles: list[RemovableHandle] = [
        layer.register_forward_hook(hand_on, with_kwargs=True)
        for index, layer in enumerate(modules)
        if index not in set(layers)
    ]
    if channels is not None:
        for layer, kept in zip(feed_forward_layers(model), channels, strict=True):
            handles.append(model.get_submodule(layer.down).register_forward_pre_hook(mask(kept)))
    with hooked(handles):
        yield


@contextmanager
def hooked(handles: Sequence[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of the block."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def input_states(arguments: tuple, keywords: dict[str, Any]) -> torch.Tensor:
    """Return the hidden states that a decoder layer is called with."""
    return arguments[0] if arguments else keywords["hidden_states"]


def output_states(output: Any) -> torch.Tensor:
    """Return the hidden states that a decoder layer returns, alone or first in a tuple."""
    return output[0] if isinstance(output, tuple) else output
