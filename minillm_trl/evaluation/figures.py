"""The figures of a comparison, made from the results."""

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
    """Rouge-L, and accuracy of classifications, by task and model."""
    names = [model.name for model in models]
    plots: list[Plot] = []
    for key in ("rouge_l", "accuracy"):
        measured = [task for task in tasks if any(key in each.summary for each in results_of(models, task).values())]
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
    """What shows more of one task than its tables: lengths of references, exposure bias, calibration.

    Args:
        task (`str`): its name.
        results (`Mapping[str, TaskResult]`): of the task by model.
        names (`Sequence[str]`): of all models of the report.
    """
    plots: list[Plot] = []
    buckets = next(iter(results.values())).buckets
    filled = [number for number, bucket in enumerate(buckets) if bucket.prompts]
    if filled and any("rouge_l" in each.summary for each in results.values()):
        series = {
            name: [each.summary.get("rouge_l"), *(each.buckets[number].summary.get("rouge_l") for number in filled)]
            for name, each in results.items()
        }
        categories = ["all", *(_bucket_label(buckets[number]) for number in filled)]
        title = f"{task}: Rouge-L by length of the reference"
        plots.append(Intervals(title, "Rouge-L", categories, series, names))
    exposed = {name: each.excess_error for name, each in results.items() if each.excess_error is not None}
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
    for name, each in results.items():
        if each.calibration is not None:
            title = f"{task}: {name}, ECE {each.calibration.ece:.3f}"
            plots.append(Reliability(title, each.calibration.bins, name, names))
    return plots


def _bucket_label(bucket: Bucket) -> str:
    tokens = f"{bucket.low} or more" if bucket.high is None else f"{bucket.low}–{bucket.high}"
    return f"{tokens} tokens\n(n = {bucket.prompts})"


def training_curves(histories: Mapping[str, Mapping[str, Mapping[int, float]]], names: Sequence[str]) -> list[Plot]:
    """Rouge-L, reverse KL and length on validation prompts over the steps of each training.

    Args:
        histories (`Mapping[str, Mapping[str, Mapping[int, float]]]`): what
            [`~evaluation.training_history.read_history`] returns, by model.
        names (`Sequence[str]`): of all models of the report.
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
