"""Differences between models and a baseline, paired by prompt."""

from collections.abc import Mapping
from typing import NamedTuple

from .metrics import MeanInterval, holm_correction, paired_bootstrap, sign_flip_test
from .results import TaskResult

LEVEL = 0.05


class Difference(NamedTuple):
    """A model's mean minus the baseline's over the same prompts.

    Attributes:
        interval ([`MeanInterval`]): with its 95 % bootstrap interval.
        p (`float`): two-sided, of [`~evaluation.metrics.sign_flip_test`].
        p_holm (`float`): the same, corrected for the number of models that are compared with the baseline.
    """

    interval: MeanInterval
    p: float
    p_holm: float

    @property
    def is_significant(self) -> bool:
        return self.p_holm <= LEVEL


def paired_differences(results: Mapping[str, TaskResult], baseline: str) -> dict[str, dict[str, Difference]]:
    """The differences of all other models to the baseline on a task, in every measure that both have.

    Args:
        results (`Mapping[str, TaskResult]`): of the task by model, on the same prompts.
        baseline (`str`): name of one of the models.

    Returns:
        `dict[str, dict[str, Difference]]`: by measure, then by model. P-values are corrected among the models of a
        measure.
    """
    differences = {}
    for measure in results[baseline].summary:
        if any(measure not in row for row in results[baseline].per_prompt):  # no mean over all prompts
            continue
        pairs = {
            name: [[row[measure] for row in each.per_prompt] for each in (result, results[baseline])]
            for name, result in results.items()
            if name != baseline and all(measure in row for row in result.per_prompt)
        }
        p_values = [sign_flip_test(*pair) for pair in pairs.values()]
        differences[measure] = {
            name: Difference(paired_bootstrap(*pair), p, p_holm)
            for (name, pair), p, p_holm in zip(pairs.items(), p_values, holm_correction(p_values), strict=True)
        }
    return differences
