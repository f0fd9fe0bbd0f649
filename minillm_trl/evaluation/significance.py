"""Test differences between models and a baseline, paired by prompt."""

from collections.abc import Mapping
from typing import NamedTuple

from .results import TaskResult
from .statistics import MeanInterval, holm_correction, paired_bootstrap, sign_flip_test

LEVEL = 0.05


class Difference(NamedTuple):
    """A model's mean minus the baseline's over the same prompts.

    Attributes:
        interval ([`MeanInterval`]): mean difference with its 95 % bootstrap interval.
        p (`float`): two-sided p-value from [`~evaluation.statistics.sign_flip_test`].
        p_holm (`float`): p corrected for the number of models compared with the baseline (Holm).
    """

    interval: MeanInterval
    p: float
    p_holm: float

    @property
    def is_significant(self) -> bool:
        return self.p_holm <= LEVEL


def paired_differences(results: Mapping[str, TaskResult], baseline: str) -> dict[str, dict[str, Difference]]:
    """Return the differences of all other models from the baseline, in every measure that both have.

    Args:
        results (`Mapping[str, TaskResult]`): results of a task by model, on the same prompts.
        baseline (`str`): name of one of the models.

    Returns:
        `dict[str, dict[str, Difference]]`: differences by measure, then by model. Holm's correction is over the
        models of a measure.
    """
    differences: dict[str, dict[str, Difference]] = {}
    for measure in results[baseline].summary:
        if any(measure not in row for row in results[baseline].per_prompt):  # not a mean over all prompts
            continue
        pairs = {
            name: [[row[measure] for row in task_result.per_prompt] for task_result in (result, results[baseline])]
            for name, result in results.items()
            if name != baseline and all(measure in row for row in result.per_prompt)
        }
        p_values = [sign_flip_test(*pair) for pair in pairs.values()]
        differences[measure] = {
            name: Difference(paired_bootstrap(*pair), p, p_holm)
            for (name, pair), p, p_holm in zip(pairs.items(), p_values, holm_correction(p_values), strict=True)
        }
    return differences
