"""Claim: with one teacher and one student, MiniLLM is ahead of SFT continued, KD and SeqKD.

    python benchmarks/quality/run.py [--task e2e|dolly] [--workers 2]

Runs all that `methods.py` lists, and keeps it under `runs/quality/<task>`: what is there is not computed again, so a
run that was stopped goes on. In order:

1. a teacher, and one student for each training seed, fine-tuned from nothing; the teacher's completions for SeqKD;
2. for the first training seed every method at the five lower learning rates of a ladder, and at the next higher one
   as long as the best is the highest tried, by Rouge-L on the validation prompts at the end of the run (three sampling
   seeds; no intermediate checkpoint is chosen);
3. each method at its best learning rate for the other training seeds;
4. Rouge-L, reverse and forward KL, length, repetition and diversity on the test prompts, five sampling seeds each.

Each run is one thread of one process. `summarize.py` makes `results/quality_<task>.json`, tables and pictures of it.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import sys
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `measurement`

SEEDS = (3, 4, 5)
LEARNING_RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1)
FIRST_RATES = slice(0, 5)
VALIDATION_SEEDS = (1, 2, 3)
TEST_SEEDS = (10, 20, 30, 40, 50)
DIVERSITY_NGRAM = 4


@dataclass(frozen=True)
class Run:
    """One training run."""

    task: str
    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.learning_rate:g}-{self.seed}"


def identity(run: Run) -> dict[str, Any]:
    """All that a run's numbers depend on, but for the code."""
    from methods import METHODS
    from tasks import TASKS

    settings = {"run": asdict(run), "method": asdict(METHODS[run.method]), "task": asdict(TASKS[run.task])}
    settings["method"].pop("label")
    settings["task"] = {name: value for name, value in settings["task"].items() if value is not None}
    return json.loads(json.dumps(settings))


def finished(folder: Path, run: Run, name: str) -> dict[str, Any] | None:
    """A result of the run, if it is there and was made with the same settings."""
    path = folder / run.name / f"{name}.json"
    if not path.is_file():
        return None
    result = json.loads(path.read_text())
    return result if result["identity"] == identity(run) else None


def start_worker() -> None:
    import torch
    from datasets import disable_progress_bars
    from transformers.utils import logging

    torch.set_num_threads(1)
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore")


def prepare_tokenizer(task_name: str, folder: Path) -> None:
    """Before the models, which are trained side by side and all need it."""
    from tasks import TASKS, make_tokenizer

    make_tokenizer(TASKS[task_name], folder)


def prepare(task_name: str, folder: Path, name: str) -> str:
    """Fine-tune the teacher or a student; with the teacher come its completions for SeqKD."""
    from methods import generate_seqkd_data
    from tasks import TASKS, fine_tune, load_model, make_tokenizer

    task = TASKS[task_name]
    if name == "teacher":
        fine_tune(task, folder, name, task.teacher, 0)
        generate_seqkd_data(task, folder, load_model(folder, "teacher"), make_tokenizer(task, folder))
    else:
        fine_tune(task, folder, name, task.student, 1 + 10 * int(name.removeprefix("sft-")))
    return name


def train_run(folder: Path, run: Run) -> str:
    """Train, measure on the validation prompts, and keep the model."""
    from measurement import commit
    from methods import METHODS, train
    from tasks import TASKS, load_model, make_tokenizer, write_json

    if finished(folder, run, "train") is not None:
        return run.name
    task, here = TASKS[run.task], folder / run.name
    shutil.rmtree(here, ignore_errors=True)
    tokenizer, teacher = make_tokenizer(task, folder), load_model(folder, "teacher")
    student = load_model(folder, f"sft-{run.seed}")
    seconds = train(METHODS[run.method], task, here, student, teacher, tokenizer, run.learning_rate, run.seed)
    student.save_pretrained(here / "model")
    result = measure(task, folder, tokenizer, student, None, "validation", VALIDATION_SEEDS)
    write_json(
        here / "train.json",
        {
            "identity": identity(run),
            "commit": commit(),
            "cpu_seconds": seconds,
            "validation": {name: interval["mean"] for name, interval in result["summary"].items()},
        },
    )
    return run.name


def test_run(folder: Path, run: Run) -> str:
    """Measure a trained model on the test prompts."""
    from tasks import write_json

    if finished(folder, run, "test") is None:
        result = measure_model(folder, run.task, run.name)
        write_json(folder / run.name / "test.json", {"identity": identity(run), **result})
    return run.name


def measure_model(folder: Path, task_name: str, name: str) -> dict[str, Any]:
    from tasks import TASKS, load_model, make_tokenizer

    task = TASKS[task_name]
    teacher = None if name == "teacher" else load_model(folder, "teacher")
    tokenizer, model = make_tokenizer(task, folder), load_model(folder, name)
    return measure(task, folder, tokenizer, model, teacher, "test", TEST_SEEDS)


def test_start(folder: Path, task_name: str, name: str) -> str:
    """Measure the teacher or a student as the comparison starts."""
    from tasks import write_json

    path = folder / name / "test.json"
    if not path.is_file():
        write_json(path, measure_model(folder, task_name, name))
    return name


