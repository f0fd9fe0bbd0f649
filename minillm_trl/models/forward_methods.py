"""Replace the `forward` of a model so that deep copies of the model work.

Moving averages of the weights and snapshots of the best model are made by `copy.deepcopy`. It rebinds bound methods
that are attributes to the copy, but not a method captured in a closure: the copy would run the original's weights.
"""

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel


def override_forward(module: torch.nn.Module, forward: Callable[..., Any]) -> None:
    """Replace `module.forward`; a deep copy of the module runs the replacement on its own weights.

    Args:
        module (`torch.nn.Module`): the module; it may be overridden again later.
        forward (`Callable`): called as `forward(self, replaced, *args, **kwargs)`, where `replaced` is the previous
            method of `self`. The signature of the previous method is kept, since `generate` validates its keyword
            arguments against it.
    """
    replaced = vars(module).setdefault("_replaced_forwards", [])  # deepcopy copies attributes, but not closures
    number = len(replaced)
    replaced.append(module.forward)

    @functools.wraps(getattr(module.forward, "__func__", module.forward))
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, self._replaced_forwards[number], *args, **kwargs)

    module.forward = types.MethodType(method, module)


def is_replaced_elsewhere(module: torch.nn.Module) -> bool:
    """Return whether an attribute that [`override_forward`] did not set replaces the `forward` of the module."""
    own = vars(module).get("forward")
    is_ours = "_replaced_forwards" in vars(module) and getattr(own, "__self__", None) is module
    return own is not None and not is_ours


def rebind_fused_head(model: PreTrainedModel) -> None:
    """Make deep copies of a model run their own weights after a TRL trainer has given it a fused LM head.

    TRL's patched `forward` uses its `self` for the fused head, but calls the previous method, which its closure holds,
    for everything else.
    """
    bound: Any = model.forward  # a method that TRL has bound to the model
    fused_forward = bound.__func__
    model.forward = inspect.getclosurevars(fused_forward).nonlocals["original_forward"]

    def forward(self: PreTrainedModel, replaced: Callable, *args: Any, fused_lm_head: bool = False, **kwargs: Any):
        if fused_lm_head:
            return fused_forward(self, *args, fused_lm_head=True, **kwargs)
        return replaced(*args, **kwargs)

    override_forward(model, forward)
