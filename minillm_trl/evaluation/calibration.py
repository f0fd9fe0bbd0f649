"""Calibration of a classifier: how well its confidence matches its accuracy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .statistics import MeanInterval, bootstrap_interval, bootstrap_means


class CalibrationBin(NamedTuple):
    """Predictions with a confidence in (low, high]: number, mean confidence and accuracy (None for an empty bin)."""

    low: float
    high: float
    count: int  # type: ignore[assignment]  # shadows tuple.count; the name is in results.json
    confidence: float | None
    accuracy: float | None


class Calibration(NamedTuple):
    """Expected calibration error with its interval, accuracy and bins.

    Attributes:
        ece (`float`): expected calibration error, in [0, 1].
        low, high (`float`): bounds of its 95 % bootstrap interval over prompts.
        accuracy ([`MeanInterval`]): share of correct predictions.
        bins (`list[CalibrationBin]`): all bins, including empty ones.
    """

    ece: float
    low: float
    high: float
    accuracy: MeanInterval
    bins: list[CalibrationBin]


def calibration(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 10, *, resamples: int = 10_000, seed: int = 0
) -> Calibration:
    r"""Return the expected calibration error: the gap between confidence and accuracy, averaged over predictions.

    $$ \mathrm{ECE} = \sum_b \frac{n_b}{N} \,\big|\, \mathrm{acc}_b - \mathrm{conf}_b \,\big| $$

    over bins of equal width on (0, 1]. A bin includes its upper edge and excludes its lower edge: with 10 bins a
    confidence of 0.7 lies in (0.6, 0.7], and 1 in the last bin.

    Sampling noise biases the ECE upwards, and resampling adds the same bias again. The basic bootstrap interval,
    [2 ECE - upper, 2 ECE - lower] with the quantiles of the resampled ECE, removes it; a percentile interval would
    exclude the true 0 of a calibrated model. The interval is clipped at 0.

    Args:
        confidences (`Sequence[float]`): probability of the predicted label for each prediction, in (0, 1].
        correct (`Sequence[bool]`): whether each prediction is right.
        bins (`int`, *optional*, defaults to `10`): number of bins.
        resamples (`int`, *optional*, defaults to `10_000`): number of bootstrap resamples.
        seed (`int`, *optional*, defaults to `0`): seed of the resampling.

    Raises:
        ValueError: if there are no predictions, the lists differ in length, a confidence is outside (0, 1], or `bins`
            is less than 1.
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
    edges = np.arange(bins + 1) / bins
    members = np.searchsorted(edges[1:], confidence, side="left")[:, None] == np.arange(bins)  # (N, bins)
    # ECE = sum over bins of |mean of the column|, so resampling rows of `gaps` resamples predictions
    gaps = members * (right - confidence)[:, None]
    ece = float(np.abs(gaps.mean(axis=0)).sum())
    resampled = np.abs(bootstrap_means(gaps, resamples, seed)).sum(axis=1)
    lower, upper = np.quantile(resampled, [0.025, 0.975])
    filled_bins = []
    for number, inside in enumerate(members.T):
        means = (float(values[inside].mean()) if inside.any() else None for values in (confidence, right))
        filled_bins.append(CalibrationBin(float(edges[number]), float(edges[number + 1]), int(inside.sum()), *means))
    accuracy = bootstrap_interval(right.tolist(), resamples=resamples, seed=seed)
    low, high = max(0.0, 2 * ece - float(upper)), max(0.0, 2 * ece - float(lower))
    return Calibration(ece, low, high, accuracy, filled_bins)
