"""Measures of completions and intervals over prompts, as pure functions."""

import math
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

if TYPE_CHECKING:  # with BLEU it brings all of nltk, which is slow to import
    from rouge_score.rouge_scorer import RougeScorer


@cache
def _scorer() -> "RougeScorer":
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rougeL"], use_stemmer=True)


def rouge_l(prediction: str, references: Sequence[str]) -> float:
    """Rouge-L of a prediction against the reference that it fits best, in [0, 100].

    F-measure of the longest common subsequence of stemmed words (package `rouge-score`), texts stripped, maximum over
    references; the original code's `rouge_metric.py` does the same.

    Args:
        prediction (`str`): generated text; an empty one scores 0.
        references (`Sequence[str]`): at least one reference text.

    Raises:
        ValueError: if there is no reference, or `references` is one text instead of a list.
    """
    _check_references("rouge_l", references)
    prediction = prediction.strip()
    return 100 * max(_scorer().score(reference.strip(), prediction)["rougeL"].fmeasure for reference in references)


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """100 if a prediction is one of the references to the character, else 0.

    White space at the ends does not count; nothing else is normalised, neither case nor punctuation.

    Args:
        prediction (`str`): generated text.
        references (`Sequence[str]`): at least one reference text.

    Raises:
        ValueError: if there is no reference, or `references` is one text instead of a list.
    """
    _check_references("exact_match", references)
    return 100.0 if prediction.strip() in {reference.strip() for reference in references} else 0.0


def _check_references(measure: str, references: Sequence[str]) -> None:
    if not references:
        raise ValueError(f"{measure} needs at least one reference.")
    if isinstance(references, str):
        raise ValueError(f"{measure} needs a list of references, got the text {references!r}: write [reference].")


def repeated_ngrams(token_ids: Sequence[int], n: int = 4) -> float:
    """Share of n-grams that stood earlier in the same sequence: 1 - distinct / total, in [0, 1).

    Args:
        token_ids (`Sequence[int]`): one completion.
        n (`int`, *optional*, defaults to `4`): length of the n-grams. Sequences shorter than n score 0.

    Raises:
        ValueError: if n is less than 1.
    """
    if n < 1:
        raise ValueError(f"repeated_ngrams needs n >= 1, got {n}.")
    total = len(token_ids) - n + 1
    if total <= 0:
        return 0.0
    return 1 - len({tuple(token_ids[i : i + n]) for i in range(total)}) / total


