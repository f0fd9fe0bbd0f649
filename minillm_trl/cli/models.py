"""Loading models and tokenizers for the subcommands."""

from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_utils import get_last_checkpoint


def load_tokenizer(name: str, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a tokenizer for left-padded generation; the padding token falls back to the end-of-sequence token.

    Raises:
        ValueError: if there is no tokenizer at `name`, or it has neither token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            name,
            revision=revision or "main",
            trust_remote_code=trust_remote_code,
            padding_side="left",
            truncation_side="left",
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"no tokenizer at {name!r}: {error}") from error
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise ValueError(f"the tokenizer of {name!r} has neither a padding nor an end-of-sequence token. Set one.")
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(
    name: str, adapter: str | None = None, dtype: str = "auto", trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal language model for inference, on the GPU if there is one; an adapter is merged into it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
    return model.to(device).eval()


def checkpoint_to_resume(value: str | bool | None, output_dir: str) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` names: a folder, or with `true` the newest one in `output_dir`.

    Raises:
        ValueError: if there is none.
    """
    if value is None or str(value).lower() == "false":
        return None
    if str(value).lower() != "true":
        if not Path(value).is_dir():
            raise ValueError(
                f"--resume_from_checkpoint {value}: no such folder. `true` takes the newest in output_dir."
            )
        return str(value)
    newest = get_last_checkpoint(output_dir) if Path(output_dir).is_dir() else None
    if newest is None:
        raise ValueError(f"--resume_from_checkpoint true: no checkpoint in {output_dir}. Leave it out to start.")
    return newest
