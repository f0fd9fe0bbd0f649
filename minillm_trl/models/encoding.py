"""Encode texts and conversations as token ids, in the same way for sampling, training and evaluation.

A tokenizer may add tokens around every text. A prompt keeps one beginning-of-sequence token (BOS). It must not keep an
end-of-sequence token (EOS), which would end the answer before it begins.
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
    """Return the ids that a tokenizer adds before and after every text; two empty lists if it adds none."""
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
    """Drop the tokens appended to texts, and the second BOS of a text that already starts with BOS.

    Args:
        ids (`Sequence[Sequence[int]]`): encoded texts.
        before, after (`Sequence[int]`): from [`added_tokens`].
    """
    before, after = list(before), list(after)
    cleaned: list[list[int]] = []
    for row in map(list, ids):
        if after and row[-len(after) :] == after:
            row = row[: -len(after)]
        if before and row[len(before) : 2 * len(before)] == before:
            row = row[len(before) :]
        cleaned.append(row)
    return cleaned


def encode_texts(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Return the ids of texts that a completion may follow: with BOS if the tokenizer adds one, without EOS."""
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
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.

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
    """Encode a prompt and its completion as TRL's `SFTTrainer` does: concatenated without a separator, with an end.

    A text ends with the tokenizer's EOS, added unless the completion already ends with it. A conversation ends with
    what the chat template writes after the assistant's turn.

    Args:
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): the tokenizer.
        prompt, completion (`str` or `list[dict]`): two texts, or two lists of messages.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.

    Returns:
        `tuple[list[int], list[int]]`: ids of the context (at least one), and ids to learn. The latter start at the
        first token in which the encoded prompt and the encoded whole differ. If a token spans the border, this token
        starts inside the prompt.

    Raises:
        TypeError: if one of the two is a text and the other a conversation.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        end = tokenizer.eos_token or ""
        completion = completion if completion.endswith(end) else completion + end
        prompt_ids, ids = encode_texts(tokenizer, [prompt, prompt + completion])
    elif isinstance(prompt, str) or isinstance(completion, str):
        raise TypeError(f"prompt={prompt!r}, completion={completion!r}: give two texts or two conversations.")
    else:
        prompt_ids = _render(tokenizer, prompt, chat_template_kwargs, add_generation_prompt=True)
        ids = _render(tokenizer, [*prompt, *completion], chat_template_kwargs)
    pairs = zip(prompt_ids, ids, strict=False)
    start = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(prompt_ids), len(ids)))
    start = max(start, 1)  # nothing predicts the first token
    return ids[:start], ids[start:]


def encode_after_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: Prompt,
    completion: Prompt,
    chat_template_kwargs: dict[str, Any] | None = None,
    source: str = "dataset",
) -> tuple[int, list[int]]:
    """Encode a completion after the tokens of its prompt as sampling sees them, with an end.

    Args:
        tokenizer, prompt, completion, chat_template_kwargs: as in [`encode_pair`].
        source (`str`, *optional*): name of the dataset, for the message.

    Returns:
        `tuple[int, list[int]]`: the number of prompt tokens, and the tokens of prompt and completion.

    Raises:
        ValueError: if the chat template renders a prompt differently when its completion follows.
    """
    if isinstance(prompt, str) and isinstance(completion, str):
        prompt_ids, ids = encode_texts(tokenizer, [prompt, prompt + completion])
        # a token spans the border, but sampling starts from the prompt's tokens
        if ids[: len(prompt_ids)] != prompt_ids:
            ids = prompt_ids + tokenizer(completion, add_special_tokens=False)["input_ids"]
        return len(prompt_ids), ids if ids[-1:] == [tokenizer.eos_token_id] else [*ids, tokenizer.eos_token_id]
    (prompt_ids,) = encode_prompts(tokenizer, [prompt], chat_template_kwargs)
    context, learnt = encode_pair(tokenizer, prompt, completion, chat_template_kwargs)
    if context != prompt_ids:
        raise UserError(
            f"{source}: the chat template renders a prompt differently when its completion follows, so the end of "
            f"the prompt cannot be found. Pass prompt and completion as texts. The prompt is {str(prompt)[:80]}."
        )
    return len(prompt_ids), context + learnt


def holds_conversations(dataset: "Dataset | IterableDataset") -> bool:
    """Return whether the rows of a dataset are conversations, judged by the first row."""
    first: dict[str, Any] = next(iter(dataset), {})
    return any(isinstance(first.get(name), list) for name in ("prompt", "messages", "conversations"))


def stop_appending(tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Make a tokenizer stop appending tokens to texts; it still adds tokens before them.

    Returns:
        `list[int]`: the ids that it used to append; empty if it appended nothing and is unchanged.

    Raises:
        ValueError: if it appends tokens and is not a fast tokenizer, which cannot be changed here.
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
    tokenizer.add_eos_token = False
    # The setter above also drops BOS unless add_bos_token is set, so restore the tokens before the text
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
    """Return the ids of a conversation; the template itself writes its special tokens."""
    arguments: dict[str, Any] = {**options, "tokenize": True, "return_dict": True, **(chat_template_kwargs or {})}
    encoded: Any = tokenizer.apply_chat_template(messages, **arguments)  # a mapping, because of `return_dict`
    return list(encoded["input_ids"])
