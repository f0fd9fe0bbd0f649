"""Claim: an optimizer step of the whole loop (generate, score, update) takes less time than with TRL 1.14.2.

    python benchmarks/optimizer_step.py [--student gpt2] [--teacher gpt2-large] [--repeats 3]

trains a GPT-2 shape on its own completions with a larger one as teacher, both with random weights. It compares our
`MiniLLMTrainer` with 1 pass over a rollout, with 4 passes, and with 4 passes and teacher mixing, to TRL's trainer with
its only working setting, 1 pass without mixing. Rows, lengths, precision and optimizer are the same, and the benchmark
checks that no completion ends early. A rollout has the rows of one optimizer step (steps_per_generation=1), even if 4
steps use it, so that memory is the same. Seconds per step are the median over rollouts, divided by the passes; the
first rollout is a warm-up. Every run is a separate process. The runs alternate, so that a busy machine slows all of
them; results are ratios within a round, over `--repeats` rounds. TRL 1.14.2 runs in its own virtual environment
(`--venv`), which is created with pip, with this environment's versions of all other packages; it works with
transformers 5.23.0. Writes `results/optimizer_step.json`. To try it out without writing, use
`--student tiny --teacher tiny --new_tokens 8 --steps 4 --repeats 1`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import venv
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from measurement import DEVICE, SHAPES, build, parameter_ratio, percentiles, write_record
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, TrainerCallback

TRL = "1.14.2"
SHARED_PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy")
VENV = Path(__file__).parents[1] / "runs" / f"trl_{TRL.replace('.', '_')}"
SETTINGS: dict[str, dict[str, Any]] = {
    "trl, 1 pass": {"side": "trl", "passes": 1},
    "ours, 1 pass": {"side": "ours", "passes": 1, "teacher_mixed_alpha": 0.0},
    "ours, 4 passes": {"side": "ours", "passes": 4, "teacher_mixed_alpha": 0.0},
    "ours, 4 passes, mixed": {"side": "ours", "passes": 4, "teacher_mixed_alpha": 0.2},
}
BASELINE = "trl, 1 pass"


# One run in a separate process; TRL's environment has no minillm_trl


class RolloutClock(TrainerCallback):
    """Record the time at which the last optimizer step of each rollout ended."""

    def __init__(self, passes: int):
        self.passes = passes
        self.times: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if state.global_step % self.passes == 0:
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            self.times.append(time.perf_counter())


def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with the words `0`, `1`, ..., of which the last is EOS."""
    words = Tokenizer(models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    last = str(vocab_size - 1)
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=last, pad_token=last)


@torch.no_grad()
def never_end(model: PreTrainedModel) -> PreTrainedModel:
    """Give the last token a logit of about -n_embd, which costs no time and is never sampled.

    The output of the final norm sums to zero before its bias, so its product with a row of -1 depends on the bias
    alone. The other rows are random and change little.
    """
    model.transformer.ln_f.bias.fill_(1.0)
    model.lm_head.weight[-1] = -1.0
    return model


def make_prompts(rows: int, tokens: int, vocab_size: int, seed: int) -> Dataset:
    ids = np.random.default_rng(seed).integers(vocab_size - 1, size=(rows, tokens))
    return Dataset.from_list([{"prompt": " ".join(map(str, row))} for row in ids])


def trainer_and_config(side: str) -> tuple[type, type]:
    if side == "ours":
        from minillm_trl import MiniLLMConfig, MiniLLMTrainer
    else:
        from trl.experimental.minillm import MiniLLMConfig, MiniLLMTrainer
    return MiniLLMTrainer, MiniLLMConfig


def train(
    side: str, passes: int, options: argparse.Namespace, seed: int, folder: str, **fields: Any
) -> dict[str, Any]:
    """Train for a warm-up rollout and `options.steps` steps; return the time per step and other results."""
    trainer_class, config_class = trainer_and_config(side)
    student, teacher = (never_end(build(name, torch.float32)) for name in (options.student, options.teacher))
    ratio = parameter_ratio(teacher, student)  # before a trainer wraps them
    vocab_size = student.config.vocab_size
    clock = RolloutClock(passes)
    config = config_class(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        gradient_accumulation_steps=1,
        steps_per_generation=1,
        num_generations=1,
        num_iterations=passes,
        max_completion_length=options.new_tokens,
        max_steps=passes + options.steps,
        optim="adamw_torch",
        learning_rate=1e-6,
        gradient_checkpointing=False,
        bf16=False,
        fp16=DEVICE.type == "cuda",
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
        **fields,
    )
    trainer = trainer_class(
        model=student,
        teacher_model=teacher,
        args=config,
        train_dataset=make_prompts(
            options.batch_size * (options.steps + 1), options.prompt_tokens, vocab_size, seed=seed
        ),
        processing_class=make_tokenizer(vocab_size),
        callbacks=[clock],
    )
    trainer.train()
    length = "completions/mean_length"
    return {
        "seconds_per_step": float(np.median(np.diff(clock.times))) / passes,
        "completion_lengths": sorted({log[length] for log in trainer.state.log_history if length in log}),
        "parameter_ratio": ratio,
        "versions": {package: version(package) for package in ("trl", *SHARED_PACKAGES)},
    }


