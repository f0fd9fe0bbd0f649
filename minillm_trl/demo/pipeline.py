"""Run the demo's stages in order. Every stage saves its result, so that an interrupted run resumes."""

import platform
import shutil
import warnings
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from ..data import load_e2e, unique_prompts
from ..evaluation.evaluate import evaluate_model
from ..evaluation.report import format_sections
from ..evaluation.report_files import write_report
from ..files.result_folder import ResultFolder
from ..files.whole_files import make_folder
from .models import build_model, train_tokenizer
from .report import build_report
from .settings import DemoSettings, Shape
from .training import train_minillm, train_sft

MODELS = ("teacher", "sft", "control", "minillm")


def run_demo(folder: Path, settings: DemoSettings) -> Path:
    """Run the demo in `folder`, resuming an interrupted run, and print the comparison.

    Args:
        folder (`Path`): receives the result of every stage.
        settings ([`DemoSettings`]): what to train.

    Returns:
        `Path` of `report.html`.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    make_folder(folder)
    results = _prepare(folder, settings)
    data = load_e2e()
    print(f"Run folder: {folder}")
    records = _train_pair(results, data["train"], settings, stages=6)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    print("3/6  MiniLLM: the student learns from the teacher on its own samples")
    records["minillm"] = _stage(
        results,
        "minillm",
        lambda: train_minillm(
            folder / "minillm",
            load_model(folder, "sft"),
            load_model(folder, "teacher"),
            tokenizer,
            unique_prompts(data["train"]),
            unique_prompts(data["validation"]),
            settings,
        ),
    )
    print("4/6  Control: the same student, fine-tuned on for as long as MiniLLM took")
    seconds_per_update = records["sft"]["seconds"] / records["sft"]["updates"]
    control_steps = max(1, round(records["minillm"]["seconds"] / seconds_per_update))
    records["control"] = _stage(
        results,
        "control",
        lambda: train_sft(
            "control",
            folder / "control",
            load_model(folder, "sft"),
            tokenizer,
            data["train"],
            settings,
            control_steps,
            settings.student_learning_rate,
        ),
    )
    print("5/6  Evaluation on the test prompts")
    evaluations = _evaluate(results, tokenizer, unique_prompts(data["test"]), settings)
    print("6/6  Report")
    report = build_report(records, evaluations, settings, load_sizes(folder))
    results.put("run", {"environment": _environment(), "stages": records})
    write_report(folder, report)
    print(f"\n{format_sections(report.sections)}\n\n{report.summary}\n\nReport: {folder / 'report.html'}")
    return folder / "report.html"


def train_pair(folder: Path, settings: DemoSettings) -> tuple[Path, Path]:
    """Run the demo's first two stages, which train the teacher and the fine-tuned student, in `folder`.

    Args:
        folder (`Path`): receives the results of both stages; [`run_demo`] can continue in it.
        settings ([`DemoSettings`]): what to train.

    Returns:
        `tuple[Path, Path]`: the folders of student and teacher, each a model with its tokenizer.

    Raises:
        ValueError: if the folder holds a run with other settings.
    """
    _train_pair(_prepare(folder, settings), load_e2e()["train"], settings, stages=2)
    return folder / "sft" / "model", folder / "teacher" / "model"


def load_model(folder: Path, name: str) -> PreTrainedModel:
    """Load the model that a stage saved."""
    return AutoModelForCausalLM.from_pretrained(folder / name / "model", dtype=torch.float32)


def load_sizes(folder: Path) -> dict[str, int]:
    """Return the number of parameters of teacher and student."""
    return {name: load_model(folder, name).num_parameters() for name in ("teacher", "sft")}


def _prepare(folder: Path, settings: DemoSettings) -> ResultFolder:
    # the libraries' progress bars and notices would bury the messages of the stages
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    return ResultFolder(folder, asdict(settings), "a run", "Choose another --output_dir, or delete the folder.")


def _train_pair(
    results: ResultFolder, train: Dataset, settings: DemoSettings, stages: int
) -> dict[str, dict[str, Any]]:
    """Run the first two of `stages` stages and return their records."""
    tokenizer = _tokenizer(results, train, settings)

    def sft(name: str, title: str, shape: Shape, seed: int, steps: int, learning_rate: float) -> dict[str, Any]:
        return _stage(
            results,
            name,
            lambda: train_sft(
                title,
                results.folder / name,
                build_model(shape, tokenizer, seed),
                tokenizer,
                train,
                settings,
                steps,
                learning_rate,
            ),
        )

    print(f"1/{stages}  Teacher: supervised fine-tuning from scratch")
    teacher = sft(
        "teacher", "teacher", settings.teacher, settings.seed, settings.teacher_steps, settings.teacher_learning_rate
    )
    print(f"2/{stages}  Student: supervised fine-tuning from scratch")
    student = sft(
        "sft", "student", settings.student, settings.seed + 1, settings.student_steps, settings.student_learning_rate
    )
    return {"teacher": teacher, "sft": student}


def _tokenizer(results: ResultFolder, train, settings: DemoSettings) -> PreTrainedTokenizerBase:
    path = results.folder / "tokenizer"

    def make() -> dict:
        texts = [*dict.fromkeys(train["prompt"]), *train["completion"]]
        train_tokenizer(texts, settings.vocab_size).save_pretrained(path)
        return {}

    _stage(results, "tokenizer", make)
    return AutoTokenizer.from_pretrained(path)


def _stage(results: ResultFolder, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the saved result of a stage, or run it. `stage.json` marks the stage as complete."""
    if results.get(f"{name}/stage") is not None:
        print("     done before")
    result = results.once(f"{name}/stage", compute)
    if (checkpoints := results.folder / name / "checkpoints").is_dir():
        shutil.rmtree(checkpoints)
    return result


def _evaluate(results: ResultFolder, tokenizer, prompts, settings: DemoSettings) -> dict[str, dict]:
    teacher = load_model(results.folder, "teacher")

    def evaluate(name: str) -> dict[str, Any]:
        evaluation = evaluate_model(
            load_model(results.folder, name),
            tokenizer,
            prompts,
            seeds=settings.sampling_seeds,
            max_new_tokens=settings.max_completion_length,
            batch_size=128,
            teacher=None if name == "teacher" else teacher,
            progress=False,
        )
        return asdict(evaluation)

    names = tqdm(MODELS, desc="  evaluation", unit=" models")
    return {name: results.once(f"evaluation/{name}", partial(evaluate, name)) for name in names}


def _environment() -> dict[str, Any]:
    packages = ("minillm-trl", "torch", "trl", "transformers", "accelerate", "datasets")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        **{name: version(name) for name in packages},
    }
