"""Claim: MiniLLM reaches the reverse KL of TRL's DistillationTrainer(beta=1) sooner, with at least its Rouge-L.

    python benchmarks/same_kl.py [--seeds 0 1 2] [--runs runs/same_kl]

Both methods use the E2E demo task with the same student, teacher, prompts, batch size, optimizer and schedule. Ours
has the geometry of `recipes/e2e_demo/minillm.yaml`: 128 rollouts, four passes over them. The rival minimises the
reverse KL of each next-token distribution on 32 fresh samples of the student in every update, without settings that
would only slow it down here (bf16, gradient checkpointing). There are two architectures: `rotary`, the demo's, and
`gpt2`, whose learned positions handicap the rival. TRL 1.16 scores left-padded prompts without `position_ids`, so its
loss sees shifted positions and its sampling correct ones. Only `rotary` compares the methods themselves.

Teacher and student of each architecture are fine-tuned once, with the demo's settings. To use the demo's own models,
copy its folder into the runs: `cp -r runs/demo runs/same_kl/rotary`. Then each method trains with each learning rate,
in a separate process. Complete runs are kept unless their settings, the number of threads or the measured code
changed. The clock covers all of training without start-up and evaluation: a callback stops it and evaluates the
student alone on the validation prompts, with the same random numbers and code for both methods. The learning rate of a
method is the one with the lowest reverse KL at the end of its runs.

The rival's best point is the earliest whose reverse KL is within 2 % of the lowest in its run. Ours has to reach at
most that reverse KL and at least that Rouge-L; the ratio is its seconds over the rival's, or None if it never does.
Writes `results/same_kl.json`, with all curves, and a plot. The machine should be idle.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from measurement import RESULTS, write_record
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging
from trl import DistillationConfig, DistillationTrainer

import minillm_trl
from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import load_e2e, unique_prompts
from minillm_trl.demo import DemoSettings
from minillm_trl.demo.models import build_model, train_tokenizer
from minillm_trl.demo.pipeline import load_model
from minillm_trl.demo.settings import Shape
from minillm_trl.demo.training import train_sft
from minillm_trl.evaluation.evaluate import evaluate_model

PICTURE = RESULTS / "same_kl.png"
METHODS = {"ours": "MiniLLM (ours)", "rival": "DistillationTrainer(beta=1)"}
TOLERANCE = 0.02  # of the rival's lowest reverse KL, so that its last fluctuations are not held against it

COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 32,
    "max_completion_length": DemoSettings.max_completion_length,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "disable_dropout": True,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
ARGUMENTS: dict[str, dict[str, Any]] = {
    "ours": {**COMMON, "steps_per_generation": 4, "num_iterations": 4, "sampling_batch_size": 32},
    "rival": {**COMMON, "beta": 1.0},
}

Point = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """A training run, and everything that its numbers depend on."""

    architecture: str
    method: str
    learning_rate: float
    seed: int
    steps: int
    eval_steps: int
    eval_prompts: int
    eval_samples: int

    @property
    def name(self) -> str:
        return f"{self.architecture}-{self.method}-{self.learning_rate:g}-{self.seed}"

    def identity(self, models: dict[str, Any]) -> dict[str, Any]:
        """Return everything that must be unchanged for a result to be kept."""
        measured = {"ours": package_digest(), "rival": f"trl {version('trl')}"}[self.method]
        return {
            **asdict(self),
            "arguments": ARGUMENTS[self.method],
            "models": models,
            "threads": torch.get_num_threads(),
            "measured": measured,
        }


def package_digest() -> str:
    """Return a hash of the package's source, whose changes invalidate our runs but not the rival's."""
    folder = Path(minillm_trl.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


# Models


def build_gpt2(shape: Shape, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """Build the GPT-2 counterpart of [`build_model`], with about as many parameters and no dropout."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_positions=256,
        n_embd=shape.hidden_size,
        n_layer=shape.num_hidden_layers,
        n_head=shape.num_attention_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return GPT2LMHeadModel(config)


