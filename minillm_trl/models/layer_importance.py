"""Measure what each part of a model contributes: its decoder layers, and the channels of its feed-forward layers."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from .layers import decoder_layers, feed_forward_layers, hooked, input_states, intermediate_size, output_states


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
    mask = _Mask()

    def measure(index: int) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple, keywords: dict[str, Any], output: Any) -> None:
            before, after = input_states(arguments, keywords), output_states(output)
            cosine = torch.nn.functional.cosine_similarity(before.float(), after.float(), dim=-1)
            sums[index] += (1.0 - cosine)[mask.real].double().sum().cpu()

        return hook

    handles = [layer.register_forward_hook(measure(index), with_kwargs=True) for index, layer in enumerate(layers)]
    number = _run(model, batches, mask, handles)
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
    mask = _Mask()

    def measure(index: int) -> Callable:
        def hook(_: torch.nn.Module, arguments: tuple) -> None:
            activations = arguments[0].abs().double()
            activations = activations.view(*mask.real.shape, -1)  # OPT flattens its rows
            sums[index] += activations[mask.real].sum(dim=0).cpu()

        return hook

    handles = [
        model.get_submodule(layer.down).register_forward_pre_hook(measure(index)) for index, layer in enumerate(layers)
    ]
    number = _run(model, batches, mask, handles)
    return [total / number for total in sums]


@dataclass
class _Mask:
    """The real tokens `(B, L)` of the batch that is running, for hooks."""

    real: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.bool))


def _run(
    model: PreTrainedModel,
    batches: Iterable[tuple[torch.Tensor, torch.Tensor]],
    mask: _Mask,
    handles: Sequence[RemovableHandle],
) -> int:
    """Run the model over batches with hooks, which are removed at the end; return the number of real tokens."""
    number = 0
    with hooked(handles):
        for input_ids, attention_mask in batches:
            mask.real = attention_mask.bool()
            number += int(mask.real.sum())
            model(input_ids, attention_mask=attention_mask, use_cache=False)
    return number
