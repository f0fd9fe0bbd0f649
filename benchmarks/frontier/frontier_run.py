"""Claim: at equal entropy, and at each method's best temperature, does MiniLLM's student lead?

    python benchmarks/frontier/frontier_run.py [--task e2e] [--methods sft minillm ...]  # a process for each free core

Teacher, students and data are those of `benchmarks/quality`, under `runs/quality/TASK`; what is missing is made. In
order:

1. Each method at the first training seed: two learning rates, then the neighbours of the best while it is the lowest
   or the highest tried. The criterion is Rouge-L on the validation prompts at equal entropy, the mean over 0.2 to 0.6
   nats a token, so that it favours no temperature. `FIXED_RATES` has the exception.
2. The methods of the main table, and those of the family, at their best rate for the other training seeds.
3. Teacher, students and these runs on the test prompts, at every temperature.
4. The ablations, as in 1.

`results/frontier/TASK/NAME.json` has the numbers of a run as soon as it is finished. Finished runs are not repeated,
also in another checkout. A process takes the first job that is neither finished nor held by another process. Each has
one thread. `frontier_summary.py` makes `results/frontier_TASK.json`, the tables and the figure.
"""

import argparse
import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from frontier_methods import FAMILY, FIXED_RATES, MAIN, METHODS  # puts the quality benchmark's folder on the path
from run import SEEDS, prepare, prepare_tokenizer, start_worker

sys.path.insert(0, str(Path(__file__).parents[1]))

from resumable_jobs import Job, Run, read_record, work, write_record_of_run

RESULTS = Path(__file__).parents[1] / "results"
TEMPERATURES = (1.0, 0.85, 0.7, 0.55, 0.4)
GREEDY = "greedy"
LEARNING_RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
FIRST_RATES = slice(3, 5)
VALIDATION_SEEDS = (1, 2)
TEST_SEEDS = (10, 20, 30)
ENTROPIES = np.linspace(0.2, 0.6, 9)  # nats a token
STARTS = ("teacher", *(f"sft-{seed}" for seed in SEEDS))
Values = dict[str, dict[str, list[float]]]  # by decoding and measure, one number per prompt