BUILDERS: dict[str, Callable[[Shape, PreTrainedTokenizerBase, int], PreTrainedModel]] = {
    "rotary": build_model,
    "gpt2": build_gpt2,
}


def make_tokenizer(folder: Path, train: Dataset, vocab_size: int) -> PreTrainedTokenizerBase:
    """Make the demo's tokenizer, saved and loaded as in the demo, so that its models can be used."""
    train_tokenizer([*dict.fromkeys(train["prompt"]), *train["completion"]], vocab_size).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder / "teacher" / "model")


def train_models(folder: Path, architecture: str, settings: DemoSettings) -> dict[str, Any]:
    """Fine-tune teacher and student as the demo does, unless they exist; return a description of both.

    Raises:
        ValueError: if the folder has models trained for a different number of updates.
    """
    train = load_e2e()["train"]
    stages = {
        "teacher": (settings.teacher, settings.seed, settings.teacher_steps, settings.teacher_learning_rate),
        "sft": (settings.student, settings.seed + 1, settings.student_steps, settings.student_learning_rate),
    }
    models = {}
    for name, (shape, seed, steps, learning_rate) in stages.items():
        done = folder / name / "stage.json"
        if not done.is_file():
            tokenizer = make_tokenizer(folder / "tokenizer", train, settings.vocab_size)
            model = BUILDERS[architecture](shape, tokenizer, seed)
            title = f"{architecture} {name}"
            record = train_sft(title, folder / name, model, tokenizer, train, settings, steps, learning_rate)
            done.write_text(json.dumps(record, indent=1))
        updates = json.loads(done.read_text())["updates"]
        if updates != steps:
            raise ValueError(f"{folder / name} has {updates} updates and not {steps}: choose other --runs.")
        models[name] = {"updates": updates, "parameters": load_model(folder, name).num_parameters()}
    return models


# One run


class Evaluations(TrainerCallback):
    """Evaluate the student every few updates, outside of the trainer and with the clock stopped."""

    def __init__(self, evaluate: Callable[[PreTrainedModel], Point], every: int, name: str):
        self.evaluate = evaluate
        self.every = every
        self.name = name
        self.points: list[Point] = []
        self.seconds = 0.0
        self.evaluation_seconds = 0.0
        self._started = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        self._measure(model, state)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model=None, **kwargs
    ) -> None:
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        self.seconds += time.perf_counter() - self._started
        self._measure(model, state)

    def _measure(self, model: PreTrainedModel, state: TrainerState) -> None:
        started = time.perf_counter()
        training = model.training
        point = {"seconds": self.seconds, "updates": state.global_step, **self.evaluate(model)}
        model.train(training)
        self.points.append(point)
        print(
            f"{self.name}: {point['seconds']:7.1f} s, update {point['updates']:4d}, reverse KL "
            f"{point['reverse_kl']:.2f}, Rouge-L {point['rouge_l']:.1f}",
            flush=True,
        )
        self._started = time.perf_counter()
        self.evaluation_seconds += self._started - started


