"""Keyword arguments of `from_pretrained` that a configuration holds."""

from typing import Any

from ..errors import UserError


def with_dtype(init_kwargs: dict[str, Any] | None, field: str = "init_kwargs") -> dict[str, Any] | None:
    """Return a copy that names the dtype as `dtype`, where the former name `torch_dtype` would lose to a default.

    Args:
        init_kwargs (`dict`, *optional*): keyword arguments of `from_pretrained`.
        field (`str`, *optional*, defaults to `"init_kwargs"`): what the message calls them.

    Raises:
        ValueError: if both names are there, with different values.
    """
    if init_kwargs is None or "torch_dtype" not in init_kwargs:
        return None if init_kwargs is None else dict(init_kwargs)
    renamed = dict(init_kwargs)
    dtype = renamed.pop("torch_dtype")
    if renamed.setdefault("dtype", dtype) != dtype:
        raise UserError(f"{field} has torch_dtype={dtype!r} and dtype={renamed['dtype']!r}. Keep dtype alone.")
    return renamed


def rename_dtypes(args: Any) -> None:
    """Apply [`with_dtype`] to the fields of a configuration that hold such arguments."""
    for field in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if hasattr(args, field):
            setattr(args, field, with_dtype(getattr(args, field), field))


def parsed_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Return a field of keyword arguments of a configuration, which `__post_init__` has parsed.

    TRL annotates these fields as `dict | str` because the command line gives JSON text.
    """
    assert not isinstance(value, str), value
    return value
