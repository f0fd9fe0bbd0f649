r"""Compare models at equal entropy: curves of a measure over the entropy of the sampling distribution.

A lower temperature makes any model sharper, and a sharper model scores a higher Rouge-L. Two models at temperature 1
therefore differ in sharpness as well as in quality. Each decoding of a model gives one point: the entropy H of its
distribution and a measure V, both means over prompts. The curve between the points is linear, and two models are
compared where their curves have the same entropy:

$$ \Delta(h) = V_{\text{model}}(h) - V_{\text{baseline}}(h) $$
"""

from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from .statistics import MeanInterval, bootstrap_column_means

_GRID = 101  # entropies of the mean over the shared range
_ROUNDING = 1e-9  # nats per token; an end of a range may have been averaged in another order


@dataclass(frozen=True)
class FrontierCurve:
    """One measure of one model at several decodings of the same prompts.

    Attributes:
        entropies (`np.ndarray` of shape `(D, N)`): entropy in nats per token, for D decodings and N prompts; a row of
            zeros for greedy decoding. The order of the decodings does not matter.
        values (`np.ndarray` of shape `(D, N)`): the measure.

    Raises:
        ValueError: if the shapes differ, there are no decodings or prompts, or a number is not finite.
    """

    entropies: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        for name in ("entropies", "values"):
            object.__setattr__(self, name, np.asarray(getattr(self, name), dtype=np.float64))
        if self.entropies.ndim != 2 or self.entropies.shape != self.values.shape or not self.values.size:
            raise ValueError(
                "A FrontierCurve needs entropies and values of the same shape (decodings, prompts), got "
                f"{self.entropies.shape} and {self.values.shape}."
            )
        if not (np.isfinite(self.entropies).all() and np.isfinite(self.values).all()):
            raise ValueError("A FrontierCurve needs finite entropies and values.")


def entropy_range(curve: FrontierCurve) -> tuple[float, float]:
    """Return the lowest and the highest entropy of the curve, means over prompts."""
    means = curve.entropies.mean(axis=1)
    return float(means.min()), float(means.max())


def shared_entropies(curve: FrontierCurve, other: FrontierCurve) -> tuple[float, float] | None:
    """Return the range of entropies that both curves cover; None if it is empty or a single entropy."""
    (low, high), (other_low, other_high) = entropy_range(curve), entropy_range(other)
    low, high = max(low, other_low), min(high, other_high)
    return (low, high) if low < high else None


def value_at_entropy(curve: FrontierCurve, at: float) -> float:
    r"""Return the curve's mean value at an entropy.

    With neighbouring decodings of entropies $H_0 \le h \le H_1$ and mean values $V_0$, $V_1$:

    $$ V(h) = V_0 + \frac{h - H_0}{H_1 - H_0} (V_1 - V_0) $$

    Args:
        curve ([`FrontierCurve`]): the curve.
        at (`float`): entropy h, in nats per token.

    Raises:
        ValueError: if the curve has no decodings on both sides of `at`, or only one decoding.
    """
    _check_covered(curve, at, "the curve")
    return float(_interpolate(*_means(curve), np.array([at]))[0, 0])


def mean_over_entropies(curve: FrontierCurve, low: float, high: float) -> float:
    r"""Return the curve's mean value over a range of entropies, $\frac{1}{b - a} \int_a^b V(h)\,dh$.

    Args:
        curve ([`FrontierCurve`]): the curve.
        low, high (`float`): the range, a < b, in nats per token. The integral is the trapezoidal rule on a grid of 101
            entropies.

    Raises:
        ValueError: if the range is empty, or the curve does not cover it.
    """
    if not low < high:
        raise UserError(f"The range of entropies is empty: {low:g} to {high:g}. Give two different ends, low first.")
    for at in (low, high):
        _check_covered(curve, at, "the curve")
    return float(_integrate(*_means(curve), np.linspace(low, high, _GRID))[0])