def evaluator(
    tokenizer: PreTrainedTokenizerBase, teacher: PreTrainedModel, prompts: Dataset, samples: int
) -> Callable[[PreTrainedModel], Point]:
    def evaluate(student: PreTrainedModel) -> Point:
        evaluation = evaluate_model(
            student,
            tokenizer,
            prompts,
            seeds=range(samples),  # the same random numbers at every point of every run
            max_new_tokens=DemoSettings.max_completion_length,
            batch_size=128,
            teacher=teacher,
            progress=False,
        )
        per_prompt = {key: [row[key] for row in evaluation.per_prompt] for key in ("reverse_kl", "rouge_l")}
        point = {key: evaluation.summary[key].mean for key in ("reverse_kl", "rouge_l", "length", "eos_rate")}
        errors = {f"{key}_standard_error": standard_error(values) for key, values in per_prompt.items()}
        return {**point, **errors, "per_prompt": per_prompt}

    return evaluate


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean over prompts."""
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def make_trainer(
    run: Run,
    folder: Path,
    models: Path,
    tokenizer: PreTrainedTokenizerBase,
    teacher: PreTrainedModel,
    callback: Evaluations,
) -> Trainer:
    config, trainer = {
        "ours": (MiniLLMConfig, MiniLLMTrainer),
        "rival": (DistillationConfig, DistillationTrainer),
    }[run.method]
    args = config(
        str(folder / run.name),
        max_steps=run.steps,
        learning_rate=run.learning_rate,
        seed=run.seed,
        **ARGUMENTS[run.method],
    )
    return trainer(
        model=load_model(models, "sft"),
        teacher_model=teacher,
        args=args,
        train_dataset=unique_prompts(load_e2e()["train"]).select_columns(["prompt"]),
        processing_class=tokenizer,
        callbacks=[callback],
    )


def execute(run: Run, folder: Path, identity: dict[str, Any]) -> None:
    """Train once and save the points; runs in a separate process."""
    models = folder / run.architecture
    tokenizer, teacher = load_tokenizer(models), load_model(models, "teacher")
    data = unique_prompts(load_e2e()["validation"])
    prompts = data.select(range(min(run.eval_prompts, len(data))))
    evaluate = evaluator(tokenizer, load_model(models, "teacher"), prompts, run.eval_samples)
    callback = Evaluations(evaluate, run.eval_steps, run.name)
    trainer = make_trainer(run, folder, models, tokenizer, teacher, callback)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    result = {
        "identity": identity,
        "commit": commit(),
        "prompts": len(prompts),
        "evaluation_seconds": callback.evaluation_seconds,
        "points": callback.points,
    }
    path = result_path(folder, run)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(result))
    os.replace(partial, path)


def commit() -> str:
    revision = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    return subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()


def result_path(folder: Path, run: Run) -> Path:
    return folder / run.name / "result.json"


def load_result(folder: Path, run: Run, identity: dict[str, Any]) -> dict[str, Any] | None:
    path = result_path(folder, run)
    result = json.loads(path.read_text()) if path.is_file() else None
    return result if result is not None and result["identity"] == json.loads(json.dumps(identity)) else None


# Comparison


def best_point(points: list[Point]) -> Point:
    """Return the earliest point after the start whose reverse KL is within the tolerance of the lowest."""
    points = points[1:]
    lowest = min(point["reverse_kl"] for point in points)
    return next(point for point in points if point["reverse_kl"] <= (1 + TOLERANCE) * lowest)


def first_as_good(points: list[Point], target: Point) -> Point | None:
    """Return the earliest point that is at least as good in both measures."""
    reached = (
        point
        for point in points
        if point["reverse_kl"] <= target["reverse_kl"] and point["rouge_l"] >= target["rouge_l"]
    )
    return next(reached, None)


def compare(ours: list[Point], rival: list[Point]) -> dict[str, Any]:
    """Compare our seconds to the rival's best point, and vice versa, with the noise of the differences."""
    target, own = best_point(rival), best_point(ours)
    reached, back = first_as_good(ours, target), first_as_good(rival, own)
    compared = reached or own
    errors = {
        f"{key}_difference_standard_error": standard_error(np.subtract(compared["per_prompt"][key], values).tolist())
        for key, values in target["per_prompt"].items()
    }
    return {
        "rival_best": without_prompts(target),
        "ours_best": without_prompts(own),
        "ours_as_good": reached and without_prompts(reached),
        "ratio": reached and reached["seconds"] / target["seconds"],
        "rival_as_good_as_ours_best": back and without_prompts(back),
        # of the point as good, or else of the best one: positive is worse
        "missing_reverse_kl": compared["reverse_kl"] - target["reverse_kl"],
        "missing_rouge_l": target["rouge_l"] - compared["rouge_l"],
        **errors,
    }


def without_prompts(point: Point) -> Point:
    return {key: value for key, value in point.items() if key != "per_prompt"}


