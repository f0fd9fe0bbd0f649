"""Means and intervals over prompts and training seeds, at one decoding and at equal entropy.

The bootstrap draws training seeds and prompts, both with replacement. Row 0 of every array of replicates is the sample
itself. The same draws serve all methods, so that differences are paired by training seed and prompt.
"""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np

REPLICATES = 2000


class Frontier:
    """Results of one method: `values[decoding][measure]` of shape `(seeds, prompts)`.

    Args:
        tests: for each training seed the values of the prompts, by decoding and measure. Measures that one of them
            lacks are left out.
        temperatures: the decodings that are temperatures.
        entropies: where [`at_entropies`] compares, in nats a token.
    """

    def __init__(self, tests: list[dict[str, Any]], temperatures: Sequence[str], entropies: np.ndarray):
        self.temperatures, self.entropies = temperatures, entropies
        self.values = {
            decoding: {
                name: np.array([test[decoding][name] for test in tests])
                for name in values
                if all(name in test[decoding] for test in tests)
            }
            for decoding, values in tests[0].items()
        }
        self.seeds, self.prompts = self.values[temperatures[0]]["rouge_l"].shape
        self._at_entropies: dict[str, np.ndarray] = {}

    def replicates(self, decoding: str, measure: str) -> np.ndarray:
        """Return the mean of every training seed, `(replicates + 1, seeds)`; the first row is the sample itself."""
        return prompt_weights(self.prompts) @ self.values[decoding][measure].T

    def at_entropies(self, measure: str) -> np.ndarray:
        """Return the mean over the entropies of the interpolated measure, `(replicates + 1, seeds)`.

        Beyond the temperatures tried, the value of the nearest one counts.
        """
        if measure not in self._at_entropies:
            self._at_entropies[measure] = self._interpolate(measure)
        return self._at_entropies[measure]

    def _interpolate(self, measure: str) -> np.ndarray:
        entropies, values = (
            np.stack([self.replicates(temperature, name) for temperature in self.temperatures], axis=-1)
            for name in ("entropy_per_token", measure)
        )
        found = np.empty(entropies.shape[:2])
        for index in np.ndindex(found.shape):
            order = np.argsort(entropies[index])
            found[index] = np.interp(self.entropies, entropies[index][order], values[index][order]).mean()
        return found


@cache
def prompt_weights(prompts: int) -> np.ndarray:
    """Return weights of the prompts, `(replicates + 1, prompts)`: equal in the first row, else drawn."""
    draws = np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), size=REPLICATES)
    return np.concatenate([np.full((1, prompts), 1 / prompts), draws / prompts])


def interval(by_seed: np.ndarray) -> list[float]:
    """Return mean and 95 % interval over prompts and training seeds of `(replicates + 1, seeds)`."""
    replicates, seeds = by_seed.shape
    drawn = np.random.default_rng(1).integers(seeds, size=(replicates, seeds))
    means = np.take_along_axis(by_seed, drawn, axis=1).mean(axis=1)[1:]
    return [float(by_seed[0].mean()), *np.percentile(means, (2.5, 97.5)).tolist()]


def difference(first: np.ndarray, second: np.ndarray) -> list[float]:
    """Return the interval of a difference paired by training seed; one training seed goes with each of several."""
    return interval(first - second)
