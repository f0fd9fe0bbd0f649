"""Compare models evaluated with the same settings: tables, figures and differences paired by prompt."""

from collections.abc import Mapping, Sequence
from typing import Any

from tqdm.auto import tqdm

from ..errors import UserError
from .answers import side_by_side
from .comparable import check_models
from .comparison_tables import Differences, columns_of, common_position, measured, overview, task_tables
from .figures import task_figures, task_overview, training_curves
from .frontier_results import equal_entropy_differences
from .frontier_tables import (
    CHOSEN_ROUGE_L,
    MEASURES,
    USE,
    EqualEntropy,
    decoding_figures,
    decoding_records,
    decoding_tables,
)
from .report import Record, Report, Section, Table, best_students, make_record
from .results import (
    DecodingResults,
    EvaluatedModel,
    TaskResult,
    decodings_of,
    results_of,
    task_names,
    teacher_names,
)
from .significance import paired_differences

_SAMPLES, _SAMPLES_OF_SEVERAL_TASKS = 5, 3


def compare_models(
    models: Sequence[EvaluatedModel],
    baseline: str | None = None,
    teacher: str | None = None,
    histories: Mapping[str, Mapping[str, Mapping[int, float]]] | None = None,
) -> Report:
    """Compare the results of several models in a report.

    Args:
        models (`Sequence[EvaluatedModel]`): in the order of the rows.
        baseline (`str`, *optional*): name of the model that the others are compared with.
        teacher (`str`, *optional*): name of a model to show as a teacher. Models that were the teacher in
            another model's evaluation are recognised without it.
        histories (`Mapping`, *optional*): [`~evaluation.training_history.read_history`] of each model with a training.

    Raises:
        ValueError: if there are no models, two have the same name, `baseline` or `teacher` is not a model, or two
            models were evaluated with different settings, prompts, references or teachers.
    """
    names = [model.name for model in models]
    if not names or len(set(names)) < len(names):
        raise UserError(f"Cannot compare {names}: give every model a different name.")
    for option, name in (("baseline", baseline), ("teacher", teacher)):
        if name is not None and name not in names:
            raise UserError(f"--{option} {name}: no such model. Choose one of {', '.join(names)}.")
    tasks = task_names(models)
    for task in tasks:
        check_models(models, task)
    differences = _differences(models, tasks, baseline)
    teachers = teacher_names(models) | (set() if teacher is None else {teacher})
    at_equal_entropy = _at_equal_entropy(models, tasks, baseline)
    table = overview(models, tasks, teachers, differences, baseline)
    sections = []
    for task in tasks:
        results, decodings = results_of(models, task), decodings_of(models, task)
        tables = task_tables(results, teachers, differences[task], baseline)
        tables |= decoding_tables(results, decodings, teachers, at_equal_entropy[task], baseline)
        figures = task_figures(task, results, names) + decoding_figures(task, decodings, names)
        sections.append(Section(task, tables, figures))
    if len(tasks) > 1 and table.columns:
        sections.insert(0, Section("All tasks", {"": table}, task_overview(models, tasks)))
    has_decodings = any(model.decodings for model in models)
    sections.insert(1, Section("How to read the numbers", notes=_notes(baseline, has_decodings)))
    if curves := training_curves(histories or {}, names):
        sections.append(Section("Training", figures=curves))
    return Report(
        title="Comparison of models",
        summary=_summary(table, differences, models, baseline) + _chosen_summary(sections),
        facts=_facts(models, tasks),
        sections=sections + _answers(models, tasks, teachers),
        records=_records(models, tasks, differences, at_equal_entropy),
    )


def _differences(
    models: Sequence[EvaluatedModel], tasks: Sequence[str], baseline: str | None
) -> dict[str, Differences]:
    """Return differences by task; empty for tasks that the baseline was not evaluated on."""
    differences: dict[str, Differences] = {}
    for task in tqdm(tasks, desc="Comparing", unit=" tasks", delay=5, leave=False):
        results = results_of(models, task)
        differences[task] = paired_differences(results, baseline) if baseline in results else {}
    return differences


