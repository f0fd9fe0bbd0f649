"""Zero-shot classification: probabilities of label words after a prompt."""

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..errors import UserError
from ..models.encoding import Prompt, encode_prompts, encode_texts
from ..models.lm_head import LMHead, completion_hidden_states
from .divergence import completion_losses, score_requests


@torch.no_grad()
def label_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    label_words: Sequence[str],
    *,
    batch_size: int = 64,
    chat_template_kwargs: dict[str, Any] | None = None,
) -> np.ndarray:
    r"""Return the probability that each label word follows a prompt, normalized over the label words.

    $$ P(w|x) = q(w|x) \Big/ \sum_{w'} q(w'|x), \qquad q(w|x) = \prod_t q(w_t|w_{<t}, x) $$

    with the tokens w_t of the word at temperature 1, without length normalization. The answer may continue after the
    word.

    Prompt and word are concatenated without a separator. Put the space into the word (`"Sentiment:"` with
    `" positive"`): tokenizers attach a space to the word after it, so a prompt that ends with a space ends within a
    token. After a line break or a chat template's generation prompt, words need no space.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence`): N texts or conversations.
        label_words (`Sequence[str]`): L words, at least two, each with a leading space if the prompts end without one.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.
        chat_template_kwargs (`dict`, *optional*): more arguments for the chat template.

    Returns:
        `np.ndarray` of shape `(N, L)`, float64; rows sum to 1. If all words are single tokens, the model reads each
        prompt once, otherwise once per word.

    Raises:
        ValueError: if there are no prompts or fewer than two label words, a word adds no tokens to a prompt, or the
            tokens of one word are a prefix of another word's tokens.
    """
    if not prompts:
        raise UserError("There are no prompts to classify.")
    if isinstance(label_words, str) or len(label_words) < 2:
        raise UserError(f"Classification needs a list of at least two label words, got {label_words!r}.")
    model.eval()
    prompt_ids = encode_prompts(tokenizer, prompts, chat_template_kwargs)
    label_ids = [
        _label_ids(tokenizer, index, prompt, ids, label_words, chat_template_kwargs or {})
        for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
    ]
    if all(len(ids) == 1 for row in label_ids for ids in row):
        log_probs = _next_token_log_probs(
            model, prompt_ids, [[ids[0] for ids in row] for row in label_ids], batch_size
        )
    else:
        repeated = [ids for ids in prompt_ids for _ in label_words]
        losses = completion_losses(model, repeated, [ids for row in label_ids for ids in row], batch_size=batch_size)
        log_probs = -np.array([sum(token_losses) for token_losses in losses]).reshape(
            len(prompt_ids), len(label_words)
        )
    return np.exp(log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True))


def _label_ids(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: Prompt,
    prompt_ids: list[int],
    label_words: Sequence[str],
    chat_template_kwargs: dict[str, Any],
) -> list[list[int]]:
    """Return the tokens that each label word adds to the prompt."""
    if isinstance(prompt, str):
        joined = encode_texts(tokenizer, [prompt + word for word in label_words])
    else:
        options = {"add_generation_prompt": True, "tokenize": False, **chat_template_kwargs}
        text = str(tokenizer.apply_chat_template(prompt, **options))
        # The template has already added its special tokens
        joined = tokenizer([text + word for word in label_words], add_special_tokens=False)["input_ids"]
    labels = []
    for word, ids in zip(label_words, joined, strict=True):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise UserError(
                f"Prompt {index} ends within a token that continues into the label word {word!r}. Remove the trailing "
                "space from the prompts and start the label words with it."
            )
        labels.append(ids[len(prompt_ids) :])
        if not labels[-1]:
            raise UserError(f"The label word {word!r} adds no tokens to prompt {index}. Choose another word.")
    for (word, ids), (other, other_ids) in permutations(zip(label_words, labels, strict=True), 2):
        if other_ids[: len(ids)] == ids:
            raise UserError(
                f"The tokens {ids} of the label word {word!r} are a prefix of the tokens of {other!r} ({other_ids}), "
                f"so {other!r} can never win. Choose words that are not prefixes of each other."
            )
    return labels


def _next_token_log_probs(
    model: PreTrainedModel, prompt_ids: list[list[int]], label_ids: list[list[int]], batch_size: int
) -> np.ndarray:
    """Return log-probs `(N, L)`, nats, of single tokens after each prompt."""
    head = LMHead.of(model)
    log_probs = np.empty((len(prompt_ids), len(label_ids[0])))
    # The state that predicts the first token does not depend on it, so one label per prompt is enough
    for rows, request in score_requests(prompt_ids, [row[:1] for row in label_ids], batch_size, head.weight.device):
        states = completion_hidden_states(model, request.input_ids, request.attention_mask, 1).squeeze(1)
        token_log_probs = torch.log_softmax(head.logits(states, head.weight.shape[0]), dim=-1)
        labels = torch.tensor([label_ids[row] for row in rows], device=token_log_probs.device)
        log_probs[rows] = token_log_probs.gather(1, labels).cpu().numpy()
    return log_probs
