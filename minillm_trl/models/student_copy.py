"""Copy a model's modules around shared or replaced tensors, as for the student copy that samples rollouts."""

import copy
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils.fsdp_utils import fsdp2_canonicalize_names
from transformers import PreTrainedModel

from ..errors import UserError
from ..hardware.precision import autocast_on, half_precision
from .merged_adapters import AdaptedLayer, MergedLayer, adapted_layers, merge_layers, whole_tensor

if TYPE_CHECKING:
    from ..config import MiniLLMConfig

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

    It is needed in four cases. Under mixed precision every forward pass casts the float32 weights, which moves six
    bytes per weight, while the product with a few tokens reads two. Sharded weights (ZeRO-3, FSDP) would be
    gathered for every token, by all processes at once. Adapters take two more products for each layer and token,
    unless they are merged into the weights. And updates that run while the copy samples would change its weights.

    Weights that are neither sharded, nor in float32, nor merged (the frozen base of a LoRA student, quantised or not)
    are shared with the model. With a `dtype`, those in float32 are copied; without one, only sharded and merged ones.
    `apart` copies trained ones in both cases. With a `device` of its own, the copy shares nothing. `refresh` updates
    copied and merged weights. The model's own tensors are never written to.

    Args:
        model ([`~transformers.PreTrainedModel`]): the trained model, not wrapped, before it is sharded.
        dtype (`torch.dtype`, *optional*): dtype of copied weights; by default each weight's own.
        sharded (`bool`): whether the model is, or will be, sharded. The copy then takes memory only between `refresh`
            and `release`.
        merged (`Sequence[AdaptedLayer]`): layers of the model whose adapters are merged. They too take memory only
            between `refresh` and `release`.
        apart (`bool`): whether to copy all weights that are trained, so that updates do not change the copy.
        device (`torch.device`, *optional*): device of the copy; by default that of the model. The base of merged
            layers is read from the model at each `refresh`; other frozen weights only when they have changed.

    Attributes:
        model ([`~transformers.PreTrainedModel`]): the copy, in eval mode.
        casts (`bool`): whether the copy has a `dtype` of its own. Otherwise it needs autocast, as the model does.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtype: torch.dtype | None = None,
        sharded: bool = False,
        merged: Sequence[AdaptedLayer] = (),
        apart: bool = False,
        device: torch.device | None = None,
    ):
        self._sharded = sharded
        self._device = device
        self._merged: list[MergedLayer] = []
        self._copies: dict[str, torch.nn.Parameter] = {}
        self._versions: dict[str, tuple[int, int]] = {}  # of frozen weights that were copied to the device
        self.casts = dtype is not None
        replaced: dict[int, torch.Tensor] = {}
        adapters = {id(parameter) for layer in merged for parameter in layer.adapters(model)}
        for name, parameter in model.named_parameters():
            is_adapter = id(parameter) in adapters  # merged in its own precision, and rounded afterwards
            cast = dtype is not None and parameter.dtype == torch.float32 and not is_adapter
            differs = sharded or cast or (apart and parameter.requires_grad)
            if differs or device is not None:
                own_dtype = parameter.dtype if is_adapter or not differs else dtype or parameter.dtype
                own = parameter.new_empty(0, dtype=own_dtype, device=device)
                # empty until `refresh`, which allocates on `device`, or on that of the trained weights
                self._copies[name] = replaced[id(parameter)] = torch.nn.Parameter(own, requires_grad=False)
        self.model = copy_modules(model, replaced)
        self.refresh(model)
        if merged:
            self._merged = merge_layers(model, self.model, merged, device)
            used = {id(parameter) for parameter in self.model.parameters()}
            self._copies = {name: own for name, own in self._copies.items() if id(own) in used}
            self.refresh(model)

    @torch.no_grad()
    def refresh(self, model: PreTrainedModel) -> None:
        """Copy the current weights of `model`; if they are sharded, all processes must call this together."""
        # FSDP's activation checkpointing changes the names
        trained = fsdp2_canonicalize_names(dict(model.named_parameters()))
        for name, own in self._copies.items():
            if self._device is not None and self._has_copied(name, trained[name]):
                continue
            with whole_tensor(trained[name]) as values:
                _assign(own, values, self._device or values.device)
        for layer in self._merged:
            layer.refresh(trained, self._device)
        device = self._device or next(model.parameters()).device
        # DeepSpeed moves the model after it was copied, and a copy with a device of its own starts with shared buffers
        if any(buffer.device != device for buffer in self.model.buffers()):
            self.model.to(device)  # type: ignore[arg-type]  # transformers wraps `to` without its types

    def _has_copied(self, name: str, weight: torch.Tensor) -> bool:
        """Return whether a frozen weight has not changed since the last call; note its version."""
        if weight.requires_grad:
            return False
        version = weight.data_ptr(), weight._version
        known, self._versions[name] = self._versions.get(name), version
        return known == version

    def precision(self, accelerator: Accelerator) -> AbstractContextManager:
        """Return the context in which the current thread samples from the copy: autocast, unless it has a `dtype`."""
        return nullcontext() if self.casts else autocast_on(self.model.device, accelerator)

    def release(self) -> None:
        """Free the memory of merged layers, and of a sharded model's copy, until the next `refresh`."""
        for layer in self._merged:
            layer.release()
        if self._sharded:
            for own in self._copies.values():
                own.data = own.data.new_empty(0)


