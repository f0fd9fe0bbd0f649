"""Zero-shot classification by label words, and how well a model's confidence in them fits its accuracy."""

from collections.abc import Sequence
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..lm_head import LMHead, completion_hidden_states
from .divergence import completion_losses, score_requests
from .generation import encode_prompts
from .metrics import MeanInterval, bootstrap_interval, bootstrap_means


@torch.no_grad()
def label_probabilities(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | list[dict[str, str]]],
    label_words: Sequence[str],
    *,
    batch_size: int = 64,
) -> np.ndarray:
    r"""Probability of each label word as what follows a prompt, among the label words.

    $$ P(w|x) = q(w|x) \Big/ \sum_{w'} q(w'|x), \qquad q(w|x) = \prod_t q(w_t|w_{<t}, x) $$

    with the tokens w_t of the word at temperature 1, not normalised by their number. The answer may go on behind the
    word.

    Prompt and word are joined as they stand, so one of them has to hold the space between them. It is the word
    (`"Sentiment:"` with `" positive"`), since tokenizers join a space to the word behind it: a prompt that ends with
    one ends within a token. Behind a line break or a chat template's opening of the answer, words need no space.

    Args:
        model ([`~transformers.PreTrainedModel`]): a causal language model; put in eval mode.
        tokenizer ([`~transformers.PreTrainedTokenizerBase`]): its tokenizer.
        prompts (`Sequence`): N texts or conversations.
        label_words (`Sequence[str]`): L words, at least two.
        batch_size (`int`, *optional*, defaults to `64`): rows of one forward pass; the result does not depend on it.

    Returns:
        `np.ndarray` of shape `(N, L)`, float64; rows sum to 1. Where all words are single tokens, each prompt runs
        through the model once, otherwise once for each word.

    Raises:
        ValueError: if there are no prompts or fewer than two label words, a word has no tokens of its own behind a
            prompt, or the tokens of one are, or begin, those of another.
    """
    if not prompts:
        raise ValueError("There are no prompts to classify.")
    if isinstance(label_words, str) or len(label_words) < 2:
        raise ValueError(f"Classification needs a list of at least two label words, got {label_words!r}.")
    model.eval()
    prompt_ids = encode_prompts(tokenizer, prompts)
    label_ids = [
        _label_ids(tokenizer, index, prompt, ids, label_words)
        for index, (prompt, ids) in enumerate(zip(prompts, prompt_ids, strict=True))
    ]
    if all(len(ids) == 1 for row in label_ids for ids in row):
        log_probs = _next_token_log_probs(
            model, prompt_ids, [[ids[0] for ids in row] for row in label_ids], batch_size
        )
    else:
        repeated = [ids for ids in prompt_ids for _ in label_words]
        losses = completion_losses(model, repeated, [ids for row in label_ids for ids in row], batch_size=batch_size)
        log_probs = -np.array([sum(each) for each in losses]).reshape(len(prompt_ids), len(label_words))
    return np.exp(log_probs - np.logaddexp.reduce(log_probs, axis=1, keepdims=True))


def _label_ids(
    tokenizer: PreTrainedTokenizerBase,
    index: int,
    prompt: str | list[dict[str, str]],
    prompt_ids: list[int],
    label_words: Sequence[str],
) -> list[list[int]]:
    """Tokens of each label word behind the prompt's."""
    is_text = isinstance(prompt, str)
    # a template's text has its special tokens already
    text = prompt if is_text else tokenizer.apply_chat_template(prompt, add_generation_prompt=True, tokenize=False)
    joined = tokenizer([text + word for word in label_words], add_special_tokens=is_text)["input_ids"]
    labels = []
    for word, ids in zip(label_words, joined, strict=True):
        if ids[: len(prompt_ids)] != prompt_ids:
            raise ValueError(
                f"Prompt {index} ends within a token that reaches into the label word {word!r}. End the prompts "
                "before the space, and begin the label words with it."
            )
        labels.append(ids[len(prompt_ids) :])
        if not labels[-1]:
            raise ValueError(f"The label word {word!r} has no tokens behind prompt {index}. Choose another.")
    for (word, ids), (other, other_ids) in permutations(zip(label_words, labels, strict=True), 2):
        if other_ids[: len(ids)] == ids:
            raise ValueError(
                f"The tokens {ids} of the label word {word!r} are, or begin, those of {other!r} ({other_ids}), "
                "so that it is never the less probable one. Choose words of which none begins another."
            )
    return labels