def work(options: argparse.Namespace) -> None:
    """Print the result of a run as the last line."""
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(train(options=options, folder=folder, **json.loads(options.worker))))


# All runs


def make_environment(folder: Path) -> str:
    """Return the Python of a virtual environment with TRL 1.14.2, which is created if necessary."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
    pins = [f"{package}=={version(package).split('+')[0]}" for package in SHARED_PACKAGES]
    subprocess.run([python, "-m", "pip", "install", "--quiet", f"trl=={TRL}", *pins], check=True)
    return str(python)


def run(python: str, setting: dict[str, Any], seed: int, options: argparse.Namespace) -> dict[str, Any]:
    command = [python, __file__, "--worker", json.dumps({**setting, "seed": seed})]
    for name in ("student", "teacher", "batch_size", "prompt_tokens", "new_tokens", "steps"):
        command += [f"--{name}", str(getattr(options, name))]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    finished = subprocess.run(command, capture_output=True, text=True, env=environment)
    if finished.returncode:
        raise SystemExit(f"{setting} failed:\n{finished.stderr}")
    result = json.loads(finished.stdout.splitlines()[-1])
    if result["completion_lengths"] != [options.new_tokens]:
        raise SystemExit(f"{setting}: completions of {result['completion_lengths']} tokens, not {options.new_tokens}")
    return result


def summarize(rounds: list[dict[str, dict[str, Any]]], options: argparse.Namespace) -> dict[str, Any]:
    """Return for each setting: seconds per optimizer step, speed-up over the baseline, and tokens per step."""
    tokens = options.batch_size * options.new_tokens
    results = {}
    for name, setting in SETTINGS.items():
        times = [steps[name]["seconds_per_step"] for steps in rounds]
        speedups = [steps[BASELINE]["seconds_per_step"] / steps[name]["seconds_per_step"] for steps in rounds]
        results[name] = {
            **setting,
            "seconds_per_step": percentiles(times),
            "speedup_over_trl": percentiles(speedups),
            "completion_lengths": rounds[0][name]["completion_lengths"],
            "tokens_trained_per_step": tokens,
            "tokens_sampled_per_step": tokens / setting["passes"],
        }
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teacher", choices=SHAPES, default="gpt2-large")
    parser.add_argument("--batch_size", type=int, default=8, help="rows of a rollout and of an optimizer step")
    parser.add_argument("--prompt_tokens", type=int, default=64)
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8, help="timed optimizer steps of a run, a multiple of 4")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--venv", type=Path, default=VENV, help="virtual environment of TRL 1.14.2")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
        return
    if options.steps < 1 or any(options.steps % setting["passes"] for setting in SETTINGS.values()):
        parser.error(f"--steps {options.steps} must be a multiple of 4, so that every rollout is used up")
    pythons = {"ours": sys.executable, "trl": make_environment(options.venv)}
    rounds: list[dict[str, dict[str, Any]]] = []
    for repeat in range(options.repeats):
        rounds.append({})
        for name, setting in SETTINGS.items():
            rounds[-1][name] = run(pythons[setting["side"]], setting, repeat, options)
            print(f"{repeat}: {name}: {rounds[-1][name]['seconds_per_step']:.2f} s per optimizer step", flush=True)
    results = summarize(rounds, options)
    for name, result in results.items():
        low, middle, high = result["speedup_over_trl"]
        print(f"{name}: {middle:.2f}x [{low:.2f}, {high:.2f}] as fast as TRL {TRL}")
    if "tiny" in (options.student, options.teacher):
        return
    names = ("student", "teacher", "batch_size", "prompt_tokens", "new_tokens", "steps", "repeats")
    settings = {
        **{name: getattr(options, name) for name in names},
        "parameter_ratio": rounds[0][BASELINE]["parameter_ratio"],
        "steps_per_generation": 1,
        "precision": "float16, mixed" if DEVICE.type == "cuda" else "float32",
        "trl_environment": rounds[0][BASELINE]["versions"],
    }
    write_record("optimizer_step", ("trl", *SHARED_PACKAGES), settings, results)


if __name__ == "__main__":
    main()
