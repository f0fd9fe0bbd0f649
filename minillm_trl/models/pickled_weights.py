"""Weights that are pickles, which may hold code: they are loaded only where that is allowed."""

from collections.abc import Mapping
from typing import Any

from transformers.utils import find_adapter_config_file, has_file

from ..errors import UserError

_MODEL = ("model.safetensors", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")
_PLACE = ("revision", "token", "cache_dir", "local_files_only")  # of `from_pretrained`: where it looks for a name


def refuse_pickled_weights(name: str, init_kwargs: Mapping[str, Any] | None = None, with_base: bool = True) -> None:
    """Refuse a model, or an adapter or its base, that has its weights as pickles (`.bin`) alone.

    What has no weights at all, or is nowhere, passes: loading it says more. No weights are downloaded.

    Args:
        name (`str`): name on the hub, or folder.
        init_kwargs (`Mapping`, *optional*): keyword arguments of `from_pretrained`, of which those matter here that
            choose files: `revision`, `subfolder`, `variant`, `use_safetensors`, `cache_dir` and the like.
        with_base (`bool`, *optional*, defaults to `True`): whether the base that an adapter names is loaded too.

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
    except OSError:  # no such model, or one that only who has its files already may see
        if not place.get("local_files_only"):
            refuse_pickled_weights(name, {**init_kwargs, "local_files_only": True}, with_base)
        return
    if file:
        raise UserError(
            f"{name} has its weights as a pickle ({file}) alone, which may hold code. Take a model with .safetensors; "
            "or, where you trust whoever made it, set allow_pickled_weights=True (--allow_pickled_weights). Pickles "
            "of more than tensors are refused even then."
        )
    if is_adapter and with_base:
        from peft import PeftConfig  # takes seconds, and most models are no adapters

        base = PeftConfig.from_pretrained(name, **place, subfolder=folder or None).base_model_name_or_path
        if base and base != name:
            refuse_pickled_weights(base, init_kwargs, with_base=False)  # transformers takes them for both


def _pickled_file(
    name: str, place: Mapping[str, Any], init_kwargs: Mapping[str, Any], safe: str, pickled: str
) -> str | None:
    """The file of pickled weights that would be loaded."""

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