def _next_token_log_probs(
    model: PreTrainedModel, prompt_ids: list[list[int]], label_ids: list[list[int]], batch_size: int
) -> np.ndarray:
    """Log-probs `(N, L)`, nats, of single tokens behind each prompt."""
    head = LMHead.of(model)
    log_probs = np.empty((len(prompt_ids), len(label_ids[0])))
    # any token may stand behind a prompt: the states that are taken are those that predict it
    for rows, request in score_requests(prompt_ids, [row[:1] for row in label_ids], batch_size, head.weight.device):
        states = completion_hidden_states(model, request.input_ids, request.attention_mask, 1).squeeze(1)
        found = torch.log_softmax(head.logits(states, head.weight.shape[0]), dim=-1)
        labels = torch.tensor([label_ids[row] for row in rows], device=found.device)
        log_probs[rows] = found.gather(1, labels).cpu().numpy()
    return log_probs


class CalibrationBin(NamedTuple):
    """Predictions with a confidence in (low, high]: how many, their mean confidence and accuracy; None of none."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    """How well confidence fits accuracy.

    Attributes:
        ece (`float`): expected calibration error, in [0, 1].
        low, high (`float`): bounds of its 95 % bootstrap interval over prompts.
        accuracy ([`MeanInterval`]): share of correct predictions.
        bins (`list[CalibrationBin]`): all bins, the empty ones too.
    """

    ece: float
    low: float
    high: float
    accuracy: MeanInterval
    bins: list[CalibrationBin]


def calibration(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 10, *, resamples: int = 10_000, seed: int = 0
) -> Calibration:
    r"""Expected calibration error: the gap between confidence and accuracy, averaged over predictions.

    $$ \mathrm{ECE} = \sum_b \frac{n_b}{N} \,\big|\, \mathrm{acc}_b - \mathrm{conf}_b \,\big| $$

    over bins of equal width on (0, 1]. A bin holds its upper border and not its lower one: with 10 bins a confidence
    of 0.7 lies in (0.6, 0.7], and 1 in the last bin.

    Chance adds to the ECE, and resampling adds as much again, so the interval is the basic bootstrap's,
    [2 ECE - upper, 2 ECE - lower] with the quantiles of the resampled ECE, which takes the bias out; quantiles alone
    would not contain the 0 of a calibrated model. It is cut at 0.

    Args:
        confidences (`Sequence[float]`): of each prediction, the probability of the predicted label, in (0, 1].
        correct (`Sequence[bool]`): whether each prediction is right.
        bins (`int`, *optional*, defaults to `10`): number of bins.
        resamples (`int`, *optional*, defaults to `10_000`): number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`): seed of the resampling.

    Raises:
        ValueError: if there are no predictions, the two lists differ in length, a confidence lies outside (0, 1], or
            `bins` is less than 1.
    """
    confidence, right = np.asarray(confidences, dtype=np.float64), np.asarray(correct, dtype=np.float64)
    if len(confidence) != len(right) or len(confidence) == 0:
        raise ValueError(f"calibration needs predictions: got {len(confidence)} confidences and {len(right)} results.")
    if bins < 1:
        raise ValueError(f"calibration needs bins >= 1, got {bins}.")
    outside = ~((confidence > 0) & (confidence <= 1))
    if outside.any():
        index = int(outside.argmax())
        raise ValueError(f"Confidence {index} is {confidence[index]}, which is not in (0, 1]: give probabilities.")
    borders = np.arange(bins + 1) / bins
    members = np.searchsorted(borders[1:], confidence, side="left")[:, None] == np.arange(bins)  # (N, bins)
    gaps = members * (right - confidence)[:, None]
    ece = float(np.abs(gaps.mean(axis=0)).sum())
    resampled = np.abs(bootstrap_means(gaps, resamples, seed)).sum(axis=1)
    lower, upper = np.quantile(resampled, [0.025, 0.975])
    found = []
    for number, inside in enumerate(members.T):
        means = (float(each[inside].mean()) if inside.any() else None for each in (confidence, right))
        found.append(CalibrationBin(float(borders[number]), float(borders[number + 1]), int(inside.sum()), *means))
    accuracy = bootstrap_interval(right.tolist(), resamples=resamples, seed=seed)
    return Calibration(ece, max(0.0, 2 * ece - float(upper)), max(0.0, 2 * ece - float(lower)), accuracy, found)
