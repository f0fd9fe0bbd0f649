"""Claim: with a real language model as teacher and a cut and healed one as student, which method helps where?

    python benchmarks/real/real_run.py --selfinst FILE --vicuna FOLDER  # one process per free core

The teacher is SmolLM2-135M-Instruct, from the hub or `--teacher`. In order:

1. The first stages of `recipes/smollm2-92m`: data, a student of 92M parameters by `shrink`, the teacher's
   answers, healing. Every method starts from the healed student. With `--scale cpu_context`, these of
   `recipes/smollm2-92m-context` follow: prompts with a context, and teacher and student fine-tuned on them; with
   `cpu_context_long`, the student is fine-tuned for twice as long.
2. For each method a few updates to measure the seconds of one, so that all methods train for as long as `Scale` says.
3. Each method at the first training seed and at `LEARNING_RATES`, measured on the validation prompts.
4. Each method at its best rate on the test prompts (`real_measures.py`); then the other training seeds.

Models and data are kept in `--runs`, and `results/real/NAME.json` has the numbers of a run as soon as it is finished.
Finished runs are not repeated, also in another checkout; measures that a record lacks are added while its model
exists. A process takes the first job that is neither finished nor held by another process. `real_summary.py` makes the
tables.
"""

import argparse
import fcntl
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))  # for `measurement`

from real_measures import SOURCES, evaluate, missing_parts, prepare_test_sets
from real_tasks import TASKS, Task
from resumable_jobs import Job, Run, read_record, work, write_record_of_run

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parents[1] / "results" / "real"
SEEDS = (3, 4)
LEARNING_RATES = (3e-4, 1e-4)
PROBE_UPDATES = 4
PACKAGES = ("torch", "transformers", "trl", "accelerate", "minillm-trl")


