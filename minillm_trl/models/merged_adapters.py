"""The adapters of a student's copy merged into its weights, so that sampling needs no further products for them.

A LoRA layer computes W h + s B (A h): two small products for each layer and token. At a decoding step, starting them
takes longer than computing them. The copy that samples has W + s B A instead. peft's own `merge` of a layer computes
it, so DoRA and other kinds of adapters are merged as well.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel
from transformers.utils import logging

logger = logging.get_logger(__name__)


@contextmanager
def whole_tensor(trained: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the values of a trained tensor; if it is sharded, all processes must call this together."""
    if hasattr(trained, "ds_id"):
        import deepspeed  # an optional dependency

        with deepspeed.zero.GatheredParameters([trained]):
            yield trained.data
    else:
        yield trained.full_tensor() if isinstance(trained, DTensor) else trained.data


class AdaptedLayer(NamedTuple):
    """A layer of the student with adapters.

    Attributes:
        names (`list[str]`): names of the adapted modules in the model, the innermost first; several adapt different
            parameters of the same layer.
        base (`torch.nn.Module`): the layer itself.
    """

    names: list[str]
    base: torch.nn.Module

    def adapters(self, model: torch.nn.Module) -> Iterator[torch.nn.Parameter]:
        """Yield the parameters of the adapters, without those of the layer."""
        own = {id(parameter) for parameter in self.base.parameters()}
        for name in self.names:
            yield from (each for each in model.get_submodule(name).parameters() if id(each) not in own)


def adapted_layers(model: PreTrainedModel) -> list[AdaptedLayer]:
    """Return the layers with active adapters whose weights can take them: those that are not quantised."""
    if not any(hasattr(module, "base_layer") for module in model.modules()):
        return []  # importing peft takes seconds
    from peft.tuners.tuners_utils import BaseTunerLayer

    names: dict[int, list[str]] = defaultdict(list)
    bases: dict[int, torch.nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and module.active_adapters and not module.disable_adapters:
            base = module.get_base_layer()
            if _is_plain(base):
                names[id(base)].insert(0, name)
                bases[id(base)] = base
    return [AdaptedLayer(names[key], base) for key, base in bases.items()]


def _is_plain(base: Any) -> bool:
    """Return whether the weights are numbers: 4-bit weights would be rounded again, coarser than the change is."""
    weights = [weight for weight in base._parameters.values() if weight is not None]
    return bool(weights) and all(
        type(weight) is torch.nn.Parameter and weight.is_floating_point() for weight in weights
    )


class MergedLayer:
    """A layer of the student's copy whose weights are the trained ones with the adapters merged into them.

    Args:
        copied (`torch.nn.Module`): the copy of the student; its layer gets weights of its own, empty until `refresh`.
        layer ([`AdaptedLayer`]): the layer of the student.
        weight_names (`Mapping[int, str]`): names of the student's parameters, by their `id`.
    """

    def __init__(self, copied: torch.nn.Module, layer: AdaptedLayer, weight_names: Mapping[int, str]):
        self._adapted: list[Any] = [copied.get_submodule(name) for name in layer.names]
        self._base: Any = self._adapted[0].get_base_layer()
        self._sources: dict[str, str] = {}  # names in the student, by the name in the layer
        for name, weight in layer.base._parameters.items():
            if weight is not None:
                self._sources[name] = weight_names[id(weight)]
                empty = self._base._parameters[name].new_empty(0)  # in the precision of the copy, as other layers
                self._base._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The layer's own weights."""
        return [self._base._parameters[name] for name in self._sources]

    def refresh(self, trained: Mapping[str, torch.Tensor], device: torch.device | None = None) -> None:
        """Merge the adapters into the current weights `trained`, by name.

        The sum is formed in at least float32 and rounded once, on the device of the copy, if it has one of its own.
        """
        own = dict(zip(self._sources, self.parameters, strict=True))
        before = {name: weight.data for name, weight in own.items()}
        for name, weight in own.items():
            with whole_tensor(trained[self._sources[name]]) as values:
                wide = torch.promote_types(values.dtype, torch.float32)
                weight.data = values.to(device=device, dtype=wide, copy=True)
        for adapted in self._adapted:
            adapted.merged_adapters.clear()
            adapted.merge()
        for name, weight in own.items():
            merged, place = weight.data, before[name]
            if place.shape == merged.shape and place.device == merged.device:
                place.copy_(merged)  # in place, since compiled code and CUDA graphs keep its address
                weight.data = place
            else:
                weight.data = merged.to(place.dtype)

    def release(self) -> None:
        """Free the merged weights until the next `refresh`."""
        for weight in self.parameters:
            weight.data = weight.data.new_empty(0)

    def restore(self, weights: Mapping[str, torch.nn.Parameter]) -> None:
        """Put `weights`, by their names in the layer, in the place of the merged ones, and run the adapters again."""
        self._base._parameters.update(weights)
        for adapted in self._adapted:
            adapted.merged_adapters.clear()


def merge_layers(
    model: PreTrainedModel,
    copied: PreTrainedModel,
    layers: Sequence[AdaptedLayer],
    device: torch.device | None = None,
) -> list[MergedLayer]:
    """Give the adapted layers of a copy merged weights of their own.

    Layers whose kind of adapter cannot be merged run their adapters as before, and a warning names the kind: aLoRA,
    for example, changes only the tokens after an invocation.

    Args:
        model ([`~transformers.PreTrainedModel`]): the student.
        copied ([`~transformers.PreTrainedModel`]): its copy, whose weights have the dtypes of the merged ones.
        layers (`Sequence[AdaptedLayer]`): the layers of `model`.
        device (`torch.device`, *optional*): device of the copy, if it is another one than that of `model`.
    """
    trained = dict(model.named_parameters())
    weight_names = {id(weight): name for name, weight in trained.items()}
    merged: list[MergedLayer] = []
    refused: dict[str, str] = {}
    for layer in layers:
        shared = dict(copied.get_submodule(layer.names[0]).get_base_layer()._parameters)  # type: ignore[operator]
        own = MergedLayer(copied, layer, weight_names)
        try:
            own.refresh(trained, device)
        except (NotImplementedError, RuntimeError, ValueError) as error:  # what peft raises for such kinds
            if isinstance(error, torch.OutOfMemoryError):
                raise
            own.restore(shared)
            refused[type(own._adapted[0]).__name__] = str(error).split("\n")[0] or type(error).__name__
        else:
            own.release()
            merged.append(own)
    for kind, reason in refused.items():
        logger.warning(
            f"Rollouts run adapters of the kind {kind} layer by layer, since peft cannot merge them ({reason})."
        )
    return merged