def _at_equal_entropy(
    models: Sequence[EvaluatedModel], tasks: Sequence[str], baseline: str | None
) -> dict[str, EqualEntropy]:
    """Return differences at equal entropy by task; empty for tasks that the baseline has no decodings of."""
    bar = tqdm(tasks, desc="Comparing at equal entropy", unit=" tasks", delay=5, leave=False)
    return {task: equal_entropy_differences(decodings_of(models, task), baseline, MEASURES) for task in bar}


def _facts(models: Sequence[EvaluatedModel], tasks: Sequence[str]) -> list[tuple[str, str]]:
    settings = {task: next(iter(results_of(models, task).values())).settings for task in tasks}
    facts = [(task, f"{settings[task]['prompts']} prompts") for task in tasks]
    described = {
        task: _described(task_settings) | _temperatures(decodings_of(models, task))
        for task, task_settings in settings.items()
    }
    for name in dict.fromkeys(name for task_facts in described.values() for name in task_facts):
        by_task = {task: task_facts[name] for task, task_facts in described.items() if name in task_facts}
        if len(set(by_task.values())) == 1:
            facts.append((name, next(iter(by_task.values()))))
        else:
            facts += [(f"{name} of {task}", text) for task, text in by_task.items()]
    return facts


def _described(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return how a task was evaluated: decoding settings, label words, or lm-eval's examples."""
    if settings.get("kind") == "lm_eval":
        return {"lm-eval": f"{settings['num_fewshot']} examples"}
    if settings["label_words"] is not None:
        return {"Label words": ", ".join(settings["label_words"])}
    block = settings["no_repeat_ngram_size"]
    decoding = (
        "greedy (the most likely token)" if settings["greedy"] else f"sampled at temperature {settings['temperature']}"
    )
    blocked = f"no {block}-gram twice" if block else "no n-gram blocked"
    described = {"Decoding": f"{decoding}; {blocked} (no_repeat_ngram_size {block or 0})"}
    if not settings["greedy"]:
        described["Sampling seeds"] = ", ".join(map(str, settings["seeds"]))
    return {**described, "Length limit": f"{settings['max_new_tokens']} tokens"}


def _temperatures(decodings: Mapping[str, DecodingResults]) -> dict[str, str]:
    """Return the decodings of a task that was evaluated at several temperatures."""
    found = {decoding for results in decodings.values() for decoding in results.test}
    ordered = sorted(found, key=lambda decoding: -(decoding.temperature or 0))
    return {"Also decoded with": ", ".join(map(str, ordered))} if ordered else {}


def _summary(
    table: Table, differences: Mapping[str, Differences], models: Sequence[EvaluatedModel], baseline: str | None
) -> str:
    """Return which students lead on which tasks, and which beat the baseline."""
    if not table.columns:
        return "No references or labels, so no Rouge-L or accuracy."
    best = best_students(table)
    students = [row.name for row in table.rows if not row.is_teacher]
    tasks = [column.key for column in table.columns]
    measures = " or ".join(dict.fromkeys(column.label.removeprefix(f"{column.key}: ") for column in table.columns))
    highest = {name: [task for task in tasks if (name, task) in best] for name in students}
    sentences = [f"Highest {measures} among the students: {_listed(highest)}."]
    if baseline is not None:
        better = {task: _significantly_better(results_of(models, task), differences[task]) for task in tasks}
        above = {name: [task for task in tasks if name in better[task]] for name in students}
        sentences.append(f"Significantly better than {baseline}: {_listed(above)}.")
    return " ".join(sentences)


def _chosen_summary(sections: Sequence[Section]) -> str:
    """Return which students lead at the temperatures chosen on validation; empty without any."""
    tables = {section.heading: section.tables[USE] for section in sections if USE in section.tables}
    leads: dict[str, list[str]] = {}
    for task, table in tables.items():
        for name in (row.name for row in table.rows if (row.name, CHOSEN_ROUGE_L) in best_students(table)):
            leads.setdefault(name, []).append(task)
    return f" Highest Rouge-L at temperatures chosen on validation: {_listed(leads)}." if leads else ""


def _listed(tasks: Mapping[str, Sequence[str]]) -> str:
    """Return models with their tasks as text."""
    return "; ".join(f"{name} on {', '.join(names)}" for name, names in tasks.items() if names) or "no student"


def _significantly_better(results: Mapping[str, TaskResult], differences: Differences) -> list[str]:
    """Return the models that beat the baseline in the task's main measure."""
    names = []
    for name, result in results.items():
        measure = result.main_measure
        difference = None if measure is None else differences.get(measure, {}).get(name)
        if measure is not None and difference is not None and difference.is_significant:
            sign = -1 if columns_of(results)[measure].better == "lower" else 1
            if sign * difference.interval.mean > 0:
                names.append(name)
    return names


def _notes(baseline: str | None, has_decodings: bool) -> list[str]:
    notes = [
        "Means over prompts with 95 % bootstrap intervals over prompts; a prompt's value is its mean over the "
        "sampling seeds. ↑ higher is better, ↓ lower is better, ≈ closer to the teacher is better. The best student "
        "is in bold, even if the difference is not significant.",
        "Reverse KL is KL(student || teacher) on the student's samples, forward KL is KL(teacher || student) on the "
        "teacher's, both for whole completions and per token. ExAccErr is the excess of the error that the student "
        "accumulates on its own text over the error on the teacher's text, at the last position that a tenth of every "
        "model's samples reach.",
        "Length, ends, repetition and diversity should match the teacher's: reverse KL alone also falls when texts "
        "degenerate. Self-BLEU is high if the samples for a prompt are similar.",
    ]
    if baseline is not None:
        notes.append(
            f"Differences from {baseline} are paired by prompt, with 95 % bootstrap intervals. p comes from a "
            "two-sided sign-flip test, corrected (Holm) for the number of models compared on a task."
        )
    if has_decodings:
        notes.append(
            "A lower temperature makes any model sharper and usually raises its Rouge-L, so Rouge-L at T = 1 compares "
            "sharpness as much as quality. Entropy (nats per token) measures sharpness; greedy decoding has 0. Curves "
            "over entropy compare models that are equally sharp. Intervals of differences at equal entropy resample "
            "prompts, with the entropies and values of both models."
        )
    return notes


def _answers(models: Sequence[EvaluatedModel], tasks: Sequence[str], teachers: set[str]) -> list[Section]:
    students = [model.name for model in models if model.name not in teachers]
    count = _SAMPLES if len(tasks) == 1 else _SAMPLES_OF_SEVERAL_TASKS
    chosen = {task: side_by_side(results_of(models, task), students, count) for task in tasks}
    return [Section(f"Answers: {task}", samples=samples) for task, samples in chosen.items() if samples]


def _records(
    models: Sequence[EvaluatedModel],
    tasks: Sequence[str],
    differences: Mapping[str, Differences],
    at_equal_entropy: Mapping[str, EqualEntropy],
) -> list[Record]:
    records: list[Record] = []
    for task in tasks:
        results = results_of(models, task)
        position = common_position(results)
        for name, result in results.items():
            decoding = None if result.decoding is None else result.decoding.folder
            for measure, cell in measured(result, position).items():
                record = make_record(name, task, measure, cell, decoding)
                if (difference := differences[task].get(measure, {}).get(name)) is not None:
                    record = record._replace(
                        difference=difference.interval.mean,
                        difference_low=difference.interval.low,
                        difference_high=difference.interval.high,
                        p=difference.p,
                        p_holm=difference.p_holm,
                    )
                records.append(record)
        records += decoding_records(task, decodings_of(models, task), at_equal_entropy[task])
    return records