def _assign(own: torch.nn.Parameter, values: torch.Tensor, device: torch.device) -> None:
    if own.shape == values.shape and own.device == device:
        own.copy_(values)  # in place, since compiled code and CUDA graphs keep its address
    else:
        own.data = values.to(device, own.dtype, copy=True)


def rollout_copy(
    student: PreTrainedModel,
    args: "MiniLLMConfig",
    accelerator: Accelerator,
    merges: bool,
    device: torch.device | None = None,
) -> RolloutCopy | None:
    """Return the copy that samples, or None if the student itself does.

    Args:
        student ([`~transformers.PreTrainedModel`]): the student, not wrapped, before it is sharded.
        args ([`MiniLLMConfig`]): with `half_precision_rollouts`, `merged_rollouts` and `overlap_rollouts`.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        merges (`bool`): whether adapters may be merged: not for a copy that does not sample.
        device (`torch.device`, *optional*): device of `rollout_device`.

    Raises:
        ValueError: if adapters must be merged, and none can be, or the student cannot be copied to the device.
    """
    sharded = shards_student(accelerator)
    # under DeepSpeed, the student is in half precision already
    casts = sharded or (args.half_precision_rollouts and accelerator.state.deepspeed_plugin is None)
    layers = adapted_layers(student) if merges and args.merged_rollouts is not False else []
    if args.merged_rollouts and not layers:
        raise UserError(
            "merged_rollouts=True, but the student has no adapters on weights that are not quantised. Drop it."
        )
    apart = args.overlap_rollouts
    if not (casts or layers or apart):
        return None
    if device is not None:
        _check_movable(student, args.rollout_device)
    return RolloutCopy(student, half_precision(accelerator) if casts else None, sharded, layers, apart, device)


def _check_movable(student: PreTrainedModel, rollout_device: str | None) -> None:
    """Check that the student can be copied to another device weight by weight."""
    quantised = not all(parameter.is_floating_point() for parameter in student.parameters())
    split = len(set(getattr(student, "hf_device_map", {}).values())) > 1
    for is_so, what, fix in (
        (quantised, "its base is quantised", "load the student without quantisation"),
        (split, "its device_map splits it", "set model_init_kwargs={'device_map': None}"),
    ):
        if is_so:
            raise UserError(
                f"rollout_device={rollout_device!r} needs a copy of the student there, but {what}. Drop "
                f"rollout_device, or {fix}."
            )