def equal_entropy_difference(
    curve: FrontierCurve,
    baseline: FrontierCurve,
    at: float,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """Return the difference `curve - baseline` at an entropy with its paired bootstrap interval.

    A resample draws prompts with replacement, the same for both models, and takes entropies and values of all their
    decodings from these prompts. So the interval covers the uncertainty of the entropies too, and what makes a prompt
    hard for both models cancels. Where a resample's curve ends before `at`, its last segment is continued.

    Args:
        curve, baseline ([`FrontierCurve`]): the models, on the same prompts in the same order. They may have different
            decodings.
        at (`float`): entropy in nats per token, the same in all resamples.
        confidence, resamples, seed: see [`~evaluation.statistics.bootstrap_interval`].

    Returns:
        [`MeanInterval`], whose `standard_error` is the standard deviation of the resampled differences.

    Raises:
        ValueError: if the curves have different numbers of prompts, or one does not cover `at`.
    """
    _check_covered(curve, at, "the model")
    _check_covered(baseline, at, "the baseline")
    return _difference(curve, baseline, np.array([at]), confidence, resamples, seed)


def mean_equal_entropy_difference(
    curve: FrontierCurve,
    baseline: FrontierCurve,
    *,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> MeanInterval:
    """Return the mean of `curve - baseline` over the entropies that both cover, with its paired bootstrap interval.

    Args:
        curve, baseline, confidence, resamples, seed: see [`equal_entropy_difference`]. The range is that of
            [`shared_entropies`], the same in all resamples.

    Returns:
        [`MeanInterval`], see [`equal_entropy_difference`].

    Raises:
        ValueError: if the curves have different numbers of prompts, or share no range of entropies.
    """
    shared = shared_entropies(curve, baseline)
    if shared is None:
        ranges = " and ".join("{:.3g} to {:.3g}".format(*entropy_range(one)) for one in (curve, baseline))
        raise UserError(
            f"The curves share no range of entropies: {ranges} nats per token. Evaluate both at more --temperatures."
        )
    return _difference(curve, baseline, np.linspace(*shared, _GRID), confidence, resamples, seed)


def covers(curve: FrontierCurve, at: float) -> bool:
    """Return whether an entropy is within the range of a curve of at least two decodings."""
    low, high = entropy_range(curve)
    return len(curve.values) > 1 and low - _ROUNDING <= at <= high + _ROUNDING


def _check_covered(curve: FrontierCurve, at: float, name: str) -> None:
    if not covers(curve, at):
        low, high = entropy_range(curve)
        raise UserError(
            f"Entropy {at:.3g} is outside the range of {name}, {low:.3g} to {high:.3g} nats per token at "
            f"{len(curve.values)} temperatures. Choose an entropy within it, or evaluate at more --temperatures."
        )


def _difference(
    curve: FrontierCurve, baseline: FrontierCurve, grid: np.ndarray, confidence: float, resamples: int, seed: int
) -> MeanInterval:
    """Return the difference, averaged over the grid, with its interval."""
    prompts = curve.values.shape[1]
    if prompts != baseline.values.shape[1]:
        raise ValueError(
            f"Differences need the same prompts: the curves have {prompts} and {baseline.values.shape[1]}."
        )
    # One seed draws the same prompts for both models
    resampled = [_integrate(*_resampled_means(one, resamples, seed), grid) for one in (curve, baseline)]
    differences = resampled[0] - resampled[1]
    mean = float((_integrate(*_means(curve), grid) - _integrate(*_means(baseline), grid))[0])
    tail = (1 - confidence) / 2
    low, high = np.quantile(differences, [tail, 1 - tail])
    error = float(differences.std(ddof=1)) if prompts > 1 else None
    return MeanInterval(mean, float(low), float(high), prompts, error)


def _means(curve: FrontierCurve) -> tuple[np.ndarray, np.ndarray]:
    """Return mean entropies and values over prompts, `(1, D)` each."""
    return curve.entropies.mean(axis=1)[None], curve.values.mean(axis=1)[None]


def _resampled_means(curve: FrontierCurve, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Return mean entropies and values of resampled prompts, `(resamples, D)` each."""
    columns = np.concatenate([curve.entropies, curve.values]).T
    means = bootstrap_column_means(columns, resamples, seed)
    return means[:, : len(curve.entropies)], means[:, len(curve.entropies) :]


def _integrate(entropies: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return the mean of each curve over the grid, `(R, D), (R, D), (G,) -> (R,)`: its value if G is 1."""
    points = _interpolate(entropies, values, grid)
    if len(grid) == 1:
        return points[:, 0]
    return np.trapezoid(points, grid, axis=1) / (grid[-1] - grid[0])


def _interpolate(entropies: np.ndarray, values: np.ndarray, grid: np.ndarray) -> np.ndarray:
    """Return piecewise-linear curves at the grid, `(R, D), (R, D), (G,) -> (R, G)`; the end segments continue.

    The points of each curve are sorted by entropy, which is the order of their temperatures except for noise. At an
    entropy of several points the curve has the highest of their values.
    """
    order = np.lexsort((values, entropies), axis=1)
    x, y = np.take_along_axis(entropies, order, axis=1), np.take_along_axis(values, order, axis=1)
    right = np.clip((x[:, None, :] <= grid[:, None]).sum(axis=2), 1, x.shape[1] - 1)
    (x0, x1), (y0, y1) = (
        (np.take_along_axis(points, right - 1, axis=1), np.take_along_axis(points, right, axis=1)) for points in (x, y)
    )
    width = x1 - x0
    share = np.divide(grid - x0, width, out=np.ones_like(width), where=width > 0)
    return y0 + share * (y1 - y0)
