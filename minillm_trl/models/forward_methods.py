"""Replacing the `forward` of a model in a way that deep copies of the model survive.

A moving average of the weights and a best-so-far snapshot are made by `copy.deepcopy`. It binds the methods of the
original to the copy, but not those that a function keeps in a variable: the copy would run the original's weights.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


def override_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Replace `module.forward`; a deep copy of the module then has a method of its own.

    Args:
        module (`torch.nn.Module`): the module; it may be overridden again later.
        forward (`Callable`): called as `forward(self, replaced, *args, **kwargs)`, where `replaced` is the method of
            `self` that stood before. The signature stays that of the replaced method: `generate` validates its keyword
            arguments against it.
    """
    replaced = vars(module).setdefault("_replaced_forwards", [])  # an attribute is copied, a variable is not
    number = len(replaced)
    replaced.append(module.forward)

    @functools.wraps(getattr(module.forward, "__func__", module.forward))
    def method(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, self._replaced_forwards[number], *args, **kwargs)

    module.forward = types.MethodType(method, module)


def rebind_fused_head(model: PreTrainedModel) -> None:
    """Let deep copies of a model that a TRL trainer has given a fused LM head run with their own weights.

    TRL's method for the fused head refers to the model by its argument, but for all other calls it runs the method
    that it has replaced, which it keeps in a variable.
    """
    fused_forward = model.forward.__func__
    model.forward = inspect.getclosurevars(fused_forward).nonlocals["original_forward"]

    def forward(self: PreTrainedModel, replaced: Callable, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        if fused_lm_head:
            return fused_forward(self, *args, fused_lm_head=True, **kwargs)
        return replaced(*args, **kwargs)

    override_forward(model, forward)
