"""Linear layers whose weights are laid out for oneDNN once, before a rollout multiplies them with every token.

PyTorch multiplies float32 matrices on a CPU with MKL, which rearranges the weights in each product. oneDNN takes
weights in the layout of its kernels, and was about twice as fast on the AMD processor that we measured
(`benchmarks/packed_products.py`).
"""

import functools
import platform
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging

from .forward_methods import is_replaced_elsewhere

logger = logging.get_logger(__name__)

# Smaller weights stay as they are: their products are dominated by the call
LEAST_ELEMENTS = 2**16

# Packing reads and writes each weight once, which takes as long as a few steps of one row
LEAST_TOKENS = 16

# Private operators of PyTorch, with which its compiler packs frozen weights too
_OPERATORS = ("_linear_pointwise", "_reorder_linear_weight")


def packs_weights() -> bool:
    """Return whether this machine has oneDNN with float32 kernels that take packed weights."""
    return bool(torch.backends.mkldnn.enabled) and _has_kernels()


@functools.cache
def _has_kernels() -> bool:
    """Return whether PyTorch has oneDNN's operators on an x86 CPU; log once if it lacks only the operators."""
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return False
    if missing := [name for name in _OPERATORS if not hasattr(torch.ops.mkldnn, name)]:
        logger.warning(
            f"PyTorch {torch.__version__} lacks torch.ops.mkldnn.{missing[0]}. Rollouts and LM heads on the CPU use "
            "its plain products, which may be slower."
        )
    return not missing


@contextmanager
def packed_weights(models: Sequence[PreTrainedModel], tokens: int) -> Iterator[None]:
    """Pack the linear layers of `models` within a `with` statement, which must not change their weights.

    Layers other than `torch.nn.Linear` and GPT-2's `Conv1D` (quantised ones, for example), in other precisions or on
    other devices stay as they are, and so do layers with a `forward` of their own. A layer that is packed already
    stays packed until the outer statement ends. The packed weights take as much memory as the weights; a
    weight that several layers share is packed once. Models cannot
    be copied or pickled meanwhile.

    Args:
        models (`Sequence[PreTrainedModel]`): complete models on this process.
        tokens (`int`): tokens that each row decodes. For a few, packing would take longer than it saves.
    """
    replaced: list[tuple[torch.nn.Module, Any]] = []
    by_weight: dict[int, torch.Tensor] = {}  # a teacher that shares the student's base has layers around its weights
    try:
        if tokens >= LEAST_TOKENS and packs_weights():
            modules: dict[int, Any] = {id(module): module for model in models for module in model.modules()}
            for module in filter(_is_packable, modules.values()):
                weight = id(module.weight)
                packed = by_weight[weight] = by_weight[weight] if weight in by_weight else _packed(module)
                replaced.append((module, vars(module).get("forward")))
                module.packed_weight = packed
                module.forward = functools.partial(_forward, module.forward, packed, module.bias)
        yield
    finally:
        for module, forward in replaced:
            for name in ("packed_weight", "forward"):  # an interrupt may have left the last module without them
                vars(module).pop(name, None)
            if forward is not None:
                module.forward = forward


def multiply(states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return W h + b with oneDNN, `(..., H) -> (..., V)`, for a weight `(V, H)` that may be packed."""
    rows = pad_rows(states.reshape(-1, states.shape[-1]))
    product = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    count = states.shape[:-1].numel()
    return product[:count].view(*states.shape[:-1], product.shape[-1])


def pad_rows(states: torch.Tensor) -> torch.Tensor:
    """Append rows of zeros, at most a sixteenth, so that products have few different numbers of rows, `(R, H)`.

    oneDNN compiles a kernel for each shape and keeps it with its memory, so without this the memory of a run grows
    with every batch of another length.
    """
    rows = len(states)
    step = max(1, 1 << rows.bit_length() >> 5)  # a sixteenth of the largest power of two that is not above `rows`
    return torch.nn.functional.pad(states, (0, 0, 0, -rows % step)) if rows % step else states


def suits_onednn(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether [`multiply`] takes these tensors, and pays.

    It takes float32 on a CPU, without autocast or gradients, and pays for weights of at least `LEAST_ELEMENTS`.
    Compiled code has products of its own.
    """
    if torch.compiler.is_compiling():
        return False
    is_large = weight.numel() >= LEAST_ELEMENTS and states.numel() > 0
    return is_large and is_plain_float32(states) and is_plain_float32(weight) and _products_are_plain()


def is_plain_float32(tensor: torch.Tensor) -> bool:
    """Return whether a tensor is in float32 on a CPU, and neither sharded nor quantised."""
    is_plain = type(tensor) in (torch.Tensor, torch.nn.Parameter)
    return is_plain and tensor.dtype == torch.float32 and tensor.device.type == "cpu"


def _products_are_plain() -> bool:
    """Return whether products need neither gradients nor autocast, and oneDNN is on."""
    return not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu") and packs_weights()


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
        and "packed_weight" not in vars(module)
        and not is_replaced_elsewhere(module)
    )


def _packed(module: Any) -> torch.Tensor:
    """Return the weight of a module in oneDNN's layout."""
    weight = module.weight.detach()
    if type(module) is Conv1D:  # which keeps the transposed weight
        weight = weight.t().contiguous()
    return torch.ops.mkldnn._reorder_linear_weight(weight, None)


def _forward(
    replaced: Callable[..., torch.Tensor],
    packed: torch.Tensor,
    bias: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    if len(args) != 1 or kwargs or not (_is_packed_input(args[0]) and _products_are_plain()):
        return replaced(*args, **kwargs)
    return multiply(args[0], packed, bias)


def _is_packed_input(states: torch.Tensor) -> bool:
    return states.dtype == torch.float32 and states.device.type == "cpu" and states.numel() > 0
