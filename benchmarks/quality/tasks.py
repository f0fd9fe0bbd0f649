"""The tasks of the comparison, and the teachers and students that are fine-tuned for each from nothing."""

import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from minillm_trl.cli import main
from minillm_trl.data import load_e2e, load_examples
from minillm_trl.demo import DemoSettings
from minillm_trl.demo.models import build_model, train_tokenizer
from minillm_trl.demo.settings import Shape
from minillm_trl.demo.training import train_sft


@dataclass(frozen=True)
class Task:
    """Data, and what is made from it before the comparison starts. The models are Llama-shaped, with rotary positions.

    Attributes:
        name: of the task.
        vocab_size: of the tokenizer that is trained on the data.
        teacher, student: shapes.
        teacher_updates, student_updates: supervised updates of 32 examples.
        teacher_learning_rate, student_learning_rate: peaks of a cosine schedule.
        max_completion_length: length limit in tokens.
        seqkd_samples: completions of the teacher for each prompt, about as many as the data has.
        teacher_of: another task, whose teacher and tokenizer are taken.
    """

    name: str
    vocab_size: int
    teacher: Shape
    student: Shape
    teacher_updates: int
    teacher_learning_rate: float
    student_updates: int
    student_learning_rate: float
    max_completion_length: int
    seqkd_samples: int
    teacher_of: str | None = None

    @property
    def data(self) -> str:
        """The task whose data it has."""
        return self.teacher_of or self.name

    def load_data(self, folder: Path) -> DatasetDict:
        """`train`, `validation` and `test`, each with `prompt`, `completion` and `references`.

        Args:
            folder: of the task's runs; Dolly is read from `data` in it.
        """
        if self.data == "e2e":
            return load_e2e()
        return DatasetDict({split: _short_dolly(folder / "data", split) for split in ("train", "validation", "test")})


def _short_dolly(data: Path, split: str) -> Dataset:
    """Dolly's short classifications, as they are: the paper's wrapper is as long as they are."""
    rows = load_examples(data, split=split)
    rows = rows.filter(
        lambda row: (
            row["category"] == "classification"
            and not row["input"]
            and len(row["instruction"]) <= 200
            and len(row["completion"]) <= 250
        )
    )
    return rows.map(lambda row: {"prompt": row["instruction"].strip() + "\n", "completion": row["completion"].strip()})


def prepare_dolly(folder: Path, source: str | None) -> None:
    """Prepare Dolly with larger validation and test parts than the paper's, as only the short rows are taken."""
    arguments = ["--task", "dolly", "--validation_rows", "1000", "--test_rows", "2000"]
    arguments += ["--output_dir", str(folder / "data")]
    if main(["prepare-data", *arguments, *(["--source", source] if source else [])]) != 0:
        raise SystemExit("Dolly could not be prepared; --dolly names a local copy.")


DEMO = DemoSettings()
TASKS = {
    "e2e": Task(
        "e2e",
        vocab_size=DEMO.vocab_size,
        teacher=DEMO.teacher,
        student=DEMO.student,
        teacher_updates=DEMO.teacher_steps,
        teacher_learning_rate=DEMO.teacher_learning_rate,
        # twice the demo's updates at a higher rate, so that more of the same gains little
        student_updates=2 * DEMO.student_steps,
        student_learning_rate=1e-2,
        max_completion_length=DEMO.max_completion_length,
        seqkd_samples=8,
    ),
    "dolly": Task(
        "dolly",
        vocab_size=2048,
        teacher=DEMO.teacher,
        student=DEMO.student,
        teacher_updates=1200,
        teacher_learning_rate=2e-3,
        student_updates=1200,
        student_learning_rate=1e-2,
        max_completion_length=80,
        seqkd_samples=1,
    ),
}

# Students over a 36-fold range against one teacher, which is 172 to 5 times as large; the task of each width
SIZES = {8: "e2e_w8", 16: "e2e_w16", 32: "e2e_w32", 64: "e2e", 96: "e2e_w96"}
_SHAPES = {8: Shape(8, 1, 2), 16: Shape(16, 1, 2), 32: Shape(32, 1, 2), 96: Shape(96, 2, 4)}
TASKS |= {
    SIZES[width]: replace(TASKS["e2e"], name=SIZES[width], student=shape, teacher_of="e2e")
    for width, shape in _SHAPES.items()
}


def make_tokenizer(task: Task, folder: Path) -> PreTrainedTokenizerBase:
    """The task's tokenizer, trained on the training split unless it is there."""
    path = folder / "tokenizer"
    if task.teacher_of is not None:
        path = folder.parent / task.teacher_of / "tokenizer"
    if not (path / "tokenizer_config.json").is_file():
        train = task.load_data(folder)["train"]
        texts = [*dict.fromkeys(train["prompt"]), *train["completion"]]
        train_tokenizer(texts, task.vocab_size).save_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def fine_tune(task: Task, folder: Path, name: str, shape: Shape, seed: int) -> dict[str, Any]:
    """Fine-tune a model of `shape` from nothing into `folder/name/model`, as a teacher or as a student."""
    done = folder / name / "stage.json"
    if name == "teacher" and task.teacher_of is not None and not done.is_file():
        shutil.copytree(folder.parent / task.teacher_of / name, folder / name, dirs_exist_ok=True)
    if done.is_file():
        return json.loads(done.read_text())
    tokenizer = make_tokenizer(task, folder)
    is_teacher = name == "teacher"
    updates = task.teacher_updates if is_teacher else task.student_updates
    learning_rate = task.teacher_learning_rate if is_teacher else task.student_learning_rate
    model = build_model(shape, tokenizer, seed)
    settings = replace(DEMO, seed=seed)
    record = train_sft(
        name, folder / name, model, tokenizer, task.load_data(folder)["train"], settings, updates, learning_rate
    )
    record = {**record, "parameters": model.num_parameters(), "seed": seed}
    write_json(done, record)
    return record


def load_model(folder: Path, name: str) -> PreTrainedModel:
    """A model that [`fine_tune`] or a method has left."""
    return AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is there whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=1))
    os.replace(partial, path)


def pairs(data: Dataset) -> Dataset:
    return data.select_columns(["prompt", "completion"])