@dataclass(frozen=True)
class Benchmark:
    """Where everything lies, and how much is computed.

    Attributes:
        folder: the working directory of the recipe's stages and of the runs.
        scale_name: a key of `SCALES`.
        teacher: name or folder of the teacher.
        dolly: a local copy of Dolly; None for the hub.
        test_sets: sources of the other test sets, by their names in `SOURCES`.
    """

    folder: Path
    scale_name: str
    teacher: str
    dolly: Path | None
    test_sets: dict[str, Path] = field(default_factory=dict)

    @cached_property
    def scale(self) -> Any:
        from real_methods import SCALES

        return SCALES[self.scale_name]

    @cached_property
    def task(self) -> Task:
        return TASKS[self.scale.task]

    @property
    def own(self) -> Path:
        """The folder of models and measures; tasks share nothing but the stages."""
        return self.folder if self.scale.task == "short" else self.folder / self.scale.task

    @property
    def data(self) -> Path:
        """The folder of the prompts that the methods are trained and tested on."""
        return self.folder / "data" / self.task.data

    def model(self, name: str) -> Path:
        """Return the folder of a stage's model or of a run's."""
        if name in self.task.stages:
            return self.folder / "runs" / "smollm2" / name
        return self.own / "models" / name

    @cached_property
    def recipe(self) -> dict[str, dict[str, Any]]:
        """The options of the recipe's stages at this scale: what student and teacher's answers depend on."""
        files = {
            path.stem: path for recipe in self.task.recipes for path in (ROOT / "recipes" / recipe).glob("*.yaml")
        }
        return {
            stage: yaml.safe_load(files[stage].read_text()) | self.scale.recipe.get(stage, {})
            for stage in self.task.stages
        }

    def record(self, name: str) -> dict[str, Any]:
        """Return the finished parts of a run, if its student is still made in the same way; an empty one otherwise."""
        record = read_record(RESULTS / self.scale_name / f"{name}.json")
        return record if record.get("recipe") == self.recipe else {}

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Write the record of a run with the facts that every record has."""
        from measurement import commit, machine

        facts = {
            "command": f"python benchmarks/real/real_run.py --scale {self.scale_name}"
            + self.task.has_other_tests * " --selfinst FILE --vicuna FOLDER",
            "commit": commit(),
            "machine": machine(),
            "versions": {name: version(name) for name in PACKAGES},
            "recipe": self.recipe,
        }
        write_record_of_run(RESULTS / self.scale_name / f"{name}.json", facts | record)


def identity(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """Return all that the numbers of a run depend on, except for the recipe, code and machine."""
    from real_methods import METHODS

    method = asdict(METHODS[run.method])
    del method["label"]
    scale = asdict(benchmark.scale)
    del scale["task"]  # the recipe has its stages
    return json.loads(json.dumps({"run": run._asdict(), "method": method, "scale": scale}))


def trained(benchmark: Benchmark, run: Run) -> dict[str, Any]:
    """Return the record of the run if it was trained and validated with these settings, else an empty one."""
    record = benchmark.record(run.name)
    return record if record.get("identity") == identity(benchmark, run) else {}


def run_stages(benchmark: Benchmark, methods: list[str]) -> None:
    """Run the stages of the recipes that are not finished, in the benchmark's folder.

    The teacher's answers are left out if they heal no student and no method takes them.
    """
    from real_methods import METHODS, takes_answers

    from minillm_trl.cli import main as cli

    os.chdir(benchmark.folder)
    for stage, subcommand in benchmark.task.stages.items():
        heals = stage == TASKS["short"].answers
        if stage == benchmark.task.answers and not (heals or any(takes_answers(METHODS[name]) for name in methods)):
            continue
        done = benchmark.folder / "stages" / f"{stage}.json"
        values = dict(benchmark.recipe[stage])
        if stage == "teacher":
            values["model"] = benchmark.teacher
        if subcommand == "prepare-data" and benchmark.dolly is not None:
            values["source"] = str(benchmark.dolly)
        if done.is_file() and json.loads(done.read_text()) == values:
            continue
        config = benchmark.folder / "stages" / f"{stage}.yaml"
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(yaml.safe_dump({name: value for name, value in values.items() if value is not None}))
        words = ["--resume_from_checkpoint", "true"] if subcommand in ("seqkd", "kd", "sft") else []
        if cli([subcommand, "--config", str(config), *words]) != 0:
            raise SystemExit(f"stage {stage} failed")
        done.write_text(json.dumps(values))


def train(benchmark: Benchmark, run: Run, updates: int) -> tuple[Any, float]:
    """Train the student that every method starts from.

    Returns:
        `tuple[PreTrainedModel, float]`: the student, and the seconds of the updates.
    """
    import random

    import torch
    from real_methods import METHODS, Data, cut_conversations, make_trainer, takes_answers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from minillm_trl.data import load_examples

    torch.manual_seed(run.seed)
    random.seed(run.seed)  # GKD tosses its coins with it
    columns = ["prompt", "completion"]
    human = load_examples(benchmark.data, split="train")
    answers = None
    if takes_answers(METHODS[run.method]):
        folder = benchmark.folder / "runs" / "smollm2" / f"{benchmark.task.answers}_teacher_data"
        answers = load_examples(folder, split="train").select_columns(columns)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(benchmark.model(name), dtype=torch.float32)
        for name in (benchmark.task.start, benchmark.task.teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(benchmark.model(benchmark.task.start))
    messages = cut_conversations(human, tokenizer, benchmark.scale.answer_tokens)
    data = Data(human.select_columns(columns), answers, messages)
    arguments = {
        "output_dir": str(benchmark.own / "trainer" / run.name),
        "max_steps": updates,
        "learning_rate": run.learning_rate,
        "seed": run.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": torch.cuda.is_available(),
    }
    timer = _timer()
    make = make_trainer(METHODS[run.method], benchmark.scale, data, arguments)
    trainer = make(model=student, teacher_model=teacher, processing_class=tokenizer, callbacks=[timer])
    trainer.train()
    shutil.rmtree(arguments["output_dir"], ignore_errors=True)
    return student, timer.seconds


def _timer() -> Any:
    """Return a callback with the seconds of the updates: CPU time without a GPU, since other work hardly counts."""
    import torch
    from transformers import TrainerCallback

    clock = time.perf_counter if torch.cuda.is_available() else time.process_time

    class Timer(TrainerCallback):
        seconds = 0.0

        def on_train_begin(self, *unused: Any, **unused_too: Any) -> None:
            self.seconds = -clock()

        def on_train_end(self, *unused: Any, **unused_too: Any) -> None:
            self.seconds += clock()

    return Timer()


def probe(benchmark: Benchmark, method: str) -> None:
    """Measure the seconds of an update of the method."""
    from real_methods import METHODS

    updates = max(PROBE_UPDATES, METHODS[method].multiple)
    _, seconds = train(benchmark, Run(method, LEARNING_RATES[0], SEEDS[0]), updates)
    benchmark.write(f"probe-{method}", {"updates": updates, "seconds_per_update": seconds / updates})


def train_run(benchmark: Benchmark, run: Run) -> None:
    """Train, keep the model, and measure it on the validation prompts."""
    from real_methods import METHODS

    multiple = METHODS[run.method].multiple
    seconds_per_update = benchmark.record(f"probe-{run.method}")["seconds_per_update"]
    updates = max(1, round(benchmark.scale.seconds / seconds_per_update / multiple)) * multiple
    student, seconds = train(benchmark, run, updates)
    from transformers import AutoTokenizer

    student.save_pretrained(benchmark.model(run.name))
    AutoTokenizer.from_pretrained(benchmark.model(benchmark.task.start)).save_pretrained(benchmark.model(run.name))
    del student
    gc.collect()
    record = {"identity": identity(benchmark, run), "updates": updates, "seconds": seconds}
    record["validation"] = evaluate(benchmark, run.name, "validation")
    benchmark.write(run.name, record)


def healing_record(benchmark: Benchmark) -> dict[str, Any]:
    """Return the seconds of the teacher's answers and of healing, and the forward KL in its logs, nats a token.

    A stage that was interrupted and resumed has no time.
    """
    runs = benchmark.folder / "runs" / "smollm2"
    attempts = {
        stage: json.loads((runs / stage / "run.json").read_text())["attempts"] for stage in ("answers", "heal")
    }
    seconds = {stage: found[0]["seconds"]["total"] for stage, found in attempts.items() if len(found) == 1}
    (checkpoint,) = (runs / "heal").glob("checkpoint-*")
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return {"seconds": seconds, "forward_kl": [row["kd/forward_kl"] for row in history if "kd/forward_kl" in row]}


def test_model(benchmark: Benchmark, name: str) -> None:
    """Measure what the record of a model lacks. Each part is in the record as soon as it is measured."""
    is_stage = name in benchmark.task.stages  # runs of methods were validated after training
    if is_stage and "validation" not in benchmark.record(name):
        benchmark.write(name, benchmark.record(name) | {"validation": evaluate(benchmark, name, "validation")})
    if name == "heal" and "healing" not in benchmark.record(name):
        benchmark.write(name, benchmark.record(name) | {"healing": healing_record(benchmark)})
    for part, measure in missing_parts(benchmark, name).items():
        benchmark.write(name, benchmark.record(name) | {part: measure(benchmark, name)})


def best_rate(benchmark: Benchmark, method: str) -> float | None:
    """Return the rate with the highest mean validation Rouge-L over the decodings; None while the search lasts."""
    scores = {}
    for rate in LEARNING_RATES:
        if not (record := trained(benchmark, Run(method, rate, SEEDS[0]))):
            return None
        values = [sum(found["rouge_l"]) / len(found["rouge_l"]) for found in record["validation"].values()]
        scores[rate] = sum(values) / len(values)
    return max(scores, key=scores.__getitem__)


def jobs(benchmark: Benchmark, methods: list[str]) -> Iterator[Job]:
    """Yield name and function of every job that can start and is not finished, the most urgent first."""
    for name in (benchmark.task.start, benchmark.task.teacher):
        if missing_parts(benchmark, name):
            yield name, partial(test_model, benchmark, name)
    for method in methods:
        if not benchmark.record(f"probe-{method}"):
            yield f"probe-{method}", partial(probe, benchmark, method)
    probed = [method for method in methods if benchmark.record(f"probe-{method}")]
    for rate in LEARNING_RATES:
        yield from _runs(benchmark, [Run(method, rate, SEEDS[0]) for method in probed], test=rate == LEARNING_RATES[0])
    best = {method: rate for method in probed if (rate := best_rate(benchmark, method)) is not None}
    for seed in SEEDS:
        yield from _runs(benchmark, [Run(method, rate, seed) for method, rate in best.items()], test=True)


def _runs(benchmark: Benchmark, runs: list[Run], test: bool) -> Iterator[Job]:
    for run in runs:
        record, has_model = trained(benchmark, run), benchmark.model(run.name).is_dir()
        if not record or (test and "test" not in record and not has_model):
            yield run.name, partial(train_run, benchmark, run)
        elif test and has_model and missing_parts(benchmark, run.name):
            yield run.name, partial(test_model, benchmark, run.name)


def print_incomplete(benchmark: Benchmark) -> None:
    """Print which records of tested models lack measures that cannot be added, since the model is not there."""
    for path in sorted((RESULTS / benchmark.scale_name).glob("*.json")):
        folder, tested = benchmark.model(path.stem), "test" in benchmark.record(path.stem)
        if tested and not folder.is_dir() and (parts := missing_parts(benchmark, path.stem)):
            print(f"{path.stem} lacks {', '.join(parts)}, and {folder} is missing. Delete {path} to train again.")


def main() -> None:
    from real_methods import METHODS, SCALES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), metavar="METHOD")
    parser.add_argument("--runs", type=Path, default=Path("runs/real"))
    parser.add_argument("--teacher", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="name or folder")
    parser.add_argument("--dolly", type=Path, help="local copy of databricks-dolly-15k.jsonl (default: from the hub)")
    for name, source in SOURCES.items():
        parser.add_argument(f"--{name}", type=Path, help=source)
    parser.add_argument("--skip", choices=SOURCES, nargs="+", default=[], help="test sets to leave out")
    arguments = parser.parse_args()
    has_other_tests = TASKS[SCALES[arguments.scale].task].has_other_tests
    test_sets = {name: path.resolve() for name in SOURCES if (path := getattr(arguments, name)) is not None}
    for name, source in SOURCES.items():
        if has_other_tests and (name in test_sets) == (name in arguments.skip):
            parser.error(f"give either --{name} ({source}) or --skip {name}, which leaves this test set out")
    folder = arguments.runs.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    dolly = arguments.dolly and arguments.dolly.resolve()
    benchmark = Benchmark(folder, arguments.scale, arguments.teacher, dolly, test_sets)
    with (folder / "stages.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        run_stages(benchmark, arguments.methods)
        prepare_test_sets(benchmark)
    print_incomplete(benchmark)
    work(lambda: jobs(benchmark, arguments.methods), benchmark.own / "locks")


if __name__ == "__main__":
    main()
