"""From results at several temperatures: the chosen temperature, curves, and differences at equal entropy."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from .decodings import PAPER, Decoding
from .frontier import (
    FrontierCurve,
    covers,
    equal_entropy_difference,
    mean_equal_entropy_difference,
    mean_over_entropies,
    shared_entropies,
    value_at_entropy,
)
from .results import DecodingResults, TaskResult
from .statistics import MeanInterval

ENTROPY = "entropy_per_token"


class EqualEntropyDifference(NamedTuple):
    """A model's measure minus the baseline's at the same entropies, over the same prompts.

    Attributes:
        at (`float`): the entropy of the comparison, in nats per token.
        value (`float`, *optional*): the model's measure there; None if one of the curves does not reach it.
        difference ([`MeanInterval`], *optional*): difference there.
        shared (`tuple[float, float]`, *optional*): entropies that both curves cover; None if there are none.
        mean_value (`float`, *optional*): the model's mean over them.
        mean_difference ([`MeanInterval`], *optional*): mean difference over them.
    """

    at: float
    value: float | None
    difference: MeanInterval | None
    shared: tuple[float, float] | None
    mean_value: float | None
    mean_difference: MeanInterval | None


def chosen_decoding(results: DecodingResults) -> Decoding | None:
    """Return the temperature with the best main measure on the validation split, among those of both splits.

    Greedy decoding is no candidate: it is reported next to the chosen temperature. Between equals, the highest
    temperature is chosen. None without validation results.
    """
    means = {
        decoding: result.summary[result.main_measure].mean
        for decoding, result in results.validation.items()
        if decoding in results.test and decoding.temperature is not None and result.main_measure is not None
    }
    return max(means, key=lambda decoding: (means[decoding], decoding.temperature), default=None)


def entropies_of(decoding: Decoding, result: TaskResult) -> list[float] | None:
    """Return the entropy for each prompt, 0 for greedy decoding; None if it was not measured."""
    if decoding.temperature is None:
        return [0.0] * len(result.per_prompt)
    return [row[ENTROPY] for row in result.per_prompt] if ENTROPY in result.summary else None


def frontier_curve(results: DecodingResults, measure: str) -> FrontierCurve | None:
    """Return the curve of a measure over entropy on the test split; None if no decoding has both."""
    entropies, values = [], []
    for decoding, result in results.test.items():
        if measure in result.summary and (by_prompt := entropies_of(decoding, result)) is not None:
            entropies.append(by_prompt)
            values.append([row[measure] for row in result.per_prompt])
    return FrontierCurve(np.array(entropies), np.array(values)) if values else None


def compared_decoding(results: DecodingResults) -> Decoding:
    """Return the decoding whose entropy models are compared at: the chosen one, else temperature 1, else the first."""
    chosen = chosen_decoding(results)
    if chosen is not None:
        return chosen
    return PAPER if PAPER in results.test else next(iter(results.test))


def equal_entropy_differences(
    decodings: Mapping[str, DecodingResults], baseline: str | None, measures: tuple[str, ...]
) -> dict[str, dict[str, EqualEntropyDifference]]:
    """Return the differences of all other models from the baseline at equal entropy, by measure and model.

    Args:
        decodings (`Mapping[str, DecodingResults]`): results of one task by model, on the same prompts.
        baseline (`str`, *optional*): name of the baseline. Without it, or without its decodings, there are no
            differences.
        measures (`tuple[str, ...]`): the measures.
    """
    if baseline is None or baseline not in decodings:
        return {}
    decoding = compared_decoding(decodings[baseline])
    entropies = entropies_of(decoding, decodings[baseline].test[decoding])
    if entropies is None:
        return {}
    at = sum(entropies) / len(entropies)
    differences: dict[str, dict[str, EqualEntropyDifference]] = {}
    for measure in measures:
        curves = {name: frontier_curve(results, measure) for name, results in decodings.items()}
        reference = curves.pop(baseline)
        compared = {name: curve for name, curve in curves.items() if curve is not None}
        if reference is not None and compared:
            differences[measure] = {name: _difference(curve, reference, at) for name, curve in compared.items()}
    return differences


def _difference(curve: FrontierCurve, baseline: FrontierCurve, at: float) -> EqualEntropyDifference:
    value = difference = mean_value = mean_difference = None
    if covers(curve, at) and covers(baseline, at):
        value, difference = value_at_entropy(curve, at), equal_entropy_difference(curve, baseline, at)
    shared = shared_entropies(curve, baseline)
    if shared is not None:
        mean_value = mean_over_entropies(curve, *shared)
        mean_difference = mean_equal_entropy_difference(curve, baseline)
    return EqualEntropyDifference(at, value, difference, shared, mean_value, mean_difference)
