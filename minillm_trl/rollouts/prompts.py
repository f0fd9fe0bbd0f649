"""Completions of one model, which depend on seed, prompt index and sample number, but not on the batch size."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..models.encoding import Prompt, encode_prompts
from ..models.end_tokens import find_end_tokens
from ..models.lm_head import check_embedded
from .keyed_random import draw_seed, sample_key
from .sampling import sample_prompts


@dataclass(frozen=True)
class Completion:
    """One sampled completion.

    Attributes:
        text (`str`): decoded without special tokens.
        token_ids (`list[int]`): the end-of-sequence token included.
        finished (`bool`): whether it ended with an end-of-sequence token, before the length limit.
    """

    text: str
    token_ids: list[int]
    finished: bool


def end_token_ids(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    conversational: bool = False,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Return every id that ends a completion of one model, see [`find_end_tokens`].

    Raises:
        ValueError: if the generation config or `eos_tokens` names a text that is no token.
    """
    ends = find_end_tokens(
        tokenizer,
        conversational=conversational,
        student=model.generation_config,
        eos_tokens=eos_tokens,
        chat_template_kwargs=chat_template_kwargs,
    )
    return ends.ids


def generate_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    seed: int | None = None,
    sample: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int = 64,
    greedy: bool = False,
    no_repeat_ngram_size: int = 0,
    eos_tokens: Sequence[str] | None = None,
    chat_template_kwargs: dict[str, Any] | None = None,
    on_batch: Callable[[int], object] | None = None,
) -> list[Completion]:
    """Sample one completion for each prompt from `model`.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence`): texts or conversations.
        max_new_tokens (`int`): length limit, the end-of-sequence token included.
        temperature (`float`, *optional*, defaults to `1.0`): sampling temperature.
        seed (`int`, *optional*): determines the completion together with the prompt's index and `sample`, for any
            batch size. None draws a seed from torch's generator.
        sample (`int`, *optional*, defaults to `0`): number of the sample, for several completions of each prompt.
            Different seeds give different samples.
        indices (`Sequence[int]`, *optional*): index of each prompt, if `prompts` are a part of a larger set; by
            default their positions.
        batch_size (`int`, *optional*, defaults to `64`): prompts decoded together.
        greedy (`bool`, *optional*, defaults to `False`): take the most likely token instead of sampling.
        no_repeat_ngram_size (`int`, *optional*, defaults to `0`): size of the n-grams that no completion may repeat,
            see [`NgramBlock`]; 0 allows all.
        eos_tokens (`Sequence[str]`, *optional*): the tokens that end a completion; by default the EOS tokens of
            tokenizer and generation config and, for conversations, the chat template's end of an assistant's turn.
        chat_template_kwargs (`dict`, *optional*): further arguments of the chat template.
        on_batch (`Callable`, *optional*): called after each batch with the number of its prompts.

    Returns:
        `list[Completion]` in the order of the prompts.

    Raises:
        ValueError: if a prompt has no tokens, or a token without an embedding in the model.
    """
    pad_token_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    indices = range(len(prompts)) if indices is None else indices
    keys = None
    if not greedy:
        seed = draw_seed() if seed is None else seed
        keys = [sample_key(seed, index, sample) for index in indices]
    conversational = any(not isinstance(prompt, str) for prompt in prompts)
    ends = end_token_ids(model, tokenizer, conversational, eos_tokens, chat_template_kwargs)
    prompt_ids = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    check_embedded(model, [*prompt_ids, [pad_token_id]])
    sampled = sample_prompts(
        model.eval(),
        prompt_ids,
        keys=keys,
        max_new_tokens=max_new_tokens,
        eos_token_ids=ends,
        pad_token_id=pad_token_id,
        temperature=temperature,
        batch_size=batch_size,
        vocab_size=min(len(tokenizer), model.get_output_embeddings().weight.shape[0]),
        no_repeat_ngram_size=no_repeat_ngram_size,
        on_batch=None if on_batch is None else lambda rows, _: on_batch(len(rows)),
    )
    # not `batch_decode`, which returns a text for no completions: a process may have no prompts
    return [Completion(str(tokenizer.decode(ids, skip_special_tokens=True)), ids, ids[-1] in ends) for ids in sampled]
