"""Loading models and tokenizers for the subcommands."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

from ..errors import UserError
from ..files.messages import nearest
from ..hardware.processes import launched_on_cpu
from .adapters import Adapter, find_adapter, is_adapter
from .end_tokens import find_turn_end, has_generation_config
from .files import explained, is_lost_folder, load_causal_lm
from .quantization import keep_4bit_layout
from .weight_formats import check_name

if TYPE_CHECKING:  # these take seconds to import, which reading a tokenizer need not wait for
    from datasets import Dataset
    from transformers import PreTrainedModel


def load_tokenizer(
    name: str, revision: str | None = None, trust_remote_code: bool = False, adapter: str | None = None
) -> PreTrainedTokenizerBase:
    """Load a tokenizer for left-padded generation; the padding token falls back to the EOS, or the end of a turn.

    Where there is an adapter, the tokenizer that was saved with it comes before that of its base.

    Raises:
        ValueError: if there is no tokenizer at `name`, or it has neither token.
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
    """Load a tokenizer as it was saved, but for the `options`.

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
        tokenizer("a")  # some odd values are found by using it only
    if tokenizer.vocab_size <= len(tokenizer.all_special_ids):  # GPT-2's is made without any files
        raise UserError(f"no tokenizer at {name!r}: its vocabulary is empty.")
    return tokenizer


def _lost_folder(name: str) -> str:
    """A remark for names of folders that are not there; empty for those that can only be meant for the hub."""
    path = Path(name).expanduser()
    if path.exists():
        return ""
    siblings = [each.name for each in path.parent.iterdir() if each.is_dir()] if path.parent.is_dir() else []
    found = nearest(path.name, siblings)
    is_meant = found or is_lost_folder(name) or (path.parent != Path() and path.parent.is_dir())
    return f" (no such folder.{found})" if found else " (no such folder)" if is_meant else ""


def load_config(name: str, trust_remote_code: bool = False) -> PreTrainedConfig:
    """Load the configuration of a model; of an adapter, that of its base."""
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
    """Load a causal language model for inference, on the GPU if there is one; an adapter is merged into it.

    `name` may also be that of an adapter alone, which then goes into the base that it names.
    """
    device = "cuda" if torch.cuda.is_available() and not launched_on_cpu() else "cpu"
    dtype = dtype if dtype == "auto" else getattr(torch, dtype)
    if (found := _adapter_of(name, adapter, trust_remote_code)) is not None:
        model = found.load_merged(dtype, trust_remote_code, allow_pickled_weights)
    else:
        options = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model = load_causal_lm(name, f"the model {name!r}", allow_pickled_weights, **options)
    keep_4bit_layout(model)
    return model.to(device).eval()


def _adapter_of(name: str, adapter: str | None, trust_remote_code: bool) -> Adapter | None:
    if adapter is not None:
        return find_adapter(adapter, name, trust_remote_code)
    return find_adapter(name, None, trust_remote_code) if is_adapter(name) else None


def generation_source(name: str, revision: str | None) -> tuple[str, str | None]:
    """Name and revision of what has the generation config: a model, an adapter that brings one, or its base."""
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
        names (`Sequence[str]`): of the models.
        tasks (`Iterable`): what the user called each dataset, and the dataset, with a column `prompt`.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): of the prompts.
        option (`str`): name of the length limit.
        length (`int`): the limit, in tokens.
        trust_remote_code (`bool`): whether a configuration's code may run.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.

    Raises:
        ValueError: if there is no room for a prompt, or ([`DataError`]) none for one of them.
    """
    from ..data import check_prompt_lengths

    configs = [load_config(name, trust_remote_code).get_text_config() for name in names]
    limits = [limit for config in configs if (limit := getattr(config, "max_position_embeddings", None))]
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
