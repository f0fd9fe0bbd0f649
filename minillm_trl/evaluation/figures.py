"""Build the figures of a comparison."""

import math
from collections.abc import Mapping, Sequence

from .comparison_tables import COLUMNS
from .plots import Curve, Intervals, Plot, Reliability
from .results import Bucket, EvaluatedModel, TaskResult, results_of
from .training_history import EVALUATED

_TRAINING = dict(
    zip(
        EVALUATED,
        (("Rouge-L", "Rouge-L"), ("Reverse KL", "nats per completion"), ("Length", "tokens")),
        strict=True,
    )
)


def task_overview(models: Sequence[EvaluatedModel], tasks: Sequence[str]) -> list[Plot]:
    """Return plots of Rouge-L and of classification accuracy, by task and model."""
    names = [model.name for model in models]
    plots: list[Plot] = []
    for key in ("rouge_l", "accuracy"):
        measured = [
            task for task in tasks if any(key in result.summary for result in results_of(models, task).values())
        ]
        if not measured:
            continue
        series = {
            model.name: [model.tasks[task].summary.get(key) if task in model.tasks else None for task in measured]
            for model in models
        }
        label = COLUMNS[key].label
        plots.append(Intervals(f"{label} by task", label, measured, series, names))
    return plots


def task_figures(task: str, results: Mapping[str, TaskResult], names: Sequence[str]) -> list[Plot]:
    """Return plots of one task: Rouge-L by reference length, exposure bias, and calibration of each model.

    Args:
        task (`str`): its name.
        results (`Mapping[str, TaskResult]`): results by model.
        names (`Sequence[str]`): all models of the report, which fixes their colours.
    """
    plots: list[Plot] = []
    buckets = next(iter(results.values())).buckets
    filled = [number for number, bucket in enumerate(buckets) if bucket.prompts]
    if filled and any("rouge_l" in result.summary for result in results.values()):
        series = {
            name: [
                result.summary.get("rouge_l"),
                *(result.buckets[number].summary.get("rouge_l") for number in filled),
            ]
            for name, result in results.items()
        }
        categories = ["all", *(_bucket_label(buckets[number]) for number in filled)]
        title = f"{task}: Rouge-L by length of the reference"
        plots.append(Intervals(title, "Rouge-L", categories, series, names))
    exposed = {name: result.excess_error for name, result in results.items() if result.excess_error is not None}
    if exposed:
        curves = {
            name: (
                [float(position) for position in range(1, len(errors) + 1)],
                [math.nan if error is None else error for error in errors],
            )
            for name, errors in exposed.items()
        }
        title = f"{task}: excess accumulated error"
        plots.append(Curve(title, "position in the completion (tokens)", "ExAccErr (%)", curves, order=names))
    for name, result in results.items():
        if result.calibration is not None:
            title = f"{task}: {name}, ECE {result.calibration.ece:.3f}"
            plots.append(Reliability(title, result.calibration.bins, name, names))
    return plots


def _bucket_label(bucket: Bucket) -> str:
    tokens = f"{bucket.low} or more" if bucket.high is None else f"{bucket.low}–{bucket.high}"
    return f"{tokens} tokens\n(n = {bucket.prompts})"


def training_curves(histories: Mapping[str, Mapping[str, Mapping[int, float]]], names: Sequence[str]) -> list[Plot]:
    """Return plots of Rouge-L, reverse KL and length on validation prompts over the optimizer steps.

    Args:
        histories (`Mapping[str, Mapping[str, Mapping[int, float]]]`): result of
            [`~evaluation.training_history.read_history`] by model.
        names (`Sequence[str]`): all models of the report, which fixes their colours.
    """
    plots: list[Plot] = []
    for key, (title, label) in _TRAINING.items():
        series = {
            name: ([float(step) for step in history[key]], list(history[key].values()))
            for name, history in histories.items()
            if key in history
        }
        if series:
            plots.append(Curve(f"{title} on validation prompts", "optimizer step", label, series, order=names))
    return plots