def distinct_ngrams(texts: Sequence[str], n: int = 4) -> float:
    """Dist-n: share of different n-grams of words among all of several texts, in [0, 1].

    Over the samples for one prompt it measures their diversity; over a corpus, its own.

    Args:
        texts (`Sequence[str]`): split into words at white space.
        n (`int`, *optional*, defaults to `4`): length of the n-grams. Texts without any score 0.

    Raises:
        ValueError: if n is less than 1.
    """
    if n < 1:
        raise ValueError(f"distinct_ngrams needs n >= 1, got {n}.")
    words = [text.split() for text in texts]
    ngrams = [tuple(each[i : i + n]) for each in words for i in range(len(each) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 0.0


def distinct_outputs(outputs: Sequence[str]) -> float:
    """Share of different texts among several samples for one prompt: 1 if all differ, 1/n if all are the same.

    Raises:
        ValueError: if `outputs` is empty.
    """
    if not outputs:
        raise ValueError("distinct_outputs needs at least one output.")
    return len({output.strip() for output in outputs}) / len(outputs)


def self_bleu(outputs: Sequence[str]) -> float:
    """Self-BLEU of several samples for one prompt: mean BLEU-4 of each against all others, in [0, 100].

    100 if all are the same, 0 if no two have a word in common. Sentence BLEU of package `nltk` on words split at white
    space, case and punctuation as they are. As in Texygen, which introduced the measure, an order of n-grams without a
    match counts 0.1 matches (`SmoothingFunction().method1`). Of an output with fewer than 4 words the orders up to its
    length count, so that equal short outputs reach 100. An output without words scores 100 if another has none either,
    and 0 if not.

    Args:
        outputs (`Sequence[str]`): at least two samples.

    Raises:
        ValueError: if there are fewer than two outputs: one alone has nothing to be like.
    """
    if len(outputs) < 2:
        raise ValueError(f"self_bleu needs at least two outputs, got {len(outputs)}. Sample with more seeds.")
    from nltk.translate.bleu_score import SmoothingFunction, sentence_bleu

    words = [output.split() for output in outputs]
    smoothing = SmoothingFunction().method1
    total = 0.0
    for i, hypothesis in enumerate(words):
        others = words[:i] + words[i + 1 :]
        if hypothesis:
            total += sentence_bleu(others, hypothesis, smoothing_function=smoothing, auto_reweigh=True)
        else:
            total += float([] in others)
    return 100 * total / len(words)


class MeanInterval(NamedTuple):
    """A mean over `n` prompts with the bounds of its confidence interval, and its standard error over the prompts."""

    mean: float
    low: float
    high: float
    n: int
    standard_error: float | None  # None of a single prompt


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> MeanInterval:
    """Mean with its percentile bootstrap interval over prompts.

    Args:
        values (`Sequence[float]`): one number a prompt (the mean over its sampling seeds), so that prompts are the
            unit of resampling and several samples of one prompt do not count as independent.
        confidence (`float`, *optional*, defaults to `0.95`): probability mass of the interval.
        resamples (`int`, *optional*, defaults to `10_000`): number of resampled means.
        seed (`int`, *optional*, defaults to `0`): seed of the resampling.

    Raises:
        ValueError: if `values` is empty.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        raise ValueError("bootstrap_interval needs at least one value.")
    tail = (1 - confidence) / 2
    low, high = np.quantile(bootstrap_means(array, resamples, seed), [tail, 1 - tail])
    error = float(array.std(ddof=1)) / math.sqrt(array.size) if array.size > 1 else None
    return MeanInterval(float(array.mean()), float(low), float(high), int(array.size), error)


def bootstrap_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Means of resampled rows: `(N, ...) -> (resamples, ...)`, each of N rows drawn with replacement."""
    generator = np.random.default_rng(seed)
    # in blocks that fit in the cache, so that memory does not grow with the number of prompts
    return np.concatenate(
        [
            values[generator.integers(len(values), size=(block, len(values)))].mean(axis=1)
            for block in _blocks(resamples, max(1, 2**18 // values.size))
        ]
    )


def paired_bootstrap(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """Mean difference `values - baseline` over the same prompts with its bootstrap interval.

    Args:
        values, baseline (`Sequence[float]`): one number a prompt, in the same order.
        confidence, resamples, seed: see [`bootstrap_interval`].

    Raises:
        ValueError: if the two have different lengths.
    """
    if len(values) != len(baseline):
        raise ValueError(f"paired_bootstrap needs the same prompts: got {len(values)} values and {len(baseline)}.")
    differences = (np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)).tolist()
    return bootstrap_interval(differences, confidence=confidence, resamples=resamples, seed=seed)


def bootstrap_ratio(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """100 * sum(values) / sum(baseline) over the same prompts with its percentile bootstrap interval.

    Both sums are of the same resampled prompts. The standard error is that of the linearised ratio (delta method).

    Args:
        values, baseline (`Sequence[float]`): one number a prompt, in the same order; those of `baseline` positive.
        confidence, resamples, seed: see [`bootstrap_interval`].

    Returns:
        [`MeanInterval`], whose `mean` is the ratio in percent.

    Raises:
        ValueError: if there are no values, the two have different lengths, or `baseline` has one that is not positive.
    """
    if len(values) != len(baseline) or not len(values):
        raise ValueError(f"bootstrap_ratio needs the same prompts: got {len(values)} values and {len(baseline)}.")
    pairs = np.asarray([values, baseline], dtype=np.float64).T
    if pairs[:, 1].min() <= 0:
        raise ValueError(f"bootstrap_ratio needs a positive baseline, got {pairs[:, 1].min()}.")
    means = bootstrap_means(pairs, resamples, seed)
    tail = (1 - confidence) / 2
    low, high = np.quantile(100 * means[:, 0] / means[:, 1], [tail, 1 - tail])
    mean, baseline_mean = pairs.mean(axis=0)
    ratio, error = mean / baseline_mean, None
    if len(pairs) > 1:
        residuals = pairs[:, 0] - ratio * pairs[:, 1]
        error = float(100 * residuals.std(ddof=1) / math.sqrt(len(pairs)) / baseline_mean)
    return MeanInterval(float(100 * ratio), float(low), float(high), len(pairs), error)


def sign_flip_test(
    values: Sequence[float], baseline: Sequence[float], *, resamples: int = 10_000, seed: int = 0
) -> float:
    r"""Two-sided p-value that the mean of `values - baseline` over the same prompts is 0.

    If the two models do not differ on a prompt, its difference is as likely to have the other sign. The p-value is the
    share of all $2^n$ ways to choose the signs whose mean is at least as far from 0 as the one observed (Fisher's
    permutation test for pairs). If there are more ways than `resamples`, it is estimated from as many random ones
    and the one observed, $(1 + \#\{|m_b| \ge |m|\}) / (1 + B)$, which is never below $1 / (1 + B)$ and keeps the
    level of the test.

    Args:
        values, baseline (`Sequence[float]`): one number a prompt, in the same order.
        resamples (`int`, *optional*, defaults to `10_000`): number of random choices of the signs, B.
        seed (`int`, *optional*, defaults to `0`): seed of the choices.

    Raises:
        ValueError: if the two have different lengths, or none.
    """
    if len(values) != len(baseline) or len(values) == 0:
        raise ValueError(f"sign_flip_test needs the same prompts: got {len(values)} values and {len(baseline)}.")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    n, total = differences.size, differences.sum()
    # sums that are equal on paper, as those of counts often are, differ by rounding
    threshold = abs(total) - 1e-9 * np.abs(differences).sum()
    if 2**n <= resamples:
        flipped = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs(total - 2 * flipped @ differences) >= threshold))
    generator, extreme = np.random.default_rng(seed), 0
    for block in _blocks(resamples, max(1, 2**18 // n)):
        random_bytes = np.frombuffer(generator.bytes(block * (-(-n // 8))), dtype=np.uint8).reshape(block, -1)
        flipped = np.unpackbits(random_bytes, axis=1, count=n).astype(np.float64)
        extreme += int(np.count_nonzero(np.abs(total - 2 * flipped @ differences) >= threshold))
    return (1 + extreme) / (1 + resamples)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    r"""P-values of several tests, corrected for their number (Holm 1979).

    With $p_{(1)} \le \dots \le p_{(m)}$, the i-th becomes $\max_{j \le i} \min(1, (m - j + 1) p_{(j)})$. Where those
    of at most 0.05 are taken for real, one of the true null hypotheses or more is rejected with a probability of at
    most 5 %, however the tests depend on each other.

    Args:
        p_values (`Sequence[float]`): in any order.

    Returns:
        `list[float]` in the same order.
    """
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected


def _blocks(total: int, size: int) -> list[int]:
    return [min(size, total - start) for start in range(0, total, size)]
