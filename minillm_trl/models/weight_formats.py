"""Formats of weights: what settings say about them, and which are refused by name before anything is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_GGUF = (
    "GGUF is a format for inference. Name the safetensors that the file was made from, or convert it once: pip "
    "install gguf, AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, "
    "quantization_config=GgufConfig(dequantize=True)).save_pretrained(OUT), and "
    "AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT)."
)


def quantization_settings(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `quantization_config` of keyword arguments of `from_pretrained` as a dictionary, empty without one.

    Args:
        init_kwargs (`Mapping`, *optional*): in which it is a configuration or, from YAML and JSON, a mapping.
    """
    found = (init_kwargs or {}).get("quantization_config") or {}
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def refuse_8bit_teacher(is_8bit: bool, teacher_mixed_alpha: float) -> None:
    """Refuse a teacher in LLM.int8() that samples: what it computes for a token depends on the rest of the batch.

    Raises:
        ValueError: if it `is_8bit` and `teacher_mixed_alpha` is not 0.
    """
    if is_8bit and teacher_mixed_alpha > 0:
        raise UserError(
            f"A teacher with load_in_8bit=True cannot sample (teacher_mixed_alpha={teacher_mixed_alpha}): LLM.int8() "
            "computes each token by what else is in the batch, so its logits depend on how a completion is decoded. "
            'Load it in 4 bits (teacher_model_init_kwargs={"quantization_config": {"load_in_4bit": true, '
            '"bnb_4bit_quant_type": "nf4"}}) or in half precision, or set teacher_mixed_alpha=0.0.'
        )


def check_init_kwargs(option: str, init_kwargs: Mapping[str, Any] | None) -> None:
    """Check what keyword arguments of `from_pretrained` say about the format of the weights.

    Args:
        option (`str`): the field that has them.
        init_kwargs (`Mapping`, *optional*): the keyword arguments.

    Raises:
        ValueError: for GGUF, and for flags of bitsandbytes that belong into a `quantization_config`.
    """
    init_kwargs = init_kwargs or {}
    quantization = quantization_settings(init_kwargs)
    file = init_kwargs.get("gguf_file") or quantization.get("gguf_file")
    if file or quantization.get("quant_method") == "gguf":
        raise UserError(f"{option}: gguf_file={file!r} is not supported. {_GGUF}")
    for name in ("load_in_4bit", "load_in_8bit"):
        if name in init_kwargs:
            raise UserError(
                f"{option}: {name}={init_kwargs[name]} is no argument of from_pretrained. Put it into a "
                f'quantization_config: {{"quantization_config": {{"{name}": {json.dumps(init_kwargs[name])}}}}}.'
            )


def check_name(name: str) -> None:
    """Check that a model's name is neither that of a GGUF file nor that of a folder with nothing else.

    Raises:
        ValueError: if it is.
    """
    path = Path(name)
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not (path / "config.json").exists()):
        raise UserError(f"{name} is not supported. {_GGUF}")
