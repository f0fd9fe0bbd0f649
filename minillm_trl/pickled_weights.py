"""Weights that are pickles, which may hold code: they are loaded only where that is allowed."""

from collections.abc import Mapping
from typing import Any

from peft import PeftConfig
from transformers.utils import find_adapter_config_file, has_file

_MODEL = ("model.safetensors", "pytorch_model.bin")
_ADAPTER = ("adapter_model.safetensors", "adapter_model.bin")


def refuse_pickled_weights(name: str, init_kwargs: Mapping[str, Any] | None = None) -> None:
    """Refuse a model, or an adapter or its base, that has its weights as pickles (`.bin`) alone.

    What has no weights at all, or is nowhere, passes: loading it says more. No weights are downloaded.

    Args:
        name (`str`): name on the hub, or folder.
        init_kwargs (`Mapping`, *optional*): keyword arguments of `from_pretrained`, of which `revision`, `token`,
            `variant` and `use_safetensors` matter here.

    Raises:
        ValueError: naming the file and `allow_pickled_weights`.
    """
    init_kwargs = init_kwargs or {}
    try:
        is_adapter = find_adapter_config_file(name) is not None
        file = _pickled_file(name, init_kwargs, *_MODEL) or (is_adapter and _pickled_file(name, {}, *_ADAPTER))
    except OSError:  # no such model, or nobody may see it
        return
    if file:
        raise ValueError(
            f"{name} has its weights as a pickle ({file}) alone, which may hold code. Take a model with .safetensors; "
            "or, where you trust whoever made it, set allow_pickled_weights=True (--allow_pickled_weights). Pickles "
            "of more than tensors are refused even then."
        )
    if is_adapter and (base := PeftConfig.from_pretrained(name).base_model_name_or_path) and base != name:
        refuse_pickled_weights(base, {**init_kwargs, "revision": None})


def _pickled_file(name: str, init_kwargs: Mapping[str, Any], safe: str, pickled: str) -> str | None:
    """The file of pickled weights that would be loaded."""

    def found(file: str) -> str | None:
        if variant := init_kwargs.get("variant"):
            stem, ending = file.rsplit(".", 1)
            file = f"{stem}.{variant}.{ending}"
        revision, token = init_kwargs.get("revision"), init_kwargs.get("token")
        files = (file, f"{file}.index.json")
        return next((each for each in files if has_file(name, each, revision=revision, token=token)), None)

    if init_kwargs.get("use_safetensors") is not False and found(safe):
        return None
    return found(pickled)
