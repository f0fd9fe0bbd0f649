"""A pretended accelerator: tensors on it are computed on the CPU, but operations refuse tensors of two devices.

So a computation with a tensor that was not moved fails here as it does on a GPU. There are two such devices,
`pretend:0` and `pretend:1`. They have no gradients and no streams.

Importing this module registers the device type in the whole process, which then counts as one with an accelerator.
"""

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME, COUNT = "pretend", 2
aten = torch.ops.aten

# Operations that may read two devices, as on a GPU
_COPIES = {aten.copy_.default, aten._to_copy.default, aten._copy_from.default}
_INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class PretendTensor(torch.Tensor):
    """A tensor of a pretended device; `inner` is the CPU tensor that holds it."""

    inner: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor, device: torch.device):
        # sizes and strides are asked of `inner`, which can be replaced or resized
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=device,
            dispatch_sizes_strides_policy="sizes",
        )
        made.inner = inner
        return made

    @property
    def data(self) -> torch.Tensor:
        return PretendTensor(self.inner, self.device)

    @data.setter
    def data(self, value: "PretendTensor") -> None:
        assert value.device == self.device, f"data on {self.device} is replaced by data on {value.device}"
        assert value.dtype == self.dtype
        self.inner = value.inner

    @property
    def is_cuda(self) -> bool:
        return False

    def tolist(self) -> Any:
        return self.inner.tolist()  # torch refuses subclasses; a GPU's tensor gives its values

    def numpy(self, **unused: Any) -> Any:
        raise TypeError(f"a tensor on {self.device} has no numpy array")

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def __repr__(self, **unused: Any) -> str:
        return f"PretendTensor({self.inner}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, op, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if op in _METADATA:
            return _METADATA[op](args[0].inner)
        flat = tree_flatten((args, kwargs))[0]
        device = next(part.device for part in flat if isinstance(part, PretendTensor))
        if op not in _COPIES:
            _check(op, args, flat, device)
        target = kwargs.get("device")
        if target is not None:
            kwargs["device"] = torch.device("cpu")
            device = _indexed(torch.device(target))
        if op is aten.copy_.default and not isinstance(args[0], PretendTensor):  # to the CPU
            return args[0].copy_(args[1].inner)
        if op is aten._fused_sdp_choice.default:
            return 0  # the product of matrices, which any device has
        found = op(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        written = args[0] if op._schema.name.endswith("_") else kwargs.get("out")
        if isinstance(written, PretendTensor):
            return written
        if device.type == "cpu":
            return found
        return tree_map(lambda part: PretendTensor(part, device) if isinstance(part, torch.Tensor) else part, found)


def _inner(part: Any) -> Any:
    return part.inner if isinstance(part, PretendTensor) else part


def _indexed(device: torch.device) -> torch.device:
    return torch.device(NAME, 0) if device.type == NAME and device.index is None else device


def _check(op: Any, args: Any, flat: list[Any], device: torch.device) -> None:
    """Refuse tensors of other devices; numbers without dimensions, and indices, may be on the CPU."""
    indices = {id(part) for part in args[1]} if op in _INDEXED else set()
    for part in flat:
        if isinstance(part, torch.Tensor) and part.device != device:
            on_cpu = part.device.type == "cpu" and (part.dim() == 0 or id(part) in indices)
            if not on_cpu:
                raise RuntimeError(f"{op}: expected all tensors on {device}, but found one on {part.device}")


_METADATA = {
    aten.sym_size.default: lambda inner: inner.shape,
    aten.size.default: lambda inner: inner.shape,
    aten.sym_stride.default: lambda inner: inner.stride(),
    aten.stride.default: lambda inner: inner.stride(),
    aten.sym_numel.default: lambda inner: inner.numel(),
    aten.numel.default: lambda inner: inner.numel(),
    aten.dim.default: lambda inner: inner.dim(),
    aten.sym_storage_offset.default: lambda inner: inner.storage_offset(),
    aten.storage_offset.default: lambda inner: inner.storage_offset(),
    aten.is_contiguous.default: lambda inner: inner.is_contiguous(),
    aten.is_contiguous.memory_format: lambda inner: inner.is_contiguous(),
    aten.is_non_overlapping_and_dense.default: lambda inner: torch.ops.aten.is_non_overlapping_and_dense(inner),
    aten.is_strides_like_format.default: lambda inner: False,
}


class _Module(_DummyBackendModule):
    def device_count(self) -> int:
        return COUNT

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _empty(size, dtype=None, layout=None, device=None, pin_memory=None, memory_format=None):
    return PretendTensor(torch.empty(size, dtype=dtype), _indexed(device))


def _empty_strided(size, stride, dtype=None, layout=None, device=None, pin_memory=None):
    return PretendTensor(torch.empty_strided(size, stride, dtype=dtype), _indexed(device))


def _copy_from(source, target, non_blocking=False):
    target.inner.copy_(_inner(source))
    return target


_setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
# `Module.to` gives a parameter another class then, and keeps weights that modules share
torch.__future__.set_swap_module_params_on_conversion(True)
_kernels = torch.library.Library("aten", "IMPL")  # kept, since its kernels end with it
_kernels.impl("empty.memory_format", _empty, "PrivateUse1")
_kernels.impl("empty_strided", _empty_strided, "PrivateUse1")
_kernels.impl("_copy_from", _copy_from, "PrivateUse1")