def measure(task, folder: Path, tokenizer, model, teacher, split: str, seeds: tuple[int, ...]) -> dict[str, Any]:
    """Means with intervals over prompts, and the values of each prompt."""
    from minillm_trl.data import unique_prompts
    from minillm_trl.evaluation.divergence import token_divergences
    from minillm_trl.evaluation.evaluate import evaluate_model
    from minillm_trl.evaluation.metrics import distinct_ngrams
    from minillm_trl.evaluation.statistics import bootstrap_interval
    from minillm_trl.models.teacher import shared_vocab_size
    from minillm_trl.rollouts.prompts import encode_prompts, generate_completions

    prompts = unique_prompts(task.load_data(folder)[split])
    limit = task.max_completion_length
    evaluation = evaluate_model(
        model, tokenizer, prompts, seeds=seeds, max_new_tokens=limit, batch_size=128, teacher=teacher, progress=False
    )
    per_prompt = evaluation.per_prompt
    for values, sample in zip(per_prompt, evaluation.samples, strict=True):
        values["distinct_ngrams"] = distinct_ngrams(sample["outputs"], DIVERSITY_NGRAM)
    if teacher is not None:  # forward KL, on the teacher's completions
        texts = prompts["prompt"][:]
        completions = generate_completions(
            teacher, tokenizer, texts, max_new_tokens=limit, seed=seeds[0], batch_size=128
        )
        divergences = token_divergences(
            teacher,
            model,
            encode_prompts(tokenizer, texts),
            [completion.token_ids for completion in completions],
            vocab_size=shared_vocab_size(model, teacher, tokenizer),
            batch_size=128,
        )
        for values, divergence in zip(per_prompt, divergences, strict=True):
            values["forward_kl"] = sum(divergence)
    summary = {name: bootstrap_interval([row[name] for row in per_prompt])._asdict() for name in per_prompt[0]}
    return {"summary": summary, "per_prompt": per_prompt}


def validation_scores(folder: Path, task: str, method: str) -> dict[float, float]:
    """Rouge-L on the validation prompts at the first training seed, of each learning rate that was tried."""
    runs = {rate: finished(folder, Run(task, method, rate, SEEDS[0]), "train") for rate in LEARNING_RATES}
    return {rate: run["validation"]["rouge_l"] for rate, run in runs.items() if run is not None}


def rates_to_try(scores: dict[float, float]) -> list[float]:
    """The first rates, then the next higher one of the best; none once they have been tried."""
    if missing := [rate for rate in LEARNING_RATES[FIRST_RATES] if rate not in scores]:
        return missing
    best = LEARNING_RATES.index(max(scores, key=scores.__getitem__))
    return [rate for rate in LEARNING_RATES[best : best + 2] if rate not in scores]


def best_learning_rates(folder: Path, task: str, methods: list[str]) -> dict[str, float]:
    """Of each method, the rate with the highest Rouge-L on the validation prompts at the first training seed."""
    scores = {method: validation_scores(folder, task, method) for method in methods}
    if missing := [method for method, found in scores.items() if not found]:
        raise SystemExit(f"{folder} has no runs of {missing[0]}: run.py makes them, or leave it out of --methods.")
    return {method: max(found, key=found.__getitem__) for method, found in scores.items()}


def run_all(pool: ProcessPoolExecutor, title: str, function: Any, jobs: list[tuple]) -> None:
    """Run the jobs of one stage, and stop behind it if one has failed: the others' results are kept."""
    from tqdm.auto import tqdm

    futures = {pool.submit(function, *job): job for job in jobs}
    failed = []
    with tqdm(total=len(jobs), desc=title, unit=" runs") as bar:
        for future in as_completed(futures):
            if (error := future.exception()) is not None:
                failed.append(f"{futures[future]}: {error!r}\n{''.join(traceback.format_exception(error)[-3:])}")
            else:
                bar.set_postfix_str(future.result(), refresh=False)
            bar.update(1)
    if failed:
        raise SystemExit("\n".join([f"{len(failed)} of {len(jobs)} runs failed:", *failed]))


def main() -> None:
    from methods import METHODS
    from tasks import TASKS, prepare_dolly

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="e2e")
    parser.add_argument("--dolly", help="local copy of databricks-dolly-15k.jsonl, which is on the hub")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    folder, task, methods = arguments.runs / arguments.task, arguments.task, arguments.methods
    if task == "dolly":
        prepare_dolly(folder, arguments.dolly)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.workers, mp_context=context, initializer=start_worker) as pool:
        names = ["teacher", *(f"sft-{seed}" for seed in SEEDS)]
        pool.submit(prepare_tokenizer, task, folder).result()
        run_all(pool, "teacher and students", prepare, [(task, folder, name) for name in names])
        while grid := [
            Run(task, method, rate, SEEDS[0])
            for method in methods
            for rate in rates_to_try(validation_scores(folder, task, method))
        ]:
            run_all(pool, "learning rates", train_run, [(folder, run) for run in grid])
        rates = best_learning_rates(folder, task, methods)
        runs = [Run(task, method, rates[method], seed) for seed in SEEDS for method in methods]
        run_all(pool, "training seeds", train_run, [(folder, run) for run in runs])
        run_all(pool, "tests of the start", test_start, [(folder, task, name) for name in names])
        run_all(pool, "tests", test_run, [(folder, run) for run in runs])


if __name__ == "__main__":
    main()
