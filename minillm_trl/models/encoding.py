"""How texts and conversations become token ids: one place for sampling, training and measuring.

A tokenizer may put tokens around every text. A beginning-of-sequence token (BOS) belongs to a prompt, once. An
end-of-sequence token (EOS) that it appends does not: it would end the answer before it begins.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..errors import UserError

if TYPE_CHECKING:  # these take seconds to import
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

Prompt = str | list[dict[str, str]]

_PROBES = ("a", "0", ".")


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the ids that a tokenizer puts before and after every text; two empty lists if it adds none."""
    for probe in _PROBES:
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        whole = tokenizer(probe)["input_ids"]
        if not plain:  # a vocabulary without this character
            continue
        for start in range(len(whole) - len(plain) + 1):
            if whole[start : start + len(plain)] == plain:
                return list(whole[:start]), list(whole[start + len(plain) :])
    return [], []


def without_extra_tokens(ids: Sequence[Sequence[int]], before: Sequence[int], after: Sequence[int]) -> list[list[int]]:
    """Drop what a tokenizer appended to texts, and the second BOS of a text that holds one itself.

    Args:
        ids (`Sequence[Sequence[int]]`): encoded texts.
        before, after (`Sequence[int]`): from [`added_tokens`].
    """
    before, after, cleaned = list(before), list(after), []
    for row in map(list, ids):
        if after and row[-len(after) :] == after:
            row = row[: -len(after)]
        if before and row[len(before) : 2 * len(before)] == before:
            row = row[len(before) :]
        cleaned.append(row)
    return cleaned


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts that something may follow: with the tokenizer's BOS if it adds one, without its EOS."""
    if not texts:
        return []
    return without_extra_tokens(tokenizer(text=list(texts))["input_ids"], *added_tokens(tokenizer))


def encode_prompts(
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Prompt],
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[list[int]]:
    """Return the ids of texts, or of conversations through the chat template with the generation prompt.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        prompts (`Sequence`): texts or conversations.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.

    Raises:
        ValueError: if a prompt has no tokens, naming its index, or the tokenizer lacks a chat template.
    """
    texts = iter(encode_texts(tokenizer, [prompt for prompt in prompts if isinstance(prompt, str)]))
    encoded: list[list[int]] = []
    for index, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            ids = next(texts)
        elif tokenizer.chat_template is None:
            raise UserError(
                f"Prompt {index} is a conversation, but the tokenizer has no chat template. Set "
                "tokenizer.chat_template, or give the prompts as text."
            )
        else:
            ids = _render(tokenizer, prompt, chat_template_kwargs, add_generation_prompt=True)
        if not ids:
            raise UserError(f"Prompt {index} ({prompt!r}) has no tokens. Drop it.")
        encoded.append(ids)
    return encoded


def encode_pair(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    completion: Prompt,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> tuple[list[int], list[int]]:
    """Encode a prompt and its completion as TRL's `SFTTrainer` does: joined as they stand, with their end.

    Texts end with the tokenizer's EOS, unless the completion does already; conversations with what the chat template
    writes after the assistant's turn.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        prompt, completion (`str` or `list[dict]`): two texts, or two lists of messages.
        chat_template_kwargs (`dict`, *optional*): what else the chat template is given.

    Returns:
        The context's ids, one at least, and those that are learnt. The latter begin where the prompt alone, and with
        its completion, diverge: inside the prompt, if a token spans their border.
    """
    if isinstance(prompt, str):
        end = tokenizer.eos_token or ""
        completion = completion if completion.endswith(end) else completion + end
        prompt_ids, ids = encode_texts(tokenizer, [prompt, prompt + completion])
    else:
        prompt_ids = _render(tokenizer, prompt, chat_template_kwargs, add_generation_prompt=True)
        ids = _render(tokenizer, [*prompt, *completion], chat_template_kwargs)
    pairs = zip(prompt_ids, ids, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt_ids), len(ids)))
    start = max(start, 1)  # nothing predicts the first token
    return ids[:start], ids[start:]


def holds_conversations(dataset: "Dataset | IterableDataset") -> bool:
    """Return whether the rows of a dataset are conversations, by the first one."""
    first = next(iter(dataset), {})
    return any(isinstance(first.get(name), list) for name in ("prompt", "messages", "conversations"))


def stop_appending(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Let a tokenizer no longer append tokens to texts; what it puts before them stays.

    Returns:
        The ids that it appended; empty if there were none, and the tokenizer is as it was.

    Raises:
        ValueError: if it is no fast tokenizer, so that this cannot be switched off here.
    """
    from tokenizers import processors

    before, after = added_tokens(tokenizer)
    if not after:
        return []
    if not tokenizer.is_fast:
        raise UserError(
            f"The tokenizer {tokenizer.name_or_path!r} appends {tokenizer.decode(after)!r} to every text, which would "
            "end answers before they begin. Load it with add_eos_token=False."
        )
    tokenizer.add_eos_token = False  # its setter drops what comes before too, unless add_bos_token was set
    named = [
        {"id": f"before{id_}", "ids": [id_], "tokens": [token]}
        for id_, token in zip(before, tokenizer.convert_ids_to_tokens(before), strict=True)
    ]
    template = [*(token["id"] for token in named), "$A"]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, pair=[*template, "$B"], special_tokens=named
    )
    return after


def _render(
    tokenizer: "PreTrainedTokenizerBase",
    messages: list[dict[str, str]],
    chat_template_kwargs: dict[str, Any] | None,
    **options: bool,
) -> list[int]:
    """Ids of a conversation; a template writes its special tokens itself."""
    options = {**options, "tokenize": True, "return_dict": True, **(chat_template_kwargs or {})}
    return list(tokenizer.apply_chat_template(messages, **options)["input_ids"])