@dataclass(frozen=True)
class Benchmark:
    """Where everything lies.

    Attributes:
        task_name: a key of the quality benchmark's tasks.
        folder: the task's models and data.
        results: the folder of the records.
    """

    task_name: str
    folder: Path
    results: Path = RESULTS

    @cached_property
    def task(self) -> Any:
        from tasks import TASKS

        return TASKS[self.task_name]

    def record(self, name: str) -> dict[str, Any]:
        """Return what is known of a run, or of a model of the start."""
        return read_record(self.results / "frontier" / self.task_name / f"{name}.json")

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a run, with five digits."""
        write_record_of_run(self.results / "frontier" / self.task_name / f"{name}.json", _rounded(record))

    @cached_property
    def first_search(self) -> dict[str, dict[str, float]]:
        """The criterion by method and rate in the first table, whose runs were not kept; it had another teacher."""
        rows = read_record(self.results / f"frontier_{self.task_name}_first.json").get("results", {}).get("rows", {})
        return {name: row["validation_at_equal_entropy"] for name, row in rows.items() if "learning_rate" in row}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def identity(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """Return all that the numbers of a run depend on, except for the code."""
    settings = {
        "run": run._asdict(),
        "method": asdict(METHODS[run.method]),
        "task": asdict(benchmark.task),
    }
    del settings["method"]["label"]
    return json.loads(json.dumps(settings))


def finished(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """Return the record of the run if it was trained with the same settings, else an empty one."""
    record = benchmark.record(run.name)
    return record if record.get("identity") == _rounded(identity(benchmark, run)) else {}


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


def measure(benchmark: Benchmark, model: Any, teacher: Any, split: str, seeds: Sequence[int]) -> Values:
    """Return the measures of each prompt at every temperature and with greedy decoding.

    Divergences are from the teacher at temperature 1.
    """
    from tasks import make_tokenizer
    from tqdm.auto import tqdm

    from minillm_trl.data import unique_prompts
    from minillm_trl.evaluation.metrics import distinct_ngrams, self_bleu
    from minillm_trl.evaluation.task_measures import TaskMeasures

    task, folder, bar = benchmark.task, benchmark.folder, tqdm(disable=True)
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


def means(values: Values) -> dict[str, dict[str, float]]:
    """Return the mean of each measure over the prompts."""
    return {
        decoding: {name: float(np.mean(numbers)) for name, numbers in found.items()}
        for decoding, found in values.items()
    }


def train_run(benchmark: Benchmark, run: Run) -> None:
    """Train, measure on the validation prompts, and keep the model."""
    from measurement import commit
    from methods import train
    from tasks import load_model, make_tokenizer

    folder, task = benchmark.folder, benchmark.task
    model = folder / "frontier" / run.name / "model"
    shutil.rmtree(model, ignore_errors=True)
    tokenizer, teacher = make_tokenizer(task, folder), load_model(folder, "teacher")
    student = load_model(folder, f"sft-{run.seed}")
    method = METHODS[run.method]
    # `train` reads the data and SeqKD's answers from the parent of the folder it is given
    seconds = train(method, task, folder / run.name, student, teacher, tokenizer, run.learning_rate, run.seed)
    shutil.rmtree(folder / run.name, ignore_errors=True)
    student.save_pretrained(model)
    validation = measure(benchmark, student, None, "validation", VALIDATION_SEEDS)
    benchmark.write(
        run.name,
        {
            "identity": identity(benchmark, run),
            "commit": commit(),
            "cpu_seconds": seconds,
            "at_equal_entropy": at_equal_entropy(validation),
            "validation": means(validation),
        },
    )


def test_model(benchmark: Benchmark, name: str) -> None:
    """Measure a model on the test prompts, and the models of the start on the validation prompts too."""
    from tasks import load_model

    folder = benchmark.folder
    model = load_model(folder, name if name in STARTS else f"frontier/{name}")
    record = benchmark.record(name)
    if name in STARTS:
        validation = measure(benchmark, model, None, "validation", VALIDATION_SEEDS)
        record |= {"at_equal_entropy": at_equal_entropy(validation), "validation": means(validation)}
        record["parameters"] = model.num_parameters()
    record["test"] = measure(benchmark, model, load_model(folder, "teacher"), "test", TEST_SEEDS)
    benchmark.write(name, record)


def scores_by_rate(benchmark: Benchmark, method: str) -> dict[float, float]:
    """Return the criterion of every rate tried at the first training seed, in the order of rates.

    Methods of the first table keep the scores of its search, so that their rates do not depend on these runs.
    """
    if method in benchmark.first_search:
        first = benchmark.first_search[method]
        return {rate: first[f"{rate:g}"] for rate in LEARNING_RATES if f"{rate:g}" in first}
    records = {rate: finished(benchmark, Run(method, rate, SEEDS[0])) for rate in LEARNING_RATES}
    return {rate: record["at_equal_entropy"] for rate, record in records.items() if record}


def rates_to_try(method: str, scores: dict[float, float]) -> list[float]:
    """Return the first rates that are missing, then the neighbours of the best one that were not tried."""
    if method in FIXED_RATES:
        return [rate for rate in [FIXED_RATES[method]] if rate not in scores]
    if missing := [rate for rate in LEARNING_RATES[FIRST_RATES] if rate not in scores]:
        return missing
    best = LEARNING_RATES.index(max(scores, key=scores.__getitem__))
    return [rate for rate in LEARNING_RATES[max(best - 1, 0) : best + 2] if rate not in scores]


def best_rate(benchmark: Benchmark, method: str) -> float | None:
    """Return the best learning rate, or None while the search goes on."""
    scores = scores_by_rate(benchmark, method)
    return None if rates_to_try(method, scores) else max(scores, key=scores.__getitem__)


def jobs(benchmark: Benchmark, methods: list[str]) -> Iterator[Job]:
    """Yield every job that can start and is not finished, the most urgent first."""
    tested = [name for name in methods if name in MAIN or name in FAMILY]
    for group in (tested, [name for name in methods if name not in tested]):
        for method in group:
            for rate in rates_to_try(method, scores_by_rate(benchmark, method)):
                run = Run(method, rate, SEEDS[0])
                yield run.name, partial(train_run, benchmark, run)
        if group is tested:
            yield from _tests(benchmark, tested)


def _tests(benchmark: Benchmark, methods: list[str]) -> Iterator[Job]:
    """Yield the other training seeds of methods whose best rate is known, and the tests of all that is trained."""
    chosen = [(method, rate) for method in methods if (rate := best_rate(benchmark, method)) is not None]
    runs = [Run(method, rate, seed) for seed in SEEDS for method, rate in chosen]
    for name in STARTS if methods else ():
        if "test" not in benchmark.record(name):
            yield name, partial(test_model, benchmark, name)
    for run in runs:
        has_model = (benchmark.folder / "frontier" / run.name / "model").is_dir()
        record = finished(benchmark, run)
        if "test" in record:
            continue
        if record and has_model:
            yield f"{run.name}-test", partial(test_model, benchmark, run.name)
        else:
            yield run.name, partial(train_run, benchmark, run)


def prepare_starts(benchmark: Benchmark, dolly: str | None) -> None:
    """Train tokenizer, teacher and students that are missing."""
    from tasks import prepare_dolly

    folder, task = benchmark.folder, benchmark.task
    if benchmark.task_name == "dolly" and not (folder / "data").is_dir():
        prepare_dolly(folder, dolly)
    if task.teacher_of is not None and not (folder.parent / task.teacher_of / "teacher" / "stage.json").is_file():
        raise SystemExit(f"run the task {task.teacher_of} first: it makes the teacher")
    prepare_tokenizer(benchmark.task_name, folder)
    for name in STARTS:
        if not (folder / name / "stage.json").is_file():
            prepare(benchmark.task_name, folder, name)


def main() -> None:
    from tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="e2e")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--dolly", help="local copy of databricks-dolly-15k.jsonl (default: from the hub)")
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    start_worker()
    benchmark = Benchmark(arguments.task, arguments.runs / arguments.task)
    benchmark.folder.mkdir(parents=True, exist_ok=True)
    with (benchmark.folder / "starts.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        prepare_starts(benchmark, arguments.dolly)
    work(lambda: jobs(benchmark, arguments.methods), benchmark.folder / "frontier" / "locks")


if __name__ == "__main__":
    main()
