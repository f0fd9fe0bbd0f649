"""Reports on models with results written by the tests, and parts of these reports."""

import json
from pathlib import Path

from minillm_trl.evaluation.comparison import compare_models
from minillm_trl.evaluation.report import Report, Section, Table
from minillm_trl.evaluation.results import read_evaluation

ENTRIES = (
    {"step": 10, "eval_rouge_l": 20.0, "eval_objective/reverse_kl": 9.0, "eval_completions/mean_length": 30.0},
    {"step": 15, "loss": 1.0, "objective/reverse_kl": 5.0},
    {"step": 20, "eval_rouge_l": 22.0, "eval_objective/reverse_kl": 7.0, "eval_completions/mean_length": 28.0},
)


def compare(folder: Path, *names: str, **options) -> Report:
    return compare_models([read_evaluation(name, folder / name) for name in names], **options)


def section(report: Report, heading: str) -> Section:
    (found,) = [each for each in report.sections if each.heading == heading]
    return found


def cells(table: Table) -> dict[str, dict]:
    return {row.name: row.cells for row in table.rows}


def write_training(folder: Path, entries: list[dict], step: int = 20) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder
