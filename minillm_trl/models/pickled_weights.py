"""Refuse pickled weights, which can run code, unless the user allows them."""

from collections.abc import Mapping
from typing import Any

from transformers.utils import find_adapter_config_file, has_file

from ..errors import UserError

_MODEL = ("model.safetensors", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_PLACE = ("revision", "token", "cache_dir", "local_files_only")  # arguments of `from_pretrained` that locate files


def refuse_pickled_weights(name: str, init_kwargs: Mapping[str, Any] | None = None, with_base: bool = True) -> None:
    """Refuse a model, or an adapter or its base, whose weights exist only as pickles (`.bin`).

    A model without weights, or one that does not exist, passes: loading it gives a better message. Nothing is
    downloaded except configurations.

    Args:
        name (`str`): name on the hub, or folder.
        init_kwargs (`Mapping`, *optional*): keyword arguments of `from_pretrained`. Those that choose files are used:
            `revision`, `subfolder`, `variant`, `use_safetensors`, `cache_dir` and the like.
        with_base (`bool`, *optional*, defaults to `True`): whether to check the base that an adapter names too.

    Raises:
        ValueError: naming the file and `allow_pickled_weights`.
    """
    init_kwargs = init_kwargs or {}
    place = {key: init_kwargs[key] for key in _PLACE if init_kwargs.get(key) is not None}
    folder = init_kwargs.get("subfolder") or ""
    try:
        is_adapter = find_adapter_config_file(name, **place, subfolder=folder) is not None
        file = _pickled_file(name, place, init_kwargs, *_MODEL)
        if is_adapter and not file:
            file = _pickled_file(name, place, {**init_kwargs, "variant": None}, *_ADAPTER)
    except OSError:  # no such model, or a gated one whose files may be in the cache
        if not place.get("local_files_only"):
            refuse_pickled_weights(name, {**init_kwargs, "local_files_only": True}, with_base)
        return
    if file:
        raise UserError(
            f"{name} has its weights only as a pickle ({file}), which may run code. Take a model with .safetensors; "
            "or, if you trust its author, set allow_pickled_weights=True (--allow_pickled_weights). Pickles that hold "
            "more than tensors are refused even then."
        )
    if is_adapter and with_base:
        from peft import PeftConfig  # takes seconds to import, and most models are not adapters

        base = PeftConfig.from_pretrained(name, **place, subfolder=folder or None).base_model_name_or_path
        if base and base != name:
            # transformers applies the keyword arguments to both
            refuse_pickled_weights(base, init_kwargs, with_base=False)


def _pickled_file(
    name: str, place: Mapping[str, Any], init_kwargs: Mapping[str, Any], safe: str, pickled: str
) -> str | None:
    """Return the file of pickled weights that `from_pretrained` would load; None if it would load safetensors."""

    def found(whole: str) -> str | None:
        for file in (whole, f"{whole}.index.json"):
            if variant := init_kwargs.get("variant"):
                stem, ending = file.rsplit(".", 1)
                file = f"{stem}.{variant}.{ending}"
            if folder := init_kwargs.get("subfolder"):
                file = f"{folder}/{file}"
            if has_file(name, file, **place):
                return file
        return None

    if init_kwargs.get("use_safetensors") is not False and found(safe):
        return None
    return found(pickled)
