"""Normalise the keyword arguments of `from_pretrained` in a configuration."""

from typing import Any

from ..errors import UserError


def with_dtype(init_kwargs: dict[str, Any] | None, field: str = "init_kwargs") -> dict[str, Any] | None:
    """Return a copy with the dtype under `dtype`; under its former name `torch_dtype` a default would override it.

    Args:
        init_kwargs (`dict`, *optional*): keyword arguments of `from_pretrained`.
        field (`str`, *optional*, defaults to `"init_kwargs"`): name of the arguments in the message.

    Raises:
        ValueError: if both names are present with different values.
    """
    if init_kwargs is None or "torch_dtype" not in init_kwargs:
        return None if init_kwargs is None else dict(init_kwargs)
    renamed = dict(init_kwargs)
    dtype = renamed.pop("torch_dtype")
    if renamed.setdefault("dtype", dtype) != dtype:
        raise UserError(f"{field} has torch_dtype={dtype!r} and dtype={renamed['dtype']!r}. Keep only dtype.")
    return renamed


def rename_dtypes(args: Any) -> None:
    """Apply [`with_dtype`] to `model_init_kwargs` and `teacher_model_init_kwargs` of a configuration."""
    for field in ("model_init_kwargs", "teacher_model_init_kwargs"):
        if hasattr(args, field):
            setattr(args, field, with_dtype(getattr(args, field), field))


def parsed_kwargs(value: dict[str, Any] | str | None) -> dict[str, Any] | None:
    """Return a field of keyword arguments of a configuration, which `__post_init__` has parsed.

    TRL annotates these fields as `dict | str` because the command line gives JSON text.
    """
    assert not isinstance(value, str), value
    return value
