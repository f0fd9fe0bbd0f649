"""How well a classifier's confidence fits its accuracy."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from .metrics import MeanInterval, bootstrap_interval, bootstrap_means


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
