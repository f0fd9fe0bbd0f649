"""Intervals and tests over prompts: bootstrap, sign-flip test and Holm's correction, as pure functions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class MeanInterval(NamedTuple):
    """A mean over `n` prompts with its confidence interval and its standard error."""

    mean: float
    low: float
    high: float
    n: int
    standard_error: float | None  # None for a single prompt


def bootstrap_interval(
    values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> MeanInterval:
    """Return the mean with its percentile bootstrap interval over prompts.

    Args:
        values (`Sequence[float]`): one number per prompt: the mean over its sampling seeds. Prompts are the unit of
            resampling, because samples for the same prompt are not independent.
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
    """Return the means of bootstrap resamples, `(N, ...) -> (resamples, ...)`: N rows drawn with replacement."""
    generator = np.random.default_rng(seed)
    # Blocks fit in the cache, and memory does not grow with the number of prompts
    return np.concatenate(
        [
            values[generator.integers(len(values), size=(block, len(values)))].mean(axis=1)
            for block in _blocks(resamples, max(1, 2**18 // values.size))
        ]
    )


def bootstrap_column_means(values: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Return the means of bootstrap resamples of many columns, `(N, K) -> (resamples, K)`, in less time.

    A seed draws the same rows as in [`bootstrap_means`], so calls with one seed are paired. Each column is multiplied
    by how often a resample draws each row.
    """
    generator, rows = np.random.default_rng(seed), len(values)
    means = []
    for block in _blocks(resamples, max(1, 2**20 // rows)):
        drawn = generator.integers(rows, size=(block, rows)) + rows * np.arange(block)[:, None]
        counts = np.bincount(drawn.ravel(), minlength=block * rows).reshape(block, rows)
        means.append(counts.astype(np.float64) @ values / rows)
    return np.concatenate(means)


def paired_bootstrap(
    values: Sequence[float],
    baseline: Sequence[float],
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """Return the mean difference `values - baseline` over the same prompts with its bootstrap interval.

    Args:
        values, baseline (`Sequence[float]`): one number per prompt, in the same order.
        confidence, resamples, seed: see [`bootstrap_interval`].

    Raises:
        ValueError: if `values` and `baseline` have different lengths or are empty.
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
    """Return 100 * sum(values) / sum(baseline) over the same prompts with its percentile bootstrap interval.

    A resample draws the same prompts for both sums. The standard error comes from the linearised ratio (delta method).

    Args:
        values, baseline (`Sequence[float]`): one number per prompt, in the same order; `baseline` is positive.
        confidence, resamples, seed: see [`bootstrap_interval`].

    Returns:
        [`MeanInterval`], whose `mean` is the ratio in percent.

    Raises:
        ValueError: if `values` and `baseline` have different lengths or are empty, or `baseline` is not positive.
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
    r"""Return the two-sided p-value of the hypothesis that the mean of `values - baseline` over the same prompts is 0.

    Under the hypothesis, both signs of a prompt's difference are equally likely. The p-value is the share of all $2^n$
    sign choices whose mean is at least as far from 0 as the observed mean (Fisher's paired permutation test). With
    more choices than `resamples`, it is estimated from B random choices and the observed one,
    $(1 + \#\{|m_b| \ge |m|\}) / (1 + B)$, which is at least $1 / (1 + B)$ and keeps the level of the test.

    Args:
        values, baseline (`Sequence[float]`): one number per prompt, in the same order.
        resamples (`int`, *optional*, defaults to `10_000`): number of random sign choices, B.
        seed (`int`, *optional*, defaults to `0`): seed of the choices.

    Raises:
        ValueError: if `values` and `baseline` have different lengths or are empty.
    """
    if len(values) != len(baseline) or len(values) == 0:
        raise ValueError(f"sign_flip_test needs the same prompts: got {len(values)} values and {len(baseline)}.")
    differences = np.asarray(values, dtype=np.float64) - np.asarray(baseline, dtype=np.float64)
    n, total = differences.size, differences.sum()
    # Sums that are equal in exact arithmetic, as sums of counts often are, may differ by rounding
    threshold = abs(total) - 1e-9 * np.abs(differences).sum()
    if 2**n <= resamples:
        # Bit i of a row's number says whether difference i flips its sign, which changes the sum by -2 d_i
        flipped = (np.arange(2**n)[:, None] >> np.arange(n)) & 1
        return float(np.mean(np.abs(total - 2 * flipped @ differences) >= threshold))
    generator, extreme = np.random.default_rng(seed), 0
    for block in _blocks(resamples, max(1, 2**18 // n)):
        random_bytes = np.frombuffer(generator.bytes(block * (-(-n // 8))), dtype=np.uint8).reshape(block, -1)
        flipped = np.unpackbits(random_bytes, axis=1, count=n).astype(np.float64)
        extreme += int(np.count_nonzero(np.abs(total - 2 * flipped @ differences) >= threshold))
    return (1 + extreme) / (1 + resamples)


def holm_correction(p_values: Sequence[float]) -> list[float]:
    r"""Return p-values corrected for the number of tests (Holm 1979).

    With $p_{(1)} \le \dots \le p_{(m)}$, the i-th becomes $\max_{j \le i} \min(1, (m - j + 1) p_{(j)})$. Rejecting
    at a corrected p of at most 0.05 rejects any true null hypothesis with a probability of at most 5 %, for any
    dependence between the tests.

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
