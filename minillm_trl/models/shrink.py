"""Make a student out of a teacher: drop decoder layers, narrow feed-forward layers.

The functions here neither load nor save. [`shrink`] copies the weights that are kept and then checks its result: the
small model must compute what the large one computes with the dropped parts skipped.
"""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.pytorch_utils import Conv1D

from ..errors import UserError

_WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner")  # of Llama and most others, OPT, GPT-2
_CHECKED_TOKENS = 16


@dataclass(frozen=True)
class FeedForward:
    """The projections of a feed-forward layer, by their names within the model.

    Attributes:
        up (`tuple[str, ...]`): into the intermediate channels; two where the layer is gated.
        down (`str`): back out of them.
    """

    up: tuple[str, ...]
    down: str


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
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        return cls(total, total - (0 if embedding is head else embedding.numel()))


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
def block_influence(model: PreTrainedModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
    r"""Measure how much each decoder layer changes the hidden states that pass through it.

    $$ \mathrm{BI}_l = 1 - \mathbb{E}_t \frac{h_{l,t} \cdot h_{l+1,t}}{\|h_{l,t}\| \, \|h_{l+1,t}\|} $$

    with $h_{l,t}$ the input of layer l at token t, and the mean over all real tokens. A layer with a small value
    hardly turns its input, so it can be dropped at a low cost (Men et al., ShortGPT, arXiv 2403.03853, equation 1).

    Args:
        model ([`~transformers.PreTrainedModel`]): in eval mode.
        batches (`Iterable[tuple[torch.Tensor, torch.Tensor]]`): ids and attention masks `(B, L)`.

    Returns:
        `torch.Tensor` of shape `(num_layers,)`, float64.
    """
    _, layers = decoder_layers(model)
    sums = torch.zeros(len(layers), dtype=torch.float64)
    number = 0

    def measure(index: int) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            before, after = _input_states(arguments, keywords), _states(output)
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += (1.0 - cosine)[real].double().sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(index), with_kwargs=True) for index, layer in enumerate(layers)]
    try:
        for input_ids, attention_mask in batches:
            real = attention_mask.bool()
            number += int(real.sum())
            model(input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return sums / number


@torch.no_grad()
def channel_importance(
    model: PreTrainedModel, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]
) -> list[torch.Tensor]:
    """Measure the mean absolute activation of each intermediate channel of each feed-forward layer.

    It is the criterion of Muralidharan et al. (Minitron, arXiv 2407.14679, section 2.2) for neurons, aggregated by
    the mean over all real tokens.

    Args:
        model, batches: as in [`block_influence`].

    Returns:
        `list[torch.Tensor]`: of shape `(intermediate_size,)`, float64, by layer.

    Raises:
        ValueError: if the feed-forward layers of the model cannot be narrowed.
    """
    layers = feed_forward_layers(model)
    sums = [torch.zeros(intermediate_size(model.config), dtype=torch.float64) for _ in layers]
    number = 0

    def measure(index: int) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple) -> None:
            activations = arguments[0].detach().abs().double()
            activations = activations.view(*real.shape, -1)  # OPT flattens its rows
            sums[index] += activations[real].sum(dim=0).cpu()

        return hook

    handles = [
        model.get_submodule(layer.down).register_forward_pre_hook(measure(index)) for index, layer in enumerate(layers)
    ]
    try:
        for input_ids, attention_mask in batches:
            real = attention_mask.bool()
            number += int(real.sum())
            model(input_ids, attention_mask=attention_mask, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [total / number for total in sums]


def intermediate_size(config: PreTrainedConfig) -> int:
    """Return the number of intermediate channels of a model's feed-forward layers."""
    config = config.get_text_config()
    size = getattr(config, _width_field(config))
    return 4 * config.hidden_size if size is None else size  # GPT-2 leaves it open


def _width_field(config: PreTrainedConfig) -> str:
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


def _shape(module: torch.nn.Module) -> tuple[int, int]:
    """Return the numbers of input and output channels."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    return module.in_features, module.out_features


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
        changes[_width_field(model.config.get_text_config())] = len(channels[0])
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
    """Return the state of a model without its other layers, the kept ones numbered anew."""
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
    return small.to(device=model.device, dtype=model.dtype)


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
    vocab_size = model.get_input_embeddings().weight.shape[0]
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
        states = _input_states(arguments, keywords)
        return (states, *output[1:]) if isinstance(output, tuple) else states

    def mask(kept: torch.Tensor) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple) -> tuple:
            states = arguments[0]
            masked = torch.zeros_like(states)
            masked[..., kept] = states[..., kept]
            return (masked, *arguments[1:])

        return hook

    _, modules = decoder_layers(model)
    handles = [
        layer.register_forward_hook(hand_on, with_kwargs=True)
        for index, layer in enumerate(modules)
        if index not in set(layers)
    ]
    if channels is not None:
        for layer, kept in zip(feed_forward_layers(model), channels, strict=True):
            handles.append(model.get_submodule(layer.down).register_forward_pre_hook(mask(kept)))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _input_states(arguments: tuple, keywords: dict[str, Any]) -> torch.Tensor:
    return arguments[0] if arguments else keywords["hidden_states"]


def _states(output: Any) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output
