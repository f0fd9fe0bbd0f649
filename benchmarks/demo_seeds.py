"""Claim: in the demo, the MiniLLM student beats the SFT student and the control with every training seed.

    python benchmarks/demo_seeds.py --seeds 0 1 2 --runs runs/demo-seeds

runs the demo with each seed, unless its run is complete. Writes `results/demo_seeds.json` (tables by seed, paired
differences on the test prompts, versions, machine and commit) and a plot of the curves, and prints the table for
`benchmarks/README.md`.
"""

import argparse
import json
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from matplotlib.figure import Figure

from minillm_trl.demo import DemoSettings, run_demo
from minillm_trl.evaluation.statistics import paired_bootstrap

RESULTS = Path(__file__).with_name("results") / "demo_seeds.json"
PICTURE = RESULTS.with_suffix(".png")
MODELS = ("teacher", "sft", "control", "minillm")


def summarize(folder: Path) -> dict:
    """Return the table of one run, and MiniLLM's differences from its baselines, paired by prompt."""
    evaluations = {name: json.loads((folder / "evaluation" / f"{name}.json").read_text()) for name in MODELS}
    run = json.loads((folder / "run.json").read_text())

    def difference(baseline: str, key: str) -> dict:
        ours, theirs = ([row[key] for row in evaluations[name]["per_prompt"]] for name in ("minillm", baseline))
        return paired_bootstrap(ours, theirs)._asdict()

    return {
        "table": {
            name: {key: values[:3] for key, values in evaluation["summary"].items()}
            for name, evaluation in evaluations.items()
        },
        "minillm_minus": {
            baseline: {key: difference(baseline, key) for key in ("rouge_l", "reverse_kl")}
            for baseline in ("sft", "control")
        },
        "updates": {name: run["stages"][name]["updates"] for name in MODELS},
        "control_to_minillm_seconds": run["stages"]["control"]["seconds"] / run["stages"]["minillm"]["seconds"],
        "environment": run["environment"],
    }


def markdown_table(result: dict) -> str:
    """Return the table of `benchmarks/README.md`: mean and, in brackets, range over training seeds."""
    columns = [
        ("rouge_l", "Rouge-L", 1),
        ("reverse_kl", "reverse KL (nats)", 1),
        ("length", "length (tokens)", 1),
        ("eos_rate", "ends by itself", 2),
        ("repeated_4grams", "repeated 4-grams", 3),
        ("distinct_outputs", "distinct outputs", 2),
    ]
    names = {
        "teacher": "teacher",
        "sft": "SFT student",
        "control": "SFT continued for as long (control)",
        "minillm": "**MiniLLM student**",
    }
    lines = ["| | " + " | ".join(label for _, label, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for model, name in names.items():
        cells = []
        for key, _, digits in columns:
            tables = [record["table"][model] for record in result["seeds"].values()]
            values = [table[key][0] for table in tables if key in table]
            if not values:
                cells.append("–")
                continue
            mean, low, high = (
                f"{value:.{digits}f}" for value in (sum(values) / len(values), min(values), max(values))
            )
            cells.append(mean if low == high else f"{mean} [{low}, {high}]")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(folders: dict[int, Path]) -> None:
    """Plot the validation curves of every seed, with the test values of teacher and control as lines."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    panels = [
        ("eval_objective/reverse_kl", "reverse_kl", "reverse KL (nats per completion)", ("control",)),
        ("eval_rouge_l", "rouge_l", "Rouge-L", ("teacher", "control")),
    ]
    for axes, (logged, key, label, lines) in zip(figure.subplots(1, 2), panels, strict=True):
        for number, (seed, folder) in enumerate(folders.items()):
            history = json.loads((folder / "minillm" / "stage.json").read_text())["history"]
            x, y = [entry["step"] for entry in history], [entry[logged] for entry in history]
            axes.plot(x, y, color=("#1F83CC", "#009E73", "#CC79A7")[number % 3], label=f"MiniLLM, seed {seed}")
        for line in lines:
            means = [
                json.loads((folder / "evaluation" / f"{line}.json").read_text())["summary"][key][0]
                for folder in folders.values()
            ]
            style = {"teacher": "--", "control": ":"}[line]
            axes.axhline(sum(means) / len(means), color="#444", linestyle=style, label=f"{line} (mean)")
        axes.set_xlabel("MiniLLM update")
        axes.set_ylabel(label)
        axes.grid(alpha=0.2)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncol=len(labels), frameon=False, fontsize=9)
    figure.savefig(PICTURE, dpi=130, facecolor="white", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--runs", type=Path, default=Path("runs/demo-seeds"))
    arguments = parser.parse_args()
    seeds = {}
    for seed in arguments.seeds:
        folder = arguments.runs / f"seed-{seed}"
        run_demo(folder, replace(DemoSettings(), seed=seed))
        seeds[seed] = summarize(folder)
    revision = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    commit = subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip()
    result = {
        "command": f"python benchmarks/demo_seeds.py --seeds {' '.join(map(str, arguments.seeds))}",
        "commit": commit,
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "seeds": seeds,
    }
    plot({seed: arguments.runs / f"seed-{seed}" for seed in arguments.seeds})
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(markdown_table(result))
    wins = sum(
        record["minillm_minus"][baseline]["rouge_l"]["low"] > 0
        and record["minillm_minus"][baseline]["reverse_kl"]["high"] < 0
        for record in seeds.values()
        for baseline in ("sft", "control")
    )
    print(f"{wins} of {2 * len(seeds)} comparisons won in both measures; written to {RESULTS}")
    sys.exit(0 if wins == 2 * len(seeds) else 1)


if __name__ == "__main__":
    main()