def choose_learning_rate(results: dict[Run, dict], architecture: str, method: str) -> float:
    """Return the learning rate with the lowest final reverse KL, averaged over seeds."""
    last: dict[float, list[float]] = {}
    for run, result in results.items():
        if (run.architecture, run.method) == (architecture, method):
            last.setdefault(run.learning_rate, []).append(result["points"][-1]["reverse_kl"])
    return min(last, key=lambda rate: float(np.mean(last[rate])))


def summarize(results: dict[Run, dict], architecture: str) -> dict[str, Any]:
    chosen = {method: choose_learning_rate(results, architecture, method) for method in METHODS}
    points = {
        (run.method, run.seed): result["points"]
        for run, result in results.items()
        if run.architecture == architecture and run.learning_rate == chosen[run.method]
    }
    seeds = sorted({seed for _, seed in points})
    comparisons = {seed: compare(points["ours", seed], points["rival", seed]) for seed in seeds}
    return {
        "learning_rates": chosen,
        "ratios": [comparison["ratio"] for comparison in comparisons.values()],
        "seeds": comparisons,
        "runs": [
            {
                "method": run.method,
                "learning_rate": run.learning_rate,
                "seed": run.seed,
                "updates": run.steps,
                "evaluation_seconds": result["evaluation_seconds"],
                "commit": result["commit"],
                "points": [without_prompts(point) for point in result["points"]],
            }
            for run, result in results.items()
            if run.architecture == architecture
        ],
    }


def describe(comparison: dict[str, Any]) -> str:
    target, reached = comparison["rival_best"], comparison["ours_as_good"]
    goal = (
        f"rival: reverse KL {target['reverse_kl']:.2f}, Rouge-L {target['rouge_l']:.1f} in {target['seconds']:.1f} s"
    )
    error, kl_error = (comparison[f"{key}_difference_standard_error"] for key in ("rouge_l", "reverse_kl"))
    if reached is None:
        own = comparison["ours_best"]
        return (
            f"{goal}; ours does not get there. At its best, in {own['seconds']:.1f} s, it has "
            f"{own['reverse_kl']:.2f}, {own['rouge_l']:.1f} (standard errors of the differences {kl_error:.2f}, "
            f"{error:.1f})"
        )
    return (
        f"{goal}; ours: {reached['reverse_kl']:.2f}, {reached['rouge_l']:.1f} (standard errors of the differences "
        f"{kl_error:.2f}, {error:.1f}) in {reached['seconds']:.1f} s, {comparison['ratio']:.2f} of the rival's time"
    )


def rates(summary: dict[str, Any]) -> str:
    return "learning rate " + ", ".join(f"{rate:g} ({method})" for method, rate in summary["learning_rates"].items())


