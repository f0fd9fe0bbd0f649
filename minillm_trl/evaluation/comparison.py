"""Compares models that were evaluated alike: a table of models and tasks, and differences paired by prompt."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .metrics import MeanInterval, paired_bootstrap
from .report import Column, Report, Row, Sample, Table, best_students

COLUMNS = [
    Column("rouge_l", "Rouge-L", "higher"),
    Column("reverse_kl", "Reverse KL (nats)", "lower"),
    Column("length", "Length (tokens)", "teacher"),
    Column("eos_rate", "Ends by itself", "teacher", 2),
    Column("repeated_4grams", "Repeated 4-grams", "teacher", 3),
    Column("distinct_outputs", "Distinct outputs", "teacher", 2),
]
_SAME = ("seeds", "temperature", "max_new_tokens", "split", "prompts")
_SAMPLES = 10


@dataclass(frozen=True)
class TaskResult:
    """What `minillm-trl evaluate` wrote of a model on one task; `settings`, `summary` and the lists are its files'."""

    settings: dict[str, Any]
    summary: dict[str, MeanInterval]
    per_prompt: list[dict[str, float]]
    samples: list[dict[str, Any]]


@dataclass(frozen=True)
class EvaluatedModel:
    """A model's name in the tables, and its results by task."""

    name: str
    tasks: dict[str, TaskResult]


