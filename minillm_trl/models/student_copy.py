"""Copy a model's modules around shared or replaced tensors, as for the student copy that samples rollouts."""

import copy
from collections.abc import Mapping
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

Module = TypeVar("Module", bound=torch.nn.Module)


def student_of(model: torch.nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """Return the trained model without wrappers; with adapters, the base model that they are injected into."""
    unwrapped: Any = accelerator.unwrap_model(model)
    return unwrapped.get_base_model() if hasattr(unwrapped, "peft_config") else unwrapped


def shards_student(accelerator: Accelerator) -> bool:
    """Return whether the weights of the trained model are, or will be, sharded over processes (ZeRO-3, FSDP)."""
    plugin = accelerator.state.deepspeed_plugin
    is_fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
    return is_fsdp or (plugin is not None and plugin.zero_stage == 3)


def copy_modules(model: Module, replaced: Mapping[int, torch.Tensor] | None = None) -> Module:
    """Copy the modules of `model` in eval mode, sharing its tensors.

    Args:
        model (`torch.nn.Module`): the model; only its structure is copied.
        replaced (`Mapping[int, torch.Tensor]`, *optional*): tensors of the copy, by the `id` of the tensor that they
            replace.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # 4-bit layers keep the scales of their weights in `quant_state`
    states = [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    # deepcopy takes what its memo holds instead of copying it
    memo: dict[int, object] = {id(shared): shared for shared in [*tensors, *states]}
    # Wrappers patch `forward` of an instance (autocast, scoring) with functions that are bound to the original
    memo |= {id(vars(module)["forward"]): None for module in model.modules() if "forward" in vars(module)}
    copied = copy.deepcopy(model, memo | dict(replaced or {}))
    for module in copied.modules():
        vars(module).pop("forward", None)
    return copied.eval()


class RolloutCopy:
    """A complete copy of the student on each process, for sampling.

    It is needed in two cases. Under mixed precision every forward pass casts the float32 weights, which moves six
    bytes per weight, while the product with a few tokens reads two. And sharded weights (ZeRO-3, FSDP) would be
    gathered for every token, by all processes at once.

    Weights that are neither sharded nor in float32 (the frozen base of a LoRA student, quantised or not) are shared
    with the model. All other weights are copied, and `refresh` updates them. The model's own tensors are never
    written to.

    Args:
        model ([`~transformers.PreTrainedModel`]): the trained model, not wrapped, before it is sharded.
        dtype (`torch.dtype`, *optional*): dtype of copied weights; by default each weight's own.
        sharded (`bool`): whether the model is, or will be, sharded. The copy then takes memory only between `refresh`
            and `release`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None, sharded: bool = False):
        self._sharded = sharded
        self._copies: dict[str, torch.nn.Parameter] = {}
        replaced: dict[int, torch.Tensor] = {}
        for name, parameter in model.named_parameters():
            if sharded or parameter.dtype == torch.float32:
                own = parameter.new_empty(0, dtype=dtype or parameter.dtype)
                # empty until `refresh`, which allocates on the device of the trained weights
                self._copies[name] = replaced[id(parameter)] = torch.nn.Parameter(own, requires_grad=False)
        self.model = copy_modules(model, replaced)
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: PreTrainedModel) -> None:
        """Copy the current weights of `model`; if they are sharded, all processes must call this together."""
        # FSDP's activation checkpointing changes the names
        trained = fsdp2_canonicalize_names(dict(model.named_parameters()))
        for name, own in self._copies.items():
            if hasattr(trained[name], "ds_id"):
                import deepspeed  # an optional dependency

                with deepspeed.zero.GatheredParameters([trained[name]]):
                    _assign(own, trained[name])
            else:
                _assign(own, trained[name])
        device = next(model.parameters()).device
        # DeepSpeed moves the model after it was copied
        if any(buffer.device != device for buffer in self.model.buffers()):
            self.model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types

    def release(self) -> None:
        """Free the memory of a sharded model's copy until the next `refresh`."""
        if self._sharded:
            for own in self._copies.values():
                own.data = own.data.new_empty(0)


def _assign(own: torch.nn.Parameter, trained: torch.Tensor) -> None:
    whole = trained.full_tensor() if isinstance(trained, DTensor) else trained.data
    if own.shape == whole.shape and own.device == whole.device:
        own.copy_(whole)  # in place, since compiled code and CUDA graphs keep its address
    else:
        own.data = whole.to(own.dtype, copy=True)
