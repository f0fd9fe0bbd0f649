"""Claim: an iteration of MiniLLM on real models takes a fifth of the time of as many updates of DistillationTrainer.

    python benchmarks/iteration_real.py --student PATH --teacher PATH --prompts PATH [--repeats 2]

trains a student of 64M for one iteration with the paper's mixing (alpha = 0.2): a rollout of `--rows` completions, its
scores, and four passes over it, which are four updates. TRL's DistillationTrainer (beta = 1) does as many updates with
as many rows, and samples in each. Prompts are the first ones of a JSONL of conversations (`prepare-data --task
dolly`), completions have their natural lengths up to `--max_new_tokens`. Precision, optimizer, temperature and rate
are the same. `--mini_batches 4` makes a rollout of four mini-batches, which are 16 updates.

The student is SmolLM2-135M-Instruct with ten of its 30 layers, healed on the teacher's answers
(`recipes/smollm2-92m/answers.yaml`):

    minillm-trl shrink --model PATH --layers 0 1 2 3 4 5 6 27 28 29 --dtype float32 --output_dir START
    minillm-trl kd --config recipes/smollm2-92m/heal.yaml --model_name_or_path START --learning_rate 2e-3 \\
        --output_dir PATH

Every run is a separate process with one thread, which counts the CPU-seconds of `train()`, so that other jobs on the
machine change little. The runs alternate. Results are ratios of CPU-seconds per update within a round, and the shares
of sampling (for ours with scores) and of the rival's teacher. Completions differ between the methods, so the results
have the trained tokens too. Writes `results/iteration_real.json`. `--profile NAME` prints the operators of one
setting instead, by torch.profiler.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, disable_progress_bars
from measurement import given_command, percentiles, write_record
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, Trainer
from transformers.utils import logging

PASSES = 4
SETTINGS: dict[str, dict[str, Any]] = {
    "trl": {"beta": 1.0},
    "4 passes, mixed": {"teacher_mixed_alpha": 0.2},
}
BASELINE = "trl"
PACKAGES = ("torch", "transformers", "trl", "accelerate")


# One run in a separate process


class Clock:
    """CPU-seconds within calls of a method."""

    def __init__(self, owner: Any, name: str):
        self.seconds = 0.0
        wrapped: Callable = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.process_time()
            try:
                return wrapped(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - start

        setattr(owner, name, timed)


def make_trainer(setting: str, options: argparse.Namespace, folder: str) -> Trainer:
    from trl import DistillationConfig, DistillationTrainer

    from minillm_trl import MiniLLMConfig, MiniLLMTrainer

    classes: Any = (DistillationConfig, DistillationTrainer) if setting == "trl" else (MiniLLMConfig, MiniLLMTrainer)
    reuse = {} if setting == "trl" else {"steps_per_generation": options.mini_batches, "num_iterations": PASSES}
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32) for path in (options.student, options.teacher)
    )
    with open(options.prompts) as lines:
        rows = [
            json.loads(line)["prompt"]
            for _, line in zip(range(PASSES * options.mini_batches * options.rows), lines, strict=False)
        ]
    config = classes[0](
        folder,
        per_device_train_batch_size=options.rows,
        max_completion_length=options.max_new_tokens,
        max_steps=PASSES * options.mini_batches,
        learning_rate=1e-4,
        temperature=options.temperature,
        disable_dropout=True,
        gradient_checkpointing=False,
        use_cpu=True,
        bf16=False,
        seed=options.seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        **reuse,
        **SETTINGS[setting],
    )
    trainer = classes[1](
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=Dataset.from_dict({"prompt": rows}),
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(setting: str, options: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Train for one iteration; return CPU-seconds, by phase, and the mean length of completions."""
    trainer: Any = make_trainer(setting, options, folder)
    phases = {"sampling": Clock(trainer, "_generate_and_score_completions")}
    if setting == "trl":
        phases["teacher"] = Clock(trainer.teacher_model.model, "forward")
    start = time.process_time()
    trainer.train()
    seconds = time.process_time() - start
    lengths = [log["completions/mean_length"] for log in trainer.state.log_history if "completions/mean_length" in log]
    return {
        "seconds": seconds,
        **{f"{name}_seconds": clock.seconds for name, clock in phases.items()},
        "mean_length": sum(lengths) / len(lengths),
        "updates": trainer.state.global_step,
    }


