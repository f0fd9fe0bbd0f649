"""Compares models that were evaluated alike: tables and figures of models and tasks, differences paired by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from .answers import side_by_side
from .comparison_tables import Differences, columns_of, common_position, measured, overview, task_tables
from .figures import task_figures, task_overview, training_curves
from .metrics import MeanInterval
from .report import Record, Report, Section, Table, best_students
from .results import EvaluatedModel, TaskResult, check_comparable, results_of, task_names, teacher_names
from .significance import paired_differences

_SAMPLES, _SAMPLES_OF_SEVERAL_TASKS = 5, 3


def compare_models(
    models: Sequence[EvaluatedModel],
    baseline: str | None = None,
    teacher: str | None = None,
    histories: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> Report:
    """Put the results of several models side by side.

    Args:
        models (`Sequence[EvaluatedModel]`): in the order of the rows.
        baseline (`str`, *optional*): name of the model to which the others' differences are shown.
        teacher (`str`, *optional*): name of the model that is no student, beside those that were a teacher in
            another's evaluation.
        histories (`Mapping`, *optional*): what [`~evaluation.training_history.read_history`] returns, by model.

    Raises:
        ValueError: if there are no models, two have one name, none is called `baseline` or `teacher`, or two were
            evaluated with different settings, prompts or references, or compared with different teachers; with the
            names of both.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise UserError(f"Cannot compare {names}: each model needs a name of its own.")
    for option, name in (("baseline", baseline), ("teacher", teacher)):
        if name is not None and name not in names:
            raise UserError(f"--{option} {name}: there are only {', '.join(names)}.")
    tasks = task_names(models)
    for task in tasks:
        check_comparable(task, results_of(models, task))
    differences = _differences(models, tasks, baseline)
    teachers = teacher_names(models) | ({teacher} - {None})
    table = overview(models, tasks, teachers, differences, baseline)
    sections = [
        Section(
            task,
            task_tables(results_of(models, task), teachers, differences[task], baseline),
            task_figures(task, results_of(models, task), names),
        )
        for task in tasks
    ]
    if len(tasks) > 1 and table.columns:
        sections.insert(0, Section("All tasks", {"": table}, task_overview(models, tasks)))
    sections.insert(1, Section("How to read the numbers", notes=_notes(baseline)))
    if curves := training_curves(histories or {}, names):
        sections.append(Section("Training", figures=curves))
    return Report(
        title="Comparison of models",
        summary=_summary(table, differences, models, baseline),
        facts=_facts(models, tasks),
        sections=sections + _answers(models, tasks, teachers),
        records=_records(models, tasks, differences),
    )


def _differences(
    models: Sequence[EvaluatedModel], tasks: Sequence[str], baseline: str | None
) -> dict[str, Differences]:
    """By task; empty where the baseline was not evaluated."""
    differences: dict[str, Differences] = {}
    for task in tqdm(tasks, desc="Comparing", unit=" tasks", delay=5, leave=False):
        results = results_of(models, task)
        differences[task] = paired_differences(results, baseline) if baseline in results else {}
    return differences


def _facts(models: Sequence[EvaluatedModel], tasks: Sequence[str]) -> list[tuple[str, str]]:
    settings = {task: next(iter(results_of(models, task).values())).settings for task in tasks}
    facts = [(task, f"{settings[task]['prompts']} prompts") for task in tasks]
    described = {task: _described(each) for task, each in settings.items()}
    for name in dict.fromkeys(name for each in described.values() for name in each):
        by_task = {task: each[name] for task, each in described.items() if name in each}
        if len(set(by_task.values())) == 1:
            facts.append((name, next(iter(by_task.values()))))
        else:
            facts += [(f"{name} of {task}", text) for task, text in by_task.items()]
    return facts


def _described(settings: Mapping[str, Any]) -> dict[str, str]:
    """How a task was evaluated: by what was sampled, by the label words, or with lm-eval."""
    if settings.get("kind") == "lm_eval":
        return {"lm-eval": f"{settings['num_fewshot']} examples"}
    if settings["label_words"] is not None:
        return {"Label words": ", ".join(settings["label_words"])}
    block = settings["no_repeat_ngram_size"]
    how = (
        "greedy (the most likely token)" if settings["greedy"] else f"sampled at temperature {settings['temperature']}"
    )
    blocked = f"no {block}-gram twice" if block else "no n-gram blocked"
    described = {"Decoding": f"{how}; {blocked} (no_repeat_ngram_size {block or 0})"}
    if not settings["greedy"]:
        described["Sampling seeds"] = ", ".join(map(str, settings["seeds"]))
    return {**described, "Length limit": f"{settings['max_new_tokens']} tokens"}


