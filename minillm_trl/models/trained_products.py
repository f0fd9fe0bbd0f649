"""Linear layers whose products in an update are oneDNN's, on an x86 CPU in float32.

PyTorch multiplies float32 matrices with MKL, which took twice as long on the AMD processor that we measured
(`benchmarks/packed_products.py`). Weights that are trained change with every update, so they are not packed: oneDNN
rearranges them in each product, which pays for many rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from .forward_methods import override_forward
from .packed_weights import LEAST_ELEMENTS, is_plain_float32, multiply, packs_weights, pad_rows

# Rearranging a weight takes about as long as multiplying it with a few rows
LEAST_ROWS = 64


def use_onednn_products(model: torch.nn.Module) -> None:
    """Let the large linear layers of a model multiply with oneDNN, forwards and backwards, where it pays.

    A layer looks at each call: it takes oneDNN's product for at least `LEAST_ROWS` rows in float32 on a CPU, without
    autocast, and its own otherwise. So a model can be moved, cast, sharded, packed or copied afterwards. Layers other
    than `torch.nn.Linear` and GPT-2's `Conv1D` stay as they are. So do weights below `LEAST_ELEMENTS`, those that are
    not on a CPU, and layers with a `forward` of their own.

    Args:
        model (`torch.nn.Module`): the model.
    """
    if not packs_weights():
        return
    for module in model.modules():
        if type(module) not in (torch.nn.Linear, Conv1D) or not _has_plain_forward(module):
            continue
        weight: Any = module.weight
        if weight.device.type == "cpu" and weight.numel() >= LEAST_ELEMENTS:
            override_forward(module, _forward)


def _has_plain_forward(module: torch.nn.Module) -> bool:
    """Return whether a module runs the method of its class.

    A pickle does not keep a method that [`override_forward`] made: a model that was saved whole and loaded has that of
    the class as an attribute.
    """
    return getattr(module.forward, "__func__", None) is type(module).forward


def _forward(self: Any, replaced: Callable[..., torch.Tensor], *args: Any, **kwargs: Any) -> torch.Tensor:
    if len(args) != 1 or kwargs or not _suits(args[0], self.weight):
        return replaced(*args, **kwargs)
    weight = self.weight.t() if type(self) is Conv1D else self.weight
    return _Product.apply(args[0], weight, self.bias)


def _suits(states: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether oneDNN takes this product, and is faster. Compiled code has products of its own."""
    if torch.compiler.is_compiling():
        return False
    is_large = states.numel() >= LEAST_ROWS * states.shape[-1]
    is_plain = is_plain_float32(states) and is_plain_float32(weight) and not torch.is_autocast_enabled("cpu")
    return is_large and is_plain and packs_weights()


class _Product(torch.autograd.Function):
    """W h + b, `(..., H) -> (..., V)`, and its gradients, with oneDNN.

    It keeps what the wanted gradients need: the states only for the gradient of W, which a frozen weight does not get.
    """

    @staticmethod
    def forward(ctx, states, weight, bias):
        wants_states, wants_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(states if wants_weight else None, weight if wants_states else None)
        return multiply(states, weight, bias)

    @staticmethod
    def backward(ctx, gradient):
        states, weight = ctx.saved_tensors
        wants_states, wants_weight, wants_bias = ctx.needs_input_grad
        flat = gradient.flatten(0, -2)
        return (
            _Product.apply(gradient, weight.t(), None) if wants_states else None,
            _Product.apply(pad_rows(flat).t(), pad_rows(states.flatten(0, -2)).t(), None) if wants_weight else None,
            flat.sum(dim=0) if wants_bias else None,
        )
