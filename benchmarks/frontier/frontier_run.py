"""Claim: at equal entropy, and at each method's best temperature, does MiniLLM's student lead?

    python benchmarks/frontier/frontier_run.py [--methods sft minillm ...]   # one process for each free core

Teacher, students and data are those of `benchmarks/quality`, under `runs/quality/e2e`. Finished runs are kept; a
process takes the first run that is neither finished nor held by another process, so processes may be stopped and
started at any time. In order:

1. Each method at the first training seed: three learning rates, then the neighbours of the best while it is the lowest
   or the highest tried. The criterion is Rouge-L on the validation prompts at equal entropy, the mean over 0.2 to 0.6
   nats a token, so that it favours no temperature. `FIXED_RATES` has the exception.
2. The methods of the main table at their best rate for the other training seeds.
3. Teacher, students and these runs on the test prompts, at every temperature.

Each process has one thread. `frontier_summary.py` makes `results/frontier_e2e.json`, the tables and the figure.
"""

import argparse
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from frontier_methods import FIXED_RATES, MAIN, METHODS  # which puts the quality benchmark's folder on the path
from run import SEEDS, start_worker

TASK = "e2e"
TEMPERATURES = (1.0, 0.85, 0.7, 0.55, 0.4)
GREEDY = "greedy"
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES = slice(2, 5)
VALIDATION_SEEDS = (1, 2)
TEST_SEEDS = (10, 20, 30)
ENTROPIES = np.linspace(0.2, 0.6, 9)  # nats a token
Values = dict[str, dict[str, list[float]]]  # by decoding and measure, one number per prompt


class Run(NamedTuple):
    """One training run."""

    method: str
    learning_rate: float
    seed: int

    @property
    def name(self) -> str:
        return f"{self.method}-{self.learning_rate:g}-{self.seed}"


def identity(run: Run) -> dict[str, Any]:
    """All that the numbers of a run depend on, except for the code."""
    from tasks import TASKS

    settings = {"run": run._asdict(), "method": asdict(METHODS[run.method]), "task": asdict(TASKS[TASK])}
    del settings["method"]["label"]
    return json.loads(json.dumps(settings))


def finished(folder: Path, run: Run) -> dict[str, Any] | None:
    """Return the record of the run's training, if it is there and was made with the same settings."""
    path = folder / "frontier" / run.name / "train.json"
    if not path.is_file():
        return None
    record = json.loads(path.read_text())
    return record if record["identity"] == identity(run) else None


def at_equal_entropy(values: Values) -> float:
    """Return Rouge-L at the entropies of `ENTROPIES`, interpolated between the temperatures, as a mean.

    Beyond the temperatures tried, the value of the nearest one counts.
    """
    points = sorted(
        (np.mean(found["entropy_per_token"]), np.mean(found["rouge_l"]))
        for decoding, found in values.items()
        if decoding != GREEDY
    )
    return float(np.interp(ENTROPIES, *zip(*points, strict=True)).mean())


def measure(folder: Path, model: Any, teacher: Any, split: str, seeds: Sequence[int]) -> Values:
    """Return the measures of each prompt at every temperature and with greedy decoding.

    Divergences are from the teacher at temperature 1.
    """
    from tasks import TASKS, make_tokenizer
    from tqdm.auto import tqdm

    from minillm_trl.data import unique_prompts
    from minillm_trl.evaluation.metrics import distinct_ngrams, self_bleu
    from minillm_trl.evaluation.task_measures import TaskMeasures

    task, bar = TASKS[TASK], tqdm(disable=True)
    tokenizer, prompts = make_tokenizer(task, folder), unique_prompts(task.load_data(folder)[split])
    decoding = {"max_new_tokens": task.max_completion_length, "batch_size": 256, "eos_tokens": None}
    decoding["chat_template_kwargs"] = None
    values: Values = {}
    for temperature in (*TEMPERATURES, GREEDY):
        greedy = temperature == GREEDY
        options = {**decoding, "temperature": 1.0 if greedy else temperature}
        measures = TaskMeasures(model, teacher, tokenizer, prompts, options, 1.0, 0)
        records = [measures.measure_samples(seed, bar) for seed in ([None] if greedy else seeds)]
        scores = [[record["scores"] for record in records_of_seed] for records_of_seed in records]
        found = {
            name: np.mean([[row[name] for row in rows] for rows in scores], axis=0).tolist() for name in scores[0][0]
        }
        if not greedy:
            outputs = [[record["output"] for record in row] for row in zip(*records, strict=True)]
            found["distinct_4grams"] = [distinct_ngrams(texts, 4) for texts in outputs]
            found["self_bleu"] = [self_bleu(texts) for texts in outputs]
            found["best_rouge_l"] = np.max([[row["rouge_l"] for row in rows] for rows in scores], axis=0).tolist()
            if teacher is not None:
                found["largest_kl"] = np.max([[row["reverse_kl"] for row in rows] for rows in scores], axis=0).tolist()
                if temperature == 1:
                    forward = measures.measure_forward_kl(teacher, seeds[0], bar)
                    found["forward_kl"] = [row["forward_kl"] for row in forward]
        values[str(temperature)] = found
    return values


