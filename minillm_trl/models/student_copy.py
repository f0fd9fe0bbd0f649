"""Copies of a model's modules around tensors of choice: the student that rollouts are sampled from is one."""

import copy
from collections.abc import Mapping

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel


def student_of(model: torch.nn.Module, accelerator: Accelerator) -> PreTrainedModel:
    """The model that is trained, without wrappers; for adapters, the base model that they are injected into."""
    model = accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def shards_student(accelerator: Accelerator) -> bool:
    """Whether the weights of the model that is trained are, or will be, spread over the processes (ZeRO-3, FSDP)."""
    plugin = accelerator.state.deepspeed_plugin
    is_fsdp = getattr(accelerator.state, "fsdp_plugin", None) is not None
    return is_fsdp or (plugin is not None and plugin.zero_stage == 3)


def copy_modules(model: torch.nn.Module, replaced: Mapping[int, torch.Tensor] | None = None) -> torch.nn.Module:
    """Copy the modules of `model` in eval mode, around the very same tensors.

    Args:
        model (`torch.nn.Module`): the model; only its structure is copied.
        replaced (`Mapping[int, torch.Tensor]`, *optional*): by the `id` of a tensor, what the copy has instead.
    """
    tensors = [*model.parameters(), *model.buffers()]
    # of 4-bit layers: the scales of their weight
    states = [state for module in model.modules() if (state := getattr(module, "quant_state", None)) is not None]
    memo: dict[int, object] = {id(each): each for each in [*tensors, *states]}
    # wrappers patch `forward` of the instance (autocast, scoring) with functions bound to the original
    memo |= {id(vars(module)["forward"]): None for module in model.modules() if "forward" in vars(module)}
    copied = copy.deepcopy(model, memo | dict(replaced or {}))
    for module in copied.modules():
        vars(module).pop("forward", None)
    return copied.eval()


class RolloutCopy:
    """A whole copy of the student on each process, for sampling.

    There are two reasons for one. Under mixed precision every forward pass casts the float32 weights anew: it moves
    six bytes a weight, where the product with a few tokens reads two. And weights that are sharded (ZeRO-3, FSDP)
    would be gathered anew for every token, by all processes at once. Weights that are neither sharded nor in float32
    (the frozen base of a LoRA student, quantised or not) are shared with the model; the others are copied, and
    `refresh` brings them up to date. The model's own tensors are never written to.

    Args:
        model ([`~transformers.PreTrainedModel`]): the model that is trained, not wrapped, before it is sharded.
        dtype (`torch.dtype`, *optional*): of what is copied; each tensor's own by default.
        sharded (`bool`): whether the model is, or will be. The copy then takes memory only between `refresh` and
            `release`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype | None = None, sharded: bool = False):
        self._sharded = sharded
        self._copies: dict[str, torch.nn.Parameter] = {}
        replaced = {}
        for name, parameter in model.named_parameters():
            if sharded or parameter.dtype == torch.float32:
                own = parameter.new_empty(0, dtype=dtype or parameter.dtype)
                self._copies[name] = replaced[id(parameter)] = torch.nn.Parameter(own, requires_grad=False)
        self.model = copy_modules(model, replaced)
        self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: PreTrainedModel) -> None:
        """Take over the weights of `model`; where they are sharded, all processes must call this together."""
        # activation checkpointing of FSDP changes the names
        trained = fsdp2_canonicalize_names(dict(model.named_parameters()))
        for name, own in self._copies.items():
            if hasattr(trained[name], "ds_id"):
                import deepspeed  # an optional dependency

                with deepspeed.zero.GatheredParameters([trained[name]]):
                    _assign(own, trained[name])
            else:
                _assign(own, trained[name])
        device = next(model.parameters()).device
        if any(each.device != device for each in self.model.buffers()):  # DeepSpeed moves the model after the copy
            self.model.to(device)

    def release(self) -> None:
        """Give the memory of a sharded model's copy back until the next `refresh`."""
        if self._sharded:
            for own in self._copies.values():
                own.data = own.data.new_empty(0)


def _assign(own: torch.nn.Parameter, trained: torch.Tensor) -> None:
    whole = trained.full_tensor() if isinstance(trained, DTensor) else trained.data
    if own.shape == whole.shape and own.device == whole.device:
        own.copy_(whole)  # in place: what is compiled has its address
    else:
        own.data = whole.to(own.dtype, copy=True)
