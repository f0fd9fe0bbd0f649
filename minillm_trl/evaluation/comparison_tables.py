"""Build the tables of a comparison."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Literal

from .report import Cell, Column, Row, Table
from .results import EvaluatedModel, TaskResult, results_of
from .significance import LEVEL, Difference
from .statistics import MeanInterval

COLUMNS = {
    column.key: column
    for column in (
        Column("rouge_l", "Rouge-L", "higher"),
        Column("rouge_l_by_seed", "Rouge-L of the seeds", None),
        Column("best_rouge_l", "Rouge-L, best of the seeds", "higher"),
        Column("exact_match", "Exact match (%)", "higher"),
        Column("accuracy", "Accuracy (%)", "higher"),
        Column("confidence", "Confidence", None, 3),
        Column("ece", "ECE", "lower", 3),
        Column("loss", "Reference loss (nats/token)", "lower", 3),
        Column("reverse_kl", "Reverse KL (nats)", "lower"),
        Column("reverse_kl_per_token", "Reverse KL (nats/token)", "lower", 3),
        Column("forward_kl", "Forward KL (nats)", "lower"),
        Column("forward_kl_per_token", "Forward KL (nats/token)", "lower", 3),
        Column("excess_error", "ExAccErr at token {position} (%)", "lower"),
        Column("entropy_per_token", "Entropy (nats/token)", "teacher", 2),
        Column("length", "Length (tokens)", "teacher"),
        Column("eos_rate", "Ends by itself", "teacher", 2),
        Column("repeated_4grams", "Repeated 4-grams", "teacher", 3),
        Column("distinct_outputs", "Distinct outputs", "teacher", 2),
        Column("distinct_4grams", "Distinct 4-grams of a prompt", "teacher", 3),
        Column("corpus_distinct_4grams", "Distinct 4-grams of all", "teacher", 3),
        Column("self_bleu", "Self-BLEU", "teacher"),
    )
}
GROUPS = {
    "Quality": ("rouge_l", "rouge_l_by_seed", "best_rouge_l", "exact_match", "accuracy", "confidence", "ece", "loss"),
    "Closeness to the teacher": (
        "reverse_kl",
        "reverse_kl_per_token",
        "forward_kl",
        "forward_kl_per_token",
        "excess_error",
    ),
    "Length, repetition and diversity": (
        "entropy_per_token",
        "length",
        "eos_rate",
        "repeated_4grams",
        "distinct_outputs",
        "distinct_4grams",
        "corpus_distinct_4grams",
        "self_bleu",
    ),
}
_COMPARED = ("rouge_l", "exact_match", "accuracy", "reverse_kl", "loss")
_MARK = "*"
_BETTER: dict[bool | None, Literal["higher", "lower"] | None] = {True: "higher", False: "lower", None: None}

Differences = Mapping[str, Mapping[str, Difference]]


def overview(
    models: Sequence[EvaluatedModel],
    tasks: Sequence[str],
    teachers: set[str],
    differences: Mapping[str, Differences],
    baseline: str | None,
) -> Table:
    """Return the table of main measures, models by tasks, with marks for significant differences.

    Args:
        models, tasks: the rows and columns.
        teachers (`set[str]`): names of the teachers.
        differences (`Mapping[str, Differences]`): by task, measure and model.
        baseline (`str`, *optional*): name of the model that the others are compared with.
    """
    columns, shown = [], []
    for task in tasks:
        results = results_of(models, task)
        if key := next(filter(None, (result.main_measure for result in results.values())), None):
            known = columns_of(results)
            key = key if key in known else f"corpus_{key}"  # a measure without lm-eval's standard error
            columns.append((task, key))
            column = known[key]
            shown.append(replace(column, key=task, label=f"{task}: {column.label}"))
    rows = []
    for model in models:
        cells: dict[str, Cell] = {}
        marks = {}
        for task, key in columns:
            if task in model.tasks and (cell := measured(model.tasks[task], None).get(key)) is not None:
                cells[task] = cell
                marks[task] = _mark(differences.get(task, {}).get(key, {}).get(model.name))
        rows.append(Row(model.name, cells, model.name in teachers, marks))
    return Table(shown, rows, _note(baseline))


def task_tables(
    results: Mapping[str, TaskResult], teachers: set[str], differences: Differences, baseline: str | None
) -> dict[str, Table]:
    """Return the tables of one task by heading: quality, differences from the baseline, closeness, diversity.

    Args:
        results (`Mapping[str, TaskResult]`): results by model.
        teachers (`set[str]`): names of the teachers.
        differences (`Differences`): by measure and model; empty without a baseline.
        baseline (`str`, *optional*): name of the model that the others are compared with.
    """
    position, columns = common_position(results), columns_of(results)
    groups = GROUPS if columns is COLUMNS else {"Quality": tuple(columns)}
    tables = {heading: _group_table(results, keys, position, teachers) for heading, keys in groups.items()}
    if differences:
        difference = _difference_table(results, teachers, differences, baseline)
        tables = {"Quality": tables.pop("Quality"), f"Difference from {baseline}": difference, **tables}
    return {heading: table for heading, table in tables.items() if table.columns}


def columns_of(results: Mapping[str, TaskResult]) -> dict[str, Column]:
    """Return the columns of a task by measure: [`COLUMNS`], or all measures of a general benchmark."""
    first = next(iter(results.values()))
    if not first.is_benchmark:
        return COLUMNS
    columns = {}
    for key in dict.fromkeys(key for result in results.values() for key in measured(result, None)):
        name = key.removeprefix("corpus_")
        columns[key] = Column(key, name, _BETTER[first.settings["higher_is_better"].get(name)], 3)
    return columns


def _group_table(
    results: Mapping[str, TaskResult], keys: Sequence[str], position: int | None, teachers: set[str]
) -> Table:
    rows = []
    for name, result in results.items():
        cells: dict[str, Cell] = {**measured(result, position)}
        by_seed = result.by_seed.get("rouge_l", [])
        if len(by_seed) > 1:
            cells["rouge_l_by_seed"] = f"{min(by_seed):.1f}–{max(by_seed):.1f}"
        rows.append(Row(name, {key: cells[key] for key in keys if key in cells}, name in teachers))
    known = columns_of(results)
    columns = [
        replace(known[key], label=known[key].label.replace("{position}", str(position)))
        for key in keys
        if any(key in row.cells for row in rows)
    ]
    return Table(columns, rows)


def measured(result: TaskResult, position: int | None) -> dict[str, MeanInterval | float]:
    """Return all measures of a task: means over prompts, corpus measures, ECE and ExAccErr.

    Args:
        result ([`TaskResult`]): results of one model.
        position (`int`, *optional*): position of ExAccErr, see [`common_position`].
    """
    cells: dict[str, MeanInterval | float] = {
        **result.summary,
        **{f"corpus_{key}": value for key, value in result.corpus.items()},
    }
    if result.calibration is not None:
        cells["ece"] = result.calibration.ece
    if result.excess_error is not None and position is not None:
        error = result.excess_error[position - 1]
        if error is not None:
            cells["excess_error"] = error
    return cells


def common_position(results: Mapping[str, TaskResult]) -> int | None:
    """Return the last position at which all models have an accumulated error, counted from 1; None without any."""
    lengths = [len(result.excess_error) for result in results.values() if result.excess_error is not None]
    return min(lengths, default=None)


def _difference_table(
    results: Mapping[str, TaskResult], teachers: set[str], differences: Differences, baseline: str | None
) -> Table:
    known = columns_of(results)
    main_measures = _COMPARED if known is COLUMNS else [next(iter(results.values())).main_measure]
    columns, compared = [], [key for key in main_measures if key is not None and differences.get(key)]
    for key in compared:
        columns += [Column(key, known[key].label, known[key].better), Column(f"{key}_p", "p (Holm)", None)]
    rows = []
    for name in results:
        cells: dict[str, Cell] = {}
        marks = {}
        for key in compared:
            if (difference := differences[key].get(name)) is not None:
                digits = known[key].digits
                mean, low, high = (f"{value:+z.{digits}f}" for value in difference.interval[:3])
                cells[key], marks[key] = f"{mean} [{low}, {high}]", _mark(difference)
                cells[f"{key}_p"] = "< 0.001" if difference.p_holm < 0.001 else f"{difference.p_holm:.3f}"
        if cells:
            rows.append(Row(name, cells, name in teachers, marks))
    return Table(columns, rows, _note(baseline))


def _mark(difference: Difference | None) -> str:
    return _MARK if difference is not None and difference.is_significant else ""


def _note(baseline: str | None) -> str:
    return f"{_MARK} significantly different from {baseline}: corrected p of at most {LEVEL:g}" if baseline else ""
