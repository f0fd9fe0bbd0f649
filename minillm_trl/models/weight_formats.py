"""Check the format of weights by settings and file names, before anything is loaded."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError

_GGUF = (
    "GGUF is a format for inference. Name the safetensors that it was made from, or convert it once: pip "
    "install gguf, AutoModelForCausalLM.from_pretrained(FOLDER, gguf_file=FILE, "
    "quantization_config=GgufConfig(dequantize=True)).save_pretrained(OUT), and "
    "AutoTokenizer.from_pretrained(FOLDER, gguf_file=FILE).save_pretrained(OUT)."
)


def quantization_settings(init_kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the `quantization_config` as a dictionary; empty without one.

    Args:
        init_kwargs (`Mapping`, *optional*): keyword arguments of `from_pretrained`. The `quantization_config` is a
            configuration object or, from YAML and JSON, a mapping.
    """
    found = (init_kwargs or {}).get("quantization_config") or {}
    return dict(found) if isinstance(found, Mapping) else found.to_dict()


def refuse_8bit_teacher(is_8bit: bool, teacher_mixed_alpha: float) -> None:
    """Refuse a teacher in LLM.int8() that samples: its logits depend on the other rows of the batch.

    Raises:
        ValueError: if `is_8bit` and `teacher_mixed_alpha` is above 0.
    """
    if is_8bit and teacher_mixed_alpha > 0:
        raise UserError(
            f"A teacher with load_in_8bit=True cannot sample (teacher_mixed_alpha={teacher_mixed_alpha}): LLM.int8() "
            "logits depend on the other rows of the batch, and so on how a completion is decoded. "
            'Load it in 4 bits (teacher_model_init_kwargs={"quantization_config": {"load_in_4bit": true, '
            '"bnb_4bit_quant_type": "nf4"}}) or in half precision, or set teacher_mixed_alpha=0.0.'
        )


def check_init_kwargs(option: str, init_kwargs: Mapping[str, Any] | None) -> None:
    """Check that keyword arguments of `from_pretrained` ask for a supported format.

    Args:
        option (`str`): name of the field that holds them.
        init_kwargs (`Mapping`, *optional*): keyword arguments.

    Raises:
        ValueError: for GGUF, and for bitsandbytes flags that belong in a `quantization_config`.
    """
    init_kwargs = init_kwargs or {}
    quantization = quantization_settings(init_kwargs)
    file = init_kwargs.get("gguf_file") or quantization.get("gguf_file")
    if file or quantization.get("quant_method") == "gguf":
        raise UserError(f"{option}: gguf_file={file!r} is not supported. {_GGUF}")
    for name in ("load_in_4bit", "load_in_8bit"):
        if name in init_kwargs:
            raise UserError(
                f"{option}: {name}={init_kwargs[name]} is not an argument of from_pretrained. Put it into a "
                f'quantization_config: {{"quantization_config": {{"{name}": {json.dumps(init_kwargs[name])}}}}}.'
            )


def check_name(name: str) -> None:
    """Check that a model's name is not a GGUF file, nor a folder that holds only GGUF files.

    Raises:
        ValueError: for GGUF.
    """
    path = Path(name)
    if path.suffix == ".gguf" or (any(path.glob("*.gguf")) and not (path / "config.json").exists()):
        raise UserError(f"{name} is not supported. {_GGUF}")
