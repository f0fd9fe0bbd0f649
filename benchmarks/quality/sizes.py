"""Claim: MiniLLM is ahead of SFT continued whatever the student's size, over a 36-fold range against one teacher.

    python benchmarks/quality/run.py --task e2e --methods sft minillm   # makes the teacher too
    for width in 8 16 32 96; do
        python benchmarks/quality/run.py --task e2e_w$width --methods sft minillm
    done
    python benchmarks/quality/sizes.py

Each size has students of its own, and for each method the learning rate with the best validation Rouge-L of the same
grid; numbers of updates are those of `methods.py` for all sizes. Writes `results/quality_sizes.json`, the picture, and
the table in this folder's README.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from methods import METHODS
from run import LEARNING_RATES, SEEDS, TEST_SEEDS, Run, best_learning_rates, finished
from summarize import PACKAGES, README, format_interval, insert_table, interval, values_of
from tasks import SIZES

COMPARED = ("sft", "minillm")
MEASURES = ("rouge_l", "reverse_kl")
LABELS = {"start": "SFT student (the start)", **{name: METHODS[name].label for name in COMPARED}}
COLORS = {"start": "#999", "sft": "#555", "minillm": "#1F83CC"}


def summarize_size(runs: Path, task: str) -> dict[str, Any]:
    """Return the results of the students of one size."""
    folder = runs / task
    rates = best_learning_rates(folder, task, list(COMPARED))
    results = {"start": [json.loads((folder / f"sft-{seed}" / "test.json").read_text()) for seed in SEEDS]}
    for name, rate in rates.items():
        results[name] = [finished(folder, Run(task, name, rate, seed), "test") for seed in SEEDS]
    lead = {key: values_of(results["minillm"], key) - values_of(results["sft"], key) for key in MEASURES}
    return {
        "parameters": json.loads((folder / f"sft-{SEEDS[0]}" / "stage.json").read_text())["parameters"],
        "learning_rates": rates,
        "measures": {
            name: {key: interval(values_of(evaluation, key)) for key in MEASURES}
            for name, evaluation in results.items()
        },
        "minillm_minus_sft": {key: interval(values) for key, values in lead.items()},
    }


def table(sizes: dict[str, Any], teacher: dict[str, Any]) -> str:
    """Return the Markdown table."""
    head = ["student", "teacher / student", *LABELS.values(), "MiniLLM's lead in Rouge-L", "in reverse KL"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for size in sizes.values():
        cells = [f"{size['parameters'] / 1e3:.0f}K", f"{teacher['parameters'] / size['parameters']:.1f}"]
        cells += [format_interval(size["measures"][name]["rouge_l"], 1) for name in LABELS]
        cells += [format_interval(size["minillm_minus_sft"][key], 1, sign=True) for key in MEASURES]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(sizes: dict[str, Any], teacher: dict[str, Any], path: Path) -> None:
    """Plot Rouge-L and reverse KL against the student's number of parameters."""
    figure = Figure(figsize=(9.6, 3.6), layout="constrained")
    titles = {"rouge_l": "Rouge-L", "reverse_kl": "reverse KL (nats)"}
    for axes, (key, title) in zip(figure.subplots(1, 2), titles.items(), strict=True):
        for name, label in LABELS.items():
            points = sorted((size["parameters"], *size["measures"][name][key]) for size in sizes.values())
            x, mean, low, high = zip(*points, strict=True)
            axes.plot(x, mean, "o-", color=COLORS[name], label=label)
            axes.fill_between(x, low, high, color=COLORS[name], alpha=0.15, linewidth=0)
        if key in teacher["measures"]:
            axes.axhline(teacher["measures"][key][0], color="#444", linestyle="--", label="teacher")
        axes.set_xscale("log")
        axes.set_xlabel("parameters of the student")
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    runs = parser.parse_args().runs
    sizes = {f"width {width}": summarize_size(runs, task) for width, task in SIZES.items()}
    tested = json.loads((runs / "e2e" / "teacher" / "test.json").read_text())
    teacher = {
        "parameters": json.loads((runs / "e2e" / "teacher" / "stage.json").read_text())["parameters"],
        "measures": {key: interval(values_of([tested], key)) for key in MEASURES if key in tested["summary"]},
    }
    settings = {"training_seeds": SEEDS, "test_seeds": TEST_SEEDS, "learning_rates": LEARNING_RATES}
    command = "python benchmarks/quality/sizes.py"
    from measurement import write_record  # in the folder above, which run.py puts on the path

    path = write_record("quality_sizes", PACKAGES, settings, {"teacher": teacher, "sizes": sizes}, command)
    plot(sizes, teacher, path.with_suffix(".png"))
    insert_table(README, "sizes", table(sizes, teacher))
    print(table(sizes, teacher))


if __name__ == "__main__":
    main()
