"""Load models and tokenizers for the subcommands."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UserError
from ..files.messages import nearest
from ..hardware.processes import launched_on_cpu
from .adapters import Adapter, find_adapter, is_adapter
from .bitsandbytes_layout import keep_4bit_layout
from .end_tokens import find_turn_end, has_generation_config
from .files import explained, is_lost_folder, load_causal_lm
from .trained_products import use_onednn_products
from .weight_formats import check_name

if TYPE_CHECKING:  # importing these takes seconds, and reading a tokenizer does not need them
    from datasets import Dataset
    from transformers import PreTrainedModel


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, adapter: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer for left-padded generation; the padding token defaults to the EOS or the end of a turn.

    The tokenizer that was saved with an adapter has priority over the tokenizer of its base.

    Raises:
        ValueError: if there is no tokenizer at `name`, or it has none of these tokens.
    """
    if (found := _adapter_of(name, adapter, trust_remote_code)) is not None:
        name, revision = found.tokenizer_source()
    tokenizer = read_tokenizer(name, revision, trust_remote_code, padding_side="left", truncation_side="left")
    if tokenizer.pad_token is None:
        end = tokenizer.eos_token_id if tokenizer.eos_token is not None else find_turn_end(tokenizer)
        if end is None:
            raise UserError(
                f"the tokenizer of {name!r} has neither a padding nor an end-of-sequence token. Set eos_token in its "
                "tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def read_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, **options: str
) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it was saved, changed only by `options`.

    Raises:
        ValueError: if there is no tokenizer at `name`.
    """
    check_name(name)
    if is_lost_folder(name):
        raise UserError(f"no tokenizer at {name!r}{_lost_folder(name)}.")
    with explained(f"no tokenizer at {name!r}{_lost_folder(name)}"):
        tokenizer = AutoTokenizer.from_pretrained(
            name, revision=revision or "main", trust_remote_code=trust_remote_code, **options
        )
    with explained(f"no tokenizer at {name!r}"):
        tokenizer("a")  # some invalid values fail only in use
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # GPT-2's tokenizer loads without any files
        raise UserError(f"no tokenizer at {name!r}: its vocabulary is empty.")
    return tokenizer


def _lost_folder(name: str) -> str:
    """Return a remark for the message if a folder was meant and does not exist; empty for a hub name."""
    path = Path(name).expanduser()
    if path.exists():
        return ""
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    if suggestion := nearest(path.name, siblings):
        return f" (no such folder.{suggestion})"
    is_folder = is_lost_folder(name) or (path.parent != Path() and path.parent.is_dir())
    return " (no such folder)" if is_folder else ""


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model, or of an adapter's base."""
    if (found := _adapter_of(name, None, trust_remote_code)) is not None:
        return found.base_config
    with explained(f"the configuration of {name!r} cannot be loaded"):
        return AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)


def load_model(
    name: str,
    adapter: str | None = None,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    allow_pickled_weights: bool = False,
) -> "PreTrainedModel":
    """Load a causal language model for inference, on the GPU if there is one, and merge an adapter into it.

    `name` may also be the name of an adapter, which is merged into the base that it names.
    """
    device = "cuda" if torch.cuda.is_available() and not launched_on_cpu() else "cpu"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if (found := _adapter_of(name, adapter, trust_remote_code)) is not None:
        model = found.load_merged(dtype, trust_remote_code, allow_pickled_weights)
    else:
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model = load_causal_lm(name, f"the model {name!r}", allow_pickled_weights, **options)
    keep_4bit_layout(model)
    model = model.eval().to(torch.device(device))
    use_onednn_products(model)  # they score whole completions
    return model


def _adapter_of(name: str, adapter: str | None, trust_remote_code: bool) -> Adapter | None:
    if adapter is not None:
        return find_adapter(adapter, name, trust_remote_code)
    return find_adapter(name, None, trust_remote_code) if is_adapter(name) else None


def generation_source(name: str, revision: str | None) -> tuple[str, str | None]:
    """Return name and revision of the generation config: a model's, an adapter's if it has one, or its base's."""
    if is_adapter(name) and not has_generation_config(name):
        found = find_adapter(name)
        return found.base, found.revision
    return name, revision


def check_room(
    names: Sequence[str],
    tasks: Iterable[tuple[str, "Dataset"]],
    tokenizer: PreTrainedTokenizerBase,
    option: str,
    length: int,
    trust_remote_code: bool,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> None:
    """Check that prompts and completions fit in the models' contexts, before a model is loaded.

    Args:
        names (`Sequence[str]`): models.
        tasks (`Iterable`): pairs of the dataset's name, as the user gave it, and the dataset, with a column `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): tokenizer of the prompts.
        option (`str`): name of the option that limits completions.
        length (`int`): value of that option, in tokens.
        trust_remote_code (`bool`): whether code that comes with a configuration may run.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.

    Raises:
        ValueError: if completions leave no room for any prompt, or ([`DataError`]) for one of the prompts.
    """
    from ..data import check_prompt_lengths
    from .context import context_limit

    configs = [load_config(name, trust_remote_code) for name in names]
    limits = [limit for config in configs if (limit := context_limit(config))]
    if not limits:
        return
    room = min(limits) - length
    if room <= 0:
        raise UserError(
            f"{option}={length} leaves no room for a prompt in a context of {min(limits)} tokens. Lower it."
        )
    for source, dataset in tasks:
        check_prompt_lengths(
            dataset, tokenizer, max_prompt_tokens=room, source=source, chat_template_kwargs=chat_template_kwargs
        )