def _summary(
    table: Table, differences: Mapping[str, Differences], models: Sequence[EvaluatedModel], baseline: str | None
) -> str:
    """Who is ahead, from the overview of all tasks."""
    if not table.columns:
        return "Neither references nor labels, so neither Rouge-L nor accuracy."
    best = best_students(table)
    students = [row.name for row in table.rows if not row.is_teacher]
    tasks = [column.key for column in table.columns]
    measures = " or ".join(dict.fromkeys(column.label.removeprefix(f"{column.key}: ") for column in table.columns))
    highest = {name: [task for task in tasks if (name, task) in best] for name in students}
    sentences = [f"Highest {measures} among the students: {_listed(highest)}."]
    if baseline is not None:
        better = {task: _significantly_better(results_of(models, task), differences[task]) for task in tasks}
        above = {name: [task for task in tasks if name in better[task]] for name in students}
        sentences.append(f"Above {baseline} by more than chance: {_listed(above)}.")
    return " ".join(sentences)


def _listed(tasks: Mapping[str, Sequence[str]]) -> str:
    """Models, each with its tasks."""
    return "; ".join(f"{name} on {', '.join(found)}" for name, found in tasks.items() if found) or "no student"


def _significantly_better(results: Mapping[str, TaskResult], differences: Differences) -> list[str]:
    """The models that are better than the baseline in what the task is judged by."""
    found = []
    for name, result in results.items():
        difference = differences.get(result.main_measure, {}).get(name)
        if difference is not None and difference.is_significant:
            sign = -1 if columns_of(results)[result.main_measure].better == "lower" else 1
            if sign * difference.interval.mean > 0:
                found.append(name)
    return found


def _notes(baseline: str | None) -> list[str]:
    notes = [
        "Means over prompts with 95 % bootstrap intervals over prompts; each prompt counts with its mean over the "
        "sampling seeds. ↑ higher is better, ↓ lower, ≈ closer to the teacher's. The best student is in bold, whether "
        "or not the difference is larger than chance.",
        "Reverse KL is KL(student || teacher) on the student's samples, forward KL is KL(teacher || student) on the "
        "teacher's, both over whole completions and by token. ExAccErr is how much more error the student accumulates "
        "on its own texts than on the teacher's, at the last position that a tenth of all models' samples reach.",
        "Length, ends, repetition and diversity should be like the teacher's: reverse KL alone also falls when texts "
        "degenerate. Self-BLEU is high where the samples of a prompt are alike.",
    ]
    if baseline is not None:
        notes.append(
            f"Differences to {baseline} are paired by prompt, with 95 % bootstrap intervals; p is of a two-sided "
            "sign-flip test, corrected (Holm) for the number of models that are compared on a task."
        )
    return notes


def _answers(models: Sequence[EvaluatedModel], tasks: Sequence[str], teachers: set[str]) -> list[Section]:
    students = [model.name for model in models if model.name not in teachers]
    count = _SAMPLES if len(tasks) == 1 else _SAMPLES_OF_SEVERAL_TASKS
    chosen = {task: side_by_side(results_of(models, task), students, count) for task in tasks}
    return [Section(f"Answers: {task}", samples=samples) for task, samples in chosen.items() if samples]


def _records(
    models: Sequence[EvaluatedModel], tasks: Sequence[str], differences: Mapping[str, Differences]
) -> list[Record]:
    records = []
    for task in tasks:
        results = results_of(models, task)
        position = common_position(results)
        for name, result in results.items():
            for measure, cell in measured(result, position).items():
                if not isinstance(cell, MeanInterval):
                    records.append(Record(name, task, measure, cell))
                    continue
                mean, low, high, n, error = cell
                record = Record(name, task, measure, mean, low, high, error, n)
                if (found := differences[task].get(measure, {}).get(name)) is not None:
                    record = record._replace(
                        difference=found.interval.mean,
                        difference_low=found.interval.low,
                        difference_high=found.interval.high,
                        p=found.p,
                        p_holm=found.p_holm,
                    )
                records.append(record)
    return records
