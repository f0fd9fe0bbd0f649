"""Linear layers whose weights are laid out for oneDNN once, before a rollout multiplies them with every token.

PyTorch multiplies float32 matrices on a CPU with MKL, which rearranges the weights in each product. On an AMD
processor with AVX-512, we measured MKL at the rate that AVX2 allows. oneDNN takes weights in the layout of its
kernels, and its products of a decoding step (few rows, large weights) took less than half the time.
"""

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

# Smaller weights stay as they are: their products are dominated by the call
LEAST_ELEMENTS = 2**16

# Packing reads and writes each weight once, which takes as long as a few steps of one row
_LEAST_TOKENS = 16


@functools.cache
def _machine() -> str:
    return platform.machine()


def packs_weights() -> bool:
    """Return whether this machine has oneDNN with float32 kernels that take packed weights."""
    return _machine() in ("x86_64", "AMD64") and bool(torch.backends.mkldnn.enabled)


@contextmanager
def packed_weights(models: Sequence[PreTrainedModel], tokens: int) -> Iterator[None]:
    """Pack the linear layers of `models` within a `with` statement, which must not change their weights.

    Layers other than `torch.nn.Linear` and GPT-2's `Conv1D` (quantised ones, for example), in other precisions or on
    other devices stay as they are. The packed weights take as much memory as the weights.

    Args:
        models (`Sequence[PreTrainedModel]`): complete models on this process.
        tokens (`int`): tokens that each row decodes. For a few, packing would take longer than it saves.
    """
    replaced: list[tuple[torch.nn.Module, Any]] = []
    try:
        if tokens >= _LEAST_TOKENS and packs_weights():
            modules = {id(module): module for model in models for module in model.modules()}
            for module in filter(_is_packable, modules.values()):
                replaced.append((module, vars(module).get("forward")))
                _pack(module)
        yield
    finally:
        for module, forward in replaced:
            del module.packed_weight
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return W h + b with oneDNN, `(..., H) -> (..., V)`, for a weight `(V, H)` that may be packed."""
    return torch.ops.mkldnn._linear_pointwise(states, weight, bias, "none", [], "")


def suits_onednn(states: torch.Tensor) -> bool:
    """Return whether [`multiply`] takes these inputs: in float32 on a CPU, without autocast or gradients."""
    return (
        states.dtype == torch.float32
        and states.device.type == "cpu"
        and not torch.is_grad_enabled()
        and not torch.is_autocast_enabled("cpu")
        and packs_weights()
    )


def _is_packable(module: torch.nn.Module) -> bool:
    if type(module) not in (torch.nn.Linear, Conv1D):
        return False
    weight: Any = module.weight
    return (
        type(weight) is torch.nn.Parameter
        and weight.dtype == torch.float32
        and weight.device.type == "cpu"
        and weight.dim() == 2  # a sharded weight may be empty or flat
        and weight.numel() >= LEAST_ELEMENTS
    )


def _pack(module: Any) -> None:
    """Give a module its packed weight, and a `forward` that uses it."""
    weight = module.weight.detach()
    if type(module) is Conv1D:  # which keeps the transposed weight
        weight = weight.t().contiguous()
    module.packed_weight = torch.ops.mkldnn._reorder_linear_weight(weight, None)
    module.forward = functools.partial(_forward, module.forward, module.packed_weight, module.bias)


def _forward(
    replaced: Callable[..., torch.Tensor],
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    states: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if args or kwargs or not suits_onednn(states):
        return replaced(states, *args, **kwargs)
    return multiply(states, packed, bias)
