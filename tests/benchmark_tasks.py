"""Small tasks for lm-eval, and the scores of a model on them from plain forward passes."""

import importlib.util
import json
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
import yaml

from minillm_trl.evaluation.lm_eval_results import evaluate_task

PAGE = Path(__file__).parents[1] / "docs" / "general_benchmarks.md"
needs_lm_eval = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)
QUESTIONS = ["the mill", "the pub in the city", "the river", "cheap food near the river", "the family"]
CHOICES = ["pub", "river", "mill cheap"]
GOLD = [0, 1, 2, 0, 1]
MEASURES = [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")]

# of lm-eval: file, number of examples, main measure, and a document
DEFINITIONS = {
    "gsm8k": ("gsm8k/gsm8k.yaml", 5, "exact_match,strict-match", {"question": "1 + 1?", "answer": "It is 2. #### 2"}),
    "minerva_math": (
        "minerva_math/minerva_math_algebra.yaml",
        4,
        "exact_match",
        {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."},
    ),
    "hendrycks_math": (
        "hendrycks_math/hendrycks_math_algebra.yaml",
        0,
        "exact_match",
        {"problem": "What is 1 + 1?", "solution": "It is $\\boxed{2}$."},
    ),
    "bbh": ("bbh/cot_fewshot/navigate.yaml", 3, "exact_match,get-answer", {"input": "Turn left.", "target": "No"}),
    "sciq": (
        "sciq/sciq.yaml",
        0,
        "acc",
        {
            "support": "Water boils.",
            "question": "What boils?",
            "correct_answer": "water",
            **{f"distractor{i}": word for i, word in enumerate(("ice", "air", "stone"), 1)},
        },
    ),
}


def write_task(folder: Path, name: str, rows: list[dict], **definition) -> None:
    """Write the YAML of a task, and its documents."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(data)}}}
    task |= {"test_split": "test", "metadata": {"version": 1.0}, **definition}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


def write_choices(folder: Path, name: str = "choices", rows: slice = slice(None), **definition) -> None:
    documents = [
        {"question": question, "choices": CHOICES, "gold": gold}
        for question, gold in zip(QUESTIONS[rows], GOLD[rows], strict=True)
    ]
    settings = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}}",
        "doc_to_target": "gold",
        "doc_to_choice": "choices",
        "metric_list": MEASURES,
    }
    write_task(folder, name, documents, **{**settings, **definition})


def write_answers(folder: Path, answers: list[str], name: str = "answers", **definition) -> None:
    documents = [{"question": each, "answer": answer} for each, answer in zip(QUESTIONS, answers, strict=True)]
    settings = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 6, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    write_task(folder, name, documents, **{**settings, **definition})


def sum_log_probs(model, ids: list[int], start: int) -> float:
    """Return the log-likelihood of the tokens after `start`, from one forward pass without padding."""
    with torch.no_grad():
        log_probs = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return sum(log_probs[position - 1, ids[position]].item() for position in range(start, len(ids)))


def log_likelihood(model, tokenizer, prompt: str, answer: str) -> float:
    """Return the log-likelihood of the answer after a space."""
    return sum_log_probs(model, tokenizer(f"{prompt} {answer}")["input_ids"], len(tokenizer(prompt)["input_ids"]))


@contextmanager
def evaluated_tasks(stop_at: str | None = None):
    """Collect the names of evaluated tasks; at the task `stop_at`, simulate Ctrl-C."""
    names = []

    def evaluate(lm, task, **options):
        if task.task_name == stop_at:
            raise KeyboardInterrupt
        names.append(task.task_name)
        return evaluate_task(lm, task, **options)

    with mock.patch("minillm_trl.cli.benchmark.evaluate_task", evaluate):
        yield names


def read(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def read_samples(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().removesuffix("\n").split("\n")]


def no_loading(*_, **__):
    pytest.fail("loaded a model")


class OwnTasks:
    @pytest.fixture(autouse=True)
    def only_own_tasks(self, tmp_path, monkeypatch):
        """Skip slow parts: reading lm-eval's 13,000 tasks, and listing installed packages with pip."""
        import datasets
        from lm_eval.tasks import TaskManager

        monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
        monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # lm-eval's bootstrap forks otherwise

    @pytest.fixture
    def tasks(self, tmp_path: Path) -> Path:
        return tmp_path / "tasks"

    def arguments(self, tmp_path: Path, model: str, *names: str) -> list[str]:
        folders = ["--include_path", str(tmp_path / "tasks"), "--output_dir", str(tmp_path / "out")]
        return ["benchmark", "--model", model, *folders, "--tasks", *names]