def train_run(folder: Path, run: Run) -> None:
    """Train, measure on the validation prompts, and keep the model."""
    from measurement import commit
    from methods import train
    from tasks import TASKS, load_model, make_tokenizer, write_json

    here = folder / "frontier" / run.name
    shutil.rmtree(here / "model", ignore_errors=True)
    task = TASKS[TASK]
    tokenizer, teacher = make_tokenizer(task, folder), load_model(folder, "teacher")
    student = load_model(folder, f"sft-{run.seed}")
    method = METHODS[run.method]
    # `train` reads the data and SeqKD's answers from the parent of the folder it is given
    seconds = train(method, task, folder / run.name, student, teacher, tokenizer, run.learning_rate, run.seed)
    shutil.rmtree(folder / run.name, ignore_errors=True)
    student.save_pretrained(here / "model")
    validation = measure(folder, student, None, "validation", VALIDATION_SEEDS)
    record = {"identity": identity(run), "commit": commit(), "cpu_seconds": seconds}
    record["at_equal_entropy"] = at_equal_entropy(validation)
    record["validation"] = {
        decoding: {name: float(np.mean(numbers)) for name, numbers in found.items()}
        for decoding, found in validation.items()
    }
    write_json(here / "train.json", record)


def test_model(folder: Path, name: str) -> None:
    """Measure a model on the test prompts, and the models of the start on the validation prompts too."""
    from tasks import load_model, write_json

    in_frontier = not (folder / name / "stage.json").is_file()
    where = f"frontier/{name}" if in_frontier else name
    model, teacher = load_model(folder, where), load_model(folder, "teacher")
    record: dict[str, Any] = {"test": measure(folder, model, teacher, "test", TEST_SEEDS)}
    if not in_frontier:
        found = measure(folder, model, None, "validation", VALIDATION_SEEDS)
        record["at_equal_entropy"] = at_equal_entropy(found)
        record["validation"] = {
            decoding: {measure_: float(np.mean(numbers)) for measure_, numbers in values.items()}
            for decoding, values in found.items()
        }
    write_json(folder / "frontier" / name / "test.json", record)


def scores_by_rate(folder: Path, method: str) -> dict[float, float]:
    """Return the criterion of every rate tried at the first training seed, in the order of the rates."""
    records = {rate: finished(folder, Run(method, rate, SEEDS[0])) for rate in LEARNING_RATES}
    return {rate: record["at_equal_entropy"] for rate, record in records.items() if record is not None}


def rates_to_try(method: str, scores: dict[float, float]) -> list[float]:
    """Return the first rates that are missing, then the neighbours of the best one that were not tried."""
    if method in FIXED_RATES:
        return [rate for rate in [FIXED_RATES[method]] if rate not in scores]
    if missing := [rate for rate in LEARNING_RATES[FIRST_RATES] if rate not in scores]:
        return missing
    best = LEARNING_RATES.index(max(scores, key=scores.__getitem__))
    return [rate for rate in LEARNING_RATES[max(best - 1, 0) : best + 2] if rate not in scores]


def best_rate(folder: Path, method: str) -> float | None:
    """Return the best learning rate, or None while the search goes on."""
    scores = scores_by_rate(folder, method)
    return None if rates_to_try(method, scores) else max(scores, key=scores.__getitem__)


def jobs(folder: Path, methods: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yield name and function of every job that can start and is not finished, the most urgent first."""
    main = [name for name in methods if name in MAIN]
    for group in (main, [name for name in methods if name not in MAIN]):
        for method in group:
            for rate in rates_to_try(method, scores_by_rate(folder, method)):
                run = Run(method, rate, SEEDS[0])
                yield run.name, partial(train_run, folder, run)
        if group is main:
            yield from _jobs_of_the_main_table(folder, main)


def _jobs_of_the_main_table(folder: Path, main: list[str]) -> Iterator[tuple[str, Callable[[], None]]]:
    chosen = [(method, rate) for method in main if (rate := best_rate(folder, method)) is not None]
    runs = [Run(method, rate, seed) for seed in SEEDS for method, rate in chosen]
    for run in runs:
        if finished(folder, run) is None:
            yield run.name, partial(train_run, folder, run)
    for name in ("teacher", *(f"sft-{seed}" for seed in SEEDS), *(run.name for run in runs)):
        if not (folder / "frontier" / name / "test.json").is_file():
            yield name, partial(test_model, folder, name)


def work(folder: Path, methods: list[str]) -> None:
    """Take jobs until none is left; wait while other processes hold all that can start."""
    (folder / "frontier" / "locks").mkdir(parents=True, exist_ok=True)
    while todo := list(jobs(folder, methods)):
        if not any(_take(folder, name, function) for name, function in todo):
            time.sleep(5)


def _take(folder: Path, name: str, function: Callable[[], None]) -> bool:
    """Run a job unless another process holds it or has just finished it; return whether it ran."""
    with (folder / "frontier" / "locks" / name).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        start = time.process_time()
        function()
        print(
            f"{time.strftime('%H:%M')} {name} {function.func.__name__} {time.process_time() - start:.0f} CPU-s",
            flush=True,
        )
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start_worker()
    work(arguments.runs / TASK, arguments.methods)


if __name__ == "__main__":
    main()