def profile(setting: str, options: argparse.Namespace, folder: str) -> None:
    """Print the operators that take most of the CPU time of an iteration."""
    trainer = make_trainer(setting, options, folder)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.train()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=60))


# All runs


def run(setting: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--worker", setting, "--seed", str(seed)]
    for name in ("student", "teacher", "prompts", "rows", "mini_batches", "max_new_tokens", "temperature"):
        command += [f"--{name}", str(getattr(options, name))]
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment = {**os.environ, **threads, "HF_HUB_OFFLINE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"{setting} failed:\n{finished.stderr}")
    result = json.loads(finished.stdout.splitlines()[-1])
    if result["updates"] != PASSES * options.mini_batches:
        raise SystemExit(f"{setting}: {result['updates']} updates, not {PASSES * options.mini_batches}")
    return result


def summarize(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return for each setting: speed-up over the rival by update and by token, seconds by phase, mean length."""
    results: dict[str, Any] = {}
    for name in SETTINGS:
        runs = [answers[name] for answers in rounds]
        ratios = [answers[BASELINE]["seconds"] / answers[name]["seconds"] for answers in rounds]
        by_token = [
            ratio * answers[name]["mean_length"] / answers[BASELINE]["mean_length"]
            for ratio, answers in zip(ratios, rounds, strict=True)
        ]
        results[name] = {
            "speedup": percentiles(ratios),
            "speedup_by_trained_token": percentiles(by_token),
            **{
                f"{phase}_per_update": percentiles([found[phase] / found["updates"] for found in runs])
                for phase in runs[0]
                if phase.endswith("seconds")
            },
            "mean_length": percentiles([found["mean_length"] for found in runs]),
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True, help="the 64M student")
    parser.add_argument("--teacher", type=Path, required=True, help="SmolLM2-135M-Instruct")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of conversations")
    parser.add_argument("--rows", type=int, default=8, help="rows of an update")
    parser.add_argument("--mini_batches", type=int, default=1, help="mini-batches of a rollout")
    parser.add_argument("--max_new_tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.7)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--profile", choices=SETTINGS, help="print the operators of this setting, and write nothing")
    parser.add_argument("--worker", choices=SETTINGS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.worker or options.profile:
        disable_progress_bars()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        with tempfile.TemporaryDirectory() as folder:
            if options.profile:
                profile(options.profile, options, folder)
            else:
                print(json.dumps(train(options.worker, options, folder)))
        return
    rounds: list[dict[str, dict[str, Any]]] = []
    for repeat in range(options.repeats):
        rounds.append({})
        for name in list(SETTINGS) if repeat % 2 == 0 else reversed(SETTINGS):
            rounds[-1][name] = run(name, repeat, options)
            print(f"{repeat}: {name}: {rounds[-1][name]}", flush=True)
    settings = {
        "student": "SmolLM2-135M-Instruct, layers 0 to 6 and 27 to 29 of 30, healed at a rate of 2e-3",
        "teacher": "SmolLM2-135M-Instruct",
        "rows_per_update": options.rows,
        "rows_per_rollout": options.rows * options.mini_batches,
        "updates": PASSES * options.mini_batches,
        "passes": PASSES,
        "max_new_tokens": options.max_new_tokens,
        "temperature": options.temperature,
        "precision": "float32",
        "seeds": list(range(options.repeats)),
    }
    results = summarize(rounds)
    command = given_command(("student", "teacher", "prompts"))
    write_record("iteration_real", PACKAGES, settings, results, command)
    for name, result in results.items():
        print(f"{name}: {result['speedup'][1]:.2f}x as fast as TRL")


if __name__ == "__main__":
    main()