def read_evaluation(name: str, folder: Path) -> EvaluatedModel:
    """Read the folder of a model's evaluation.

    Args:
        name (`str`): of the model in the tables.
        folder (`Path`): with `results.json` and `samples.jsonl` of a dataset, or with a folder of both for each task.

    Raises:
        ValueError: if there are no results, or they cannot be read.
    """
    paths = [folder / "results.json"] if (folder / "results.json").is_file() else sorted(folder.glob("*/results.json"))
    if not paths:
        raise ValueError(
            f"{folder}: no results of `minillm-trl evaluate`, neither results.json nor TASK/results.json."
        )
    tasks = {}
    for path in paths:
        try:
            results = json.loads(path.read_text(encoding="utf-8"))
            text = path.with_name("samples.jsonl").read_text(encoding="utf-8")
            lines = text.removesuffix("\n").split("\n")  # splitlines would split at characters inside of texts too
            settings = results["settings"]
            task = Path(settings["dataset"]).name if path.parent == folder else path.parent.name
            summary = {key: MeanInterval(**each) for key, each in results["summary"].items()}
            tasks[task] = TaskResult(settings, summary, results["per_prompt"], [json.loads(line) for line in lines])
        except (OSError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: not what `minillm-trl evaluate` writes ({error!r}). Evaluate again.") from error
    return EvaluatedModel(name, tasks)


def compare_models(models: list[EvaluatedModel], baseline: str | None = None, teacher: str | None = None) -> Report:
    """Put the results of several models side by side.

    Args:
        models (`list[EvaluatedModel]`): in the order of the rows.
        baseline (`str`, *optional*): name of the model to which the others' differences are shown.
        teacher (`str`, *optional*): name of the model that is no student, beside those that were a teacher in
            another's evaluation.

    Raises:
        ValueError: if there are no models, two have one name, none is called `baseline` or `teacher`, or two were
            evaluated with different settings, prompts or references, or their reverse KL is to different teachers;
            with the names of both.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Cannot compare {names}: each model needs a name of its own.")
    for option, name in (("baseline", baseline), ("teacher", teacher)):
        if name is not None and name not in names:
            raise ValueError(f"--{option} {name}: there are only {', '.join(names)}.")
    tasks = list(dict.fromkeys(task for model in models for task in model.tasks))
    for task in tasks:
        _check_comparable(task, [model for model in models if task in model.tasks])
    teachers = _teachers(models) | {teacher}
    details = {task: _task_table(models, task, teachers, baseline) for task in tasks}
    table = details.pop(tasks[0]) if len(tasks) == 1 else _overview(models, tasks, teachers)
    settings = models[0].tasks[next(iter(models[0].tasks))].settings
    return Report(
        title="Comparison of models",
        summary=_summary(table),
        facts=[
            *((task, f"{_first(models, task).settings['prompts']} prompts") for task in tasks),
            ("Sampling seeds", ", ".join(map(str, settings["seeds"]))),
            ("Temperature", str(settings["temperature"])),
            ("Length limit", f"{settings['max_new_tokens']} tokens"),
        ],
        table=table,
        details=details,
        samples=_samples(models, tasks[0]),
        notes=_notes(baseline),
    )


def _check_comparable(task: str, models: list[EvaluatedModel]) -> None:
    first, *others = models
    for other in others:
        one, two = first.tasks[task], other.tasks[task]
        for key in _SAME:
            if one.settings[key] != two.settings[key]:
                raise ValueError(
                    f"{first.name} and {other.name} were evaluated differently on {task}: {key} is "
                    f"{one.settings[key]!r} and {two.settings[key]!r}. Evaluate both alike."
                )
        if [sample["prompt"] for sample in one.samples] != [sample["prompt"] for sample in two.samples]:
            raise ValueError(f"{first.name} and {other.name} were evaluated on different prompts of {task}.")
        if [sample["references"] for sample in one.samples] != [sample["references"] for sample in two.samples]:
            raise ValueError(
                f"{first.name} and {other.name} were evaluated with different references for the same prompts of "
                f"{task}. Evaluate both alike."
            )
    _check_teachers(task, [model for model in models if "reverse_kl" in model.tasks[task].summary])


def _check_teachers(task: str, models: list[EvaluatedModel]) -> None:
    for one, other in pairwise(models):
        teachers = [model.tasks[task].settings["teacher"] for model in (one, other)]
        if teachers[0] != teachers[1]:
            raise ValueError(
                f"{one.name} and {other.name}: the reverse KL on {task} is to different teachers, {teachers[0]!r} and "
                f"{teachers[1]!r}. Evaluate both with one of them."
            )


def _teachers(models: list[EvaluatedModel]) -> set[str]:
    results = [(model.name, result.settings) for model in models for result in model.tasks.values()]
    teachers = {settings["teacher"] for _, settings in results} - {None}
    return {name for name, settings in results if settings["model"] in teachers and settings["adapter"] is None}


def _first(models: list[EvaluatedModel], task: str) -> TaskResult:
    return next(model.tasks[task] for model in models if task in model.tasks)


def _overview(models: list[EvaluatedModel], tasks: list[str], teachers: set[str | None]) -> Table:
    rows = []
    for model in models:
        cells = {
            task: result.summary["rouge_l"] for task, result in model.tasks.items() if "rouge_l" in result.summary
        }
        rows.append(Row(model.name, cells, model.name in teachers))
    return Table([Column(task, f"{task}: Rouge-L", "higher") for task in tasks], rows)


def _task_table(models: list[EvaluatedModel], task: str, teachers: set[str | None], baseline: str | None) -> Table:
    rows, columns = [], list(COLUMNS)
    if baseline is not None:
        columns[2:2] = [
            Column(f"{each.key}_gain", f"{each.label} minus {baseline}'s", each.better) for each in COLUMNS[:2]
        ]
    by_name = {model.name: model.tasks[task] for model in models if task in model.tasks}
    for name, result in by_name.items():
        cells = {column.key: result.summary[column.key] for column in COLUMNS if column.key in result.summary}
        if baseline in by_name and name != baseline:
            cells |= _gains(result, by_name[baseline])
        rows.append(Row(name, cells, name in teachers))
    return Table([column for column in columns if any(column.key in row.cells for row in rows)], rows)


def _gains(result: TaskResult, baseline: TaskResult) -> dict[str, str]:
    gains = {}
    for key in ("rouge_l", "reverse_kl"):
        if key in result.summary and key in baseline.summary:
            pair = [[row[key] for row in each.per_prompt] for each in (result, baseline)]
            mean, low, high, *_ = paired_bootstrap(*pair)
            gains[f"{key}_gain"] = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    return gains


def _summary(table: Table) -> str:
    best = best_students(table)
    leaders = []
    for column in table.columns:
        names = [row.name for row in table.rows if (row.name, column.key) in best]
        if names and column.label.endswith("Rouge-L"):
            leaders.append(f"{column.label} {' and '.join(names)}")
    return f"Highest among the students: {'; '.join(leaders)}." if leaders else "No references, so no Rouge-L."


def _notes(baseline: str | None) -> list[str]:
    notes = [
        "Means over prompts with 95 % bootstrap intervals over prompts; each prompt counts with its mean over the "
        "sampling seeds. The best student is in bold, whether or not the difference is larger than chance.",
        "Reverse KL is KL(student || teacher) over whole completions. Length, ends, repetition and distinct outputs "
        "should be like the teacher's: reverse KL alone also falls when texts degenerate.",
    ]
    if baseline is not None:
        notes.append(f"Differences to {baseline} are paired by prompt, with 95 % bootstrap intervals.")
    return notes


def _samples(models: list[EvaluatedModel], task: str) -> list[Sample]:
    by_name = {model.name: model.tasks[task].samples for model in models if task in model.tasks}
    samples = next(iter(by_name.values()))
    rows = range(0, len(samples), max(1, len(samples) // _SAMPLES))[:_SAMPLES]
    return [
        Sample(
            _text(samples[row]["prompt"]),
            samples[row]["references"],
            {name: each[row]["outputs"][0] for name, each in by_name.items()},
        )
        for row in rows
    ]


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{each['role']}: {each['content']}" for each in prompt)
