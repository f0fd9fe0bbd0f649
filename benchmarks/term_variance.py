"""Claim: expected rewards and a baseline lower the variance of the long term to a half, or a third if normalised.

    python benchmarks/term_variance.py [--steps 48]

The SFT student and the teacher of the E2E task (`benchmarks/quality/run.py` makes them) at learning rate 0, so that
every setting sees the same student: 32 completions a step, on policy. The trainer measures signal and variance of the
gradient with respect to a bias on the logits, from two halves of each step (docs/metrics.md). Means over the steps.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from measurement import write_record
from transformers import TrainerCallback

sys.path.insert(0, str(Path(__file__).with_name("quality")))

from methods import MINILLM
from tasks import TASKS, load_model, make_tokenizer

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import unique_prompts

LONG_TERMS: dict[str, dict[str, Any]] = {
    "sampled rewards": {},
    "expected rewards": {"reward_estimator": "expected"},
    "baseline": {"advantage_baseline": "position"},
    "both": {"reward_estimator": "expected", "advantage_baseline": "position"},
}
METRICS = tuple(
    f"objective/{term}_{value}" for term in ("long_term", "single_step") for value in ("signal", "variance")
)


class Recorder(TrainerCallback):
    """The metrics of every step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_log(self, args, state, control, logs: dict[str, float], **unused: Any) -> None:
        if METRICS[0] in logs:
            self.steps.append({name: logs[name] for name in METRICS})


def measure(folder: Path, options: dict[str, Any], steps: int) -> dict[str, list[float]]:
    """Return mean and standard error of each metric over the steps."""
    task, tokenizer = TASKS["e2e"], make_tokenizer(TASKS["e2e"], folder)
    args = MiniLLMConfig(
        **{**MINILLM, "num_iterations": 1, "logging_strategy": "steps", "teacher_mixed_alpha": 0.0, **options},
        output_dir=str(folder / "term_variance"),
        max_completion_length=task.max_completion_length,
        logging_steps=1,
        learning_rate=0.0,
        max_steps=steps,
        seed=3,
    )
    recorder = Recorder()
    MiniLLMTrainer(
        model=load_model(folder, "sft-3"),
        teacher_model=load_model(folder, "teacher"),
        args=args,
        train_dataset=unique_prompts(task.load_data(folder)["train"]).select_columns(["prompt"]),
        processing_class=tokenizer,
        callbacks=[recorder],
    ).train()
    values = np.array([[step[name] for name in METRICS] for step in recorder.steps])
    errors = values.std(axis=0, ddof=1) / np.sqrt(len(values))
    return {
        name.removeprefix("objective/"): [float(mean), float(error)]
        for name, mean, error in zip(METRICS, values.mean(axis=0), errors, strict=True)
    }


def plot(rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Draw variance and signal of the long term as bars, with the single step's for comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.2, 3.6), layout="constrained")
    axes = figure.subplots()
    labels = [*rows, "single step"]
    any_row = next(iter(rows.values()))
    for offset, value, color in ((-0.2, "variance", "#b85c00"), (0.2, "signal", "#0072b2")):
        means = [*(row[f"long_term_{value}"] for row in rows.values()), any_row[f"single_step_{value}"]]
        axes.bar(
            [position + offset for position in range(len(labels))],
            [max(mean, 0) for mean, _ in means],
            0.38,
            yerr=[error for _, error in means],
            capsize=2,
            color=color,
            label=value,
        )
    axes.set_yscale("log")
    axes.set_xticks(range(len(labels)), labels, fontsize=9)
    axes.set_ylabel("squared nats a token")
    axes.legend(frameon=False)
    axes.grid(axis="y", alpha=0.25)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    parser.add_argument("--steps", type=int, default=48)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, dict[str, list[float]]]] = {}
    for normalised in (False, True):
        group = "length-normalised" if normalised else "not normalised"
        rows[group] = {
            name: measure(arguments.runs / "e2e", {**options, "length_normalization": normalised}, arguments.steps)
            for name, options in LONG_TERMS.items()
        }
        for name, row in rows[group].items():
            print(
                f"{group}, {name}: "
                + ", ".join(f"{key} {mean:.3g} ± {error:.2g}" for key, (mean, error) in row.items())
            )
    settings = {"steps": arguments.steps, "completions": MINILLM["per_device_train_batch_size"]}
    command = f"python benchmarks/term_variance.py --steps {arguments.steps}"
    path = write_record("term_variance", ("torch", "transformers", "trl"), settings, {"rows": rows}, command)
    plot(rows["not normalised"], path.with_suffix(".png"))


if __name__ == "__main__":
    main()