def plot(summaries: dict[str, dict[str, Any]]) -> None:
    colours = {"ours": "#0072b2", "rival": "#b85c00"}
    figure = Figure(figsize=(9.6, 3.2 * len(summaries) + 0.4), layout="constrained")
    panels = [("reverse_kl", "reverse KL (nats per completion)"), ("rouge_l", "Rouge-L")]
    grid = figure.subplots(len(summaries), 2, squeeze=False)
    for row, (architecture, summary) in zip(grid, summaries.items(), strict=True):
        for axes, (key, label) in zip(row, panels, strict=True):
            for run in summary["runs"]:
                chosen = run["learning_rate"] == summary["learning_rates"][run["method"]]
                axes.plot(
                    [point["seconds"] for point in run["points"]],
                    [point[key] for point in run["points"]],
                    color=colours[run["method"]],
                    linewidth=1.8 if chosen else 0.8,
                    alpha=1.0 if chosen else 0.4,
                    zorder=3 if chosen else 2,
                )
            for comparison in summary["seeds"].values():
                target = comparison["rival_best"]
                axes.plot(target["seconds"], target[key], "o", color=colours["rival"], zorder=4)
                axes.axhline(target[key], color=colours["rival"], linewidth=0.9, linestyle=":")
                if (reached := comparison["ours_as_good"]) is not None:
                    axes.plot(reached["seconds"], reached[key], "o", color=colours["ours"], zorder=4)
            axes.set_title(f"{architecture}: {rates(summary)}", fontsize=10)
            axes.set_xlabel("training time (s)")
            axes.set_ylabel(label)
            axes.grid(alpha=0.2)
            for side in ("top", "right"):
                axes.spines[side].set_visible(False)
    handles = [Line2D([], [], color=colours[method], label=label) for method, label in METHODS.items()]
    handles += [
        Line2D([], [], color="#444", linewidth=0.8, alpha=0.5, label="other learning rates"),
        Line2D([], [], color="#444", marker="o", linestyle=":", label="the rival's best point; ours as good"),
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    figure.savefig(PICTURE, dpi=130, facecolor="white", metadata={"Software": None})


# Command line


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/same_kl"))
    parser.add_argument("--architectures", choices=BUILDERS, nargs="+", default=list(BUILDERS))
    parser.add_argument("--learning_rates", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the distillation; the models stay")
    parser.add_argument("--max_steps", type=int, default=240, help="updates of both methods")
    parser.add_argument("--our_steps", type=int, help="updates of ours, if others")
    parser.add_argument("--rival_steps", type=int, help="updates of the rival, if others")
    parser.add_argument("--eval_steps", type=int, default=24)
    parser.add_argument("--eval_prompts", type=int, default=98, help="first validation prompts; there are 98")
    parser.add_argument("--eval_samples", type=int, default=5, help="completions of each prompt, for less noise")
    parser.add_argument("--quick_models", action="store_true", help="the models of `make demo`")
    parser.add_argument(
        "--one",
        nargs=4,
        metavar=("ARCHITECTURE", "METHOD", "LEARNING_RATE", "SEED"),
        help="measure this run only, in this process and whether or not it is there",
    )
    return parser.parse_args()


def make_run(arguments: argparse.Namespace, architecture: str, method: str, learning_rate: float, seed: int) -> Run:
    steps = {"ours": arguments.our_steps, "rival": arguments.rival_steps}[method] or arguments.max_steps
    evaluation = (arguments.eval_steps, arguments.eval_prompts, arguments.eval_samples)
    return Run(architecture, method, learning_rate, seed, steps, *evaluation)


def main() -> None:
    arguments = parse_arguments()
    disable_progress_bars()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    settings = DemoSettings().quick() if arguments.quick_models else DemoSettings()
    wanted = [arguments.one[0]] if arguments.one else arguments.architectures
    models = {name: train_models(arguments.runs / name, name, settings) for name in wanted}
    if arguments.one:
        architecture, method, learning_rate, seed = arguments.one
        run = make_run(arguments, architecture, method, float(learning_rate), int(seed))
        execute(run, arguments.runs, run.identity(models[architecture]))
        return
    runs = [
        make_run(arguments, architecture, method, learning_rate, seed)
        for architecture in arguments.architectures
        for seed in arguments.seeds
        for learning_rate in arguments.learning_rates
        for method in METHODS  # in turn, so that a machine that slows down hits both
    ]
    results = {}
    for number, run in enumerate(runs, start=1):
        identity = run.identity(models[run.architecture])
        print(f"{number}/{len(runs)}  {run.name}", flush=True)
        if load_result(arguments.runs, run, identity) is None:
            one = (run.architecture, run.method, str(run.learning_rate), str(run.seed))
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", *one], check=True)
        results[run] = load_result(arguments.runs, run, identity)
    summaries = {name: summarize(results, name) for name in arguments.architectures}
    used = {key: value for key, value in vars(arguments).items() if key not in ("runs", "one")}
    path = write_record(
        "same_kl",
        ("torch", "transformers", "trl", "accelerate"),
        {**used, "arguments": ARGUMENTS, "models": models, "tolerance": TOLERANCE},
        summaries,
    )
    plot(summaries)
    for name, summary in summaries.items():
        print(f"\n{name}: {rates(summary)}")
        for seed, comparison in summary["seeds"].items():
            print(f"  seed {seed}: {describe(comparison)}")
    print(f"\nWritten to {path} and {PICTURE}")


if __name__ == "__main__":
    main()
