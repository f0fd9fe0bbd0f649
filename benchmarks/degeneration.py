"""Claim: the degeneration watch detects each kind of degeneration, and flags no healthy run.

    python benchmarks/degeneration.py --runs runs/degeneration

builds the models of `make demo` and trains the student in many runs: healthy ones with several seeds and batch sizes,
and deliberately broken ones. Writes the logs, and the findings of the rules with their steps, to
`results/degeneration.json`. Runs in the folder are not repeated, so changed rules are judged again in a second;
`tests/training/test_degeneration.py` judges the same logs.
"""

import argparse
import json
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

from measurement import write_record
from transformers import AutoTokenizer, PrinterCallback

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import load_e2e, unique_prompts
from minillm_trl.demo import DemoSettings
from minillm_trl.demo.pipeline import load_model, train_pair
from minillm_trl.monitoring.degeneration import RULES, Rollouts, diagnose


def length(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward length."""
    return [float(len(ids)) for ids in completion_ids]


def shortness(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward short completions."""
    return [-float(len(ids)) for ids in completion_ids]


def repeated_tokens(completion_ids: list[list[int]], **_: Any) -> list[float]:
    """Reward repetition."""
    return [20 * (1 - len(set(ids)) / len(ids)) for ids in completion_ids]


SETTINGS = {
    "per_device_train_batch_size": 8,
    "steps_per_generation": 4,
    "num_iterations": 2,
    "max_completion_length": 48,
    "max_steps": 160,
    "logging_steps": 8,  # a rollout of 32 completions
    "logging_first_step": True,  # as the watch does: the first rollout, before any update
    "learning_rate": 1e-3,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "eval_strategy": "steps",
    "eval_steps": 40,
    "eval_on_start": True,
    "per_device_eval_batch_size": 64,
    "save_strategy": "no",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
}
SMALL = {"per_device_train_batch_size": 4, "num_iterations": 1, "logging_steps": 4, "learning_rate": 3e-4}
TINY = SMALL | {
    "per_device_train_batch_size": 2,
    "steps_per_generation": 1,
    "logging_steps": 1,
    "learning_rate": 1e-4,
}
SINGLE = TINY | {"per_device_train_batch_size": 1}
REWARD_ALONE = {
    "rkl_advantage": False,
    "single_step_decomposition": False,
    "learning_rate": 3e-3,
    "max_steps": 240,
}
HEALTHY: dict[str, dict[str, Any]] = {
    **{f"32 completions a log, seed {seed}": {"seed": seed} for seed in range(3)},
    **{f"16 completions a log, seed {seed}": {"seed": seed, **SMALL} for seed in range(3)},
    **{f"2 completions a log, seed {seed}": {"seed": seed, **TINY} for seed in range(3)},
    "1 completion a log": SINGLE,
    "sequence weights": {"importance_weighting": "sequence"},
    "no mixing": {"teacher_mixed_alpha": 0.0},
}
DEGENERATE: dict[str, tuple[str, dict[str, Any]]] = {
    "long term alone, no length normalization": (
        "length_collapse",
        {"length_normalization": False, "single_step_decomposition": False},
    ),
    "reward for shortness alone": ("entropy_collapse", {"reward_funcs": shortness, **REWARD_ALONE}),
    "reward for length alone": ("length_inflation", {"reward_funcs": length, **REWARD_ALONE}),
    "reward for repetition alone": ("repetition", {"reward_funcs": repeated_tokens, **REWARD_ALONE}),
    "sequence weights, alpha 0.8": (
        "exploding_weights",
        {"importance_weighting": "sequence", "teacher_mixed_alpha": 0.8},
    ),
    "learning rate 30 times as high": ("exploding_weights", {"learning_rate": 3e-2}),
    "1 completion a log, learning rate 0.3": ("rising_kl", {**SINGLE, "learning_rate": 0.3, "max_steps": 80}),
    "teacher at temperature 0.3": ("falling_quality", {"kd_temperature": 0.3}),
}


def train(demo: Path, folder: Path, reward_funcs: Any = None, **settings: Any) -> list[dict[str, float]]:
    """Train, and return the log."""
    data = load_e2e()
    trainer = MiniLLMTrainer(
        model=load_model(demo, "sft"),
        teacher_model=load_model(demo, "teacher"),
        reward_funcs=reward_funcs,
        args=MiniLLMConfig(str(folder), **SETTINGS | settings),
        train_dataset=unique_prompts(data["train"]).select_columns(["prompt"]),
        eval_dataset=unique_prompts(data["validation"]).select(range(48)),
        processing_class=AutoTokenizer.from_pretrained(demo / "tokenizer"),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.state.log_history


def history_of(runs: Path, name: str, settings: dict[str, Any]) -> list[dict[str, float]]:
    """Return the logged metrics that have rules, to four digits, from the run's file if it exists."""
    path = runs / f"{name}.json"
    if not path.is_file():
        print(name, flush=True)
        path.write_text(json.dumps(train(runs / "demo", runs / "out", **settings)))
    metrics = tuple(rule.metric for rule in RULES)
    rows = [
        {key: float(f"{value:.4g}") for key, value in entry.items() if key.endswith(metrics)} | {"step": entry["step"]}
        for entry in json.loads(path.read_text())
    ]
    return [row for row in rows if len(row) > 1]


def first_found(history: list[dict[str, float]], rollouts: Rollouts) -> dict[str, int]:
    """Return the first step at which each kind is found."""
    steps: dict[str, int] = {}
    for end, entry in zip(count(1), history, strict=False):
        for found in diagnose(history[:end], rollouts=rollouts).found:
            steps.setdefault(found.kind, entry["step"])
    return steps


def judged(runs: Path, name: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a run, and its findings."""
    history, values = history_of(runs, name, settings), SETTINGS | settings
    completions = values["per_device_train_batch_size"] * values["steps_per_generation"]
    passes = values["num_iterations"]
    rollouts = Rollouts(completions, values["steps_per_generation"] * passes, passes)
    return {"rollouts": rollouts._asdict(), "found": first_found(history, rollouts), "history": history}


def markdown_table(results: dict[str, dict[str, dict[str, Any]]]) -> str:
    """Return the findings in each run, with their updates, as a Markdown table."""
    lines = ["| run | updates | expected | found, at update |", "|---|---:|---|---|"]
    for runs in results.values():
        for name, run in runs.items():
            found = ", ".join(f"{kind} {step}" for kind, step in run["found"].items()) or "–"
            lines.append(f"| {name} | {run['history'][-1]['step']} | {run.get('expected', '–')} | {found} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/degeneration"))
    runs = parser.parse_args().runs
    train_pair(runs / "demo", replace(DemoSettings().quick(), seed=0))
    healthy = {name: judged(runs, name, settings) for name, settings in HEALTHY.items()}
    degenerate = {
        name: {"expected": expected, **judged(runs, name, settings)}
        for name, (expected, settings) in DEGENERATE.items()
    }
    results = {"healthy": healthy, "degenerate": degenerate}
    path = write_record("degeneration", ("torch", "transformers", "trl"), SETTINGS, results)
    print(markdown_table(results))
    alarms = sum(bool(run["found"]) for run in healthy.values())
    found = sum(run["expected"] in run["found"] for run in degenerate.values())
    print(f"{alarms} of {len(healthy)} healthy runs flagged, {found} of {len(degenerate)} degenerate ones; {path}")


if __name__ == "__main__":
    main()
