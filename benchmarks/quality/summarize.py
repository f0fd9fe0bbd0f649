"""Makes `results/quality_<task>.json`, the table in this folder's README and the pictures from the runs of `run.py`.

    python benchmarks/quality/summarize.py [--task e2e] [--methods sft kd seqkd minillm ...]

Of each measure: the mean over test prompts, sampling seeds and training seeds. Intervals are 95 % percentiles of a
bootstrap that draws training seeds and prompts anew, both with replacement; those of differences to MiniLLM are paired
by training seed and prompt.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from methods import METHODS
from run import (
    LEARNING_RATES,
    SEEDS,
    TEST_SEEDS,
    VALIDATION_SEEDS,
    Run,
    best_learning_rates,
    finished,
    validation_scores,
)
from tasks import TASKS

PACKAGES = ("torch", "transformers", "trl", "accelerate")
README = Path(__file__).with_name("README.md")
COLUMNS = {
    "rouge_l": ("Rouge-L", 1),
    "reverse_kl": ("reverse KL", 1),
    "forward_kl": ("forward KL", 1),
    "length": ("length", 1),
    "repeated_4grams": ("repeated 4-grams", 3),
    "distinct_ngrams": ("Dist-4 of a prompt", 2),
}
REPLICATES = 2000


def interval(values: np.ndarray) -> list[float]:
    """Mean, and its 95 % interval over training seeds and prompts; `values` has the shape (seeds, prompts)."""
    generator = np.random.default_rng(0)
    seeds, prompts = values.shape
    means = [
        values[generator.integers(seeds, size=seeds)][:, generator.integers(prompts, size=prompts)].mean()
        for _ in range(REPLICATES)
    ]
    return [float(values.mean()), *np.percentile(means, (2.5, 97.5)).tolist()]


def values_of(results: list[dict[str, Any]], measure: str) -> np.ndarray | None:
    if any(measure not in result["summary"] for result in results):
        return None
    return np.array([[row[measure] for row in result["per_prompt"]] for result in results])


def summarize(folder: Path, task: str, methods: list[str]) -> dict[str, Any]:
    """Return all numbers of the comparison."""
    rates = best_learning_rates(folder, task, methods)
    results, training = {}, {}
    for name in ("teacher", "sft_student"):
        folders = ["teacher"] if name == "teacher" else [f"sft-{seed}" for seed in SEEDS]
        results[name] = [json.loads((folder / run / "test.json").read_text()) for run in folders]
    for name, rate in rates.items():
        runs = [Run(task, name, rate, seed) for seed in SEEDS]
        results[name] = [finished(folder, run, "test") for run in runs]
        training[name] = [finished(folder, run, "train") for run in runs]
    reference = np.mean([run["cpu_seconds"] for run in training["minillm"]])
    rows = {}
    for name, runs in results.items():
        values = {key: found for key in COLUMNS if (found := values_of(runs, key)) is not None}
        rows[name] = {"measures": {key: interval(found) for key, found in values.items()}}
        rows[name]["by_seed"] = {key: found.mean(axis=1).tolist() for key, found in values.items()}
        if name in training:
            rows[name] |= {
                "label": METHODS[name].label,
                "updates": METHODS[name].updates,
                "learning_rate": rates[name],
                "cpu_time_over_minillm": float(np.mean([run["cpu_seconds"] for run in training[name]]) / reference),
                "minillm_minus": {
                    key: interval(values_of(results["minillm"], key) - values[key])
                    for key in ("rouge_l", "reverse_kl", "forward_kl")
                },
                "validation_rouge_l": {
                    f"{rate:g}": score for rate, score in validation_scores(folder, task, name).items()
                },
                "commits": sorted({run["commit"] for run in training[name]}),
            }
    teacher, student = (
        json.loads((folder / name / "stage.json").read_text())["parameters"] for name in ("teacher", f"sft-{SEEDS[0]}")
    )
    return {
        "parameters": {"teacher": teacher, "student": student},
        "prompts": len(results["teacher"][0]["per_prompt"]),
        "rows": rows,
    }


def table(summary: dict[str, Any]) -> str:
    """The Markdown table."""
    head = ["", *(label for label, _ in COLUMNS.values()), "lr", "CPU time", "MiniLLM's lead in Rouge-L"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    names = {"teacher": "teacher", "sft_student": "SFT student (the start)"}
    for name, row in summary["rows"].items():
        cells = [names.get(name) or row["label"]]
        cells[0] = f"**{cells[0]}**" if name == "minillm" else cells[0]
        for key, (_, digits) in COLUMNS.items():
            cells.append(format_interval(row["measures"].get(key), digits))
        if name in names:
            cells += ["–"] * 3
        else:
            lead = "–" if name == "minillm" else format_interval(row["minillm_minus"]["rouge_l"], 1, sign=True)
            cells += [f"{row['learning_rate']:g}", f"{row['cpu_time_over_minillm']:.2f}", lead]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def format_interval(values: list[float] | None, digits: int, sign: bool = False) -> str:
    """Mean and interval for a table; a dash where there is none."""
    if values is None:
        return "–"
    mean, low, high = (f"{value:{'+' if sign else ''}.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"


def plot(summary: dict[str, Any], path: Path) -> None:
    """Rouge-L and reverse KL of each method with intervals, and validation Rouge-L over the learning rate."""
    rows = summary["rows"]
    names = [name for name in rows if name != "teacher"]
    labels = {"sft_student": "SFT student (the start)"}
    figure = Figure(figsize=(12.5, 4.6), layout="constrained")
    first, second, third = figure.subplots(1, 3, width_ratios=(1, 1, 0.9))
    for axes, key, title in ((first, "rouge_l", "Rouge-L →"), (second, "reverse_kl", "← reverse KL (nats)")):
        for position, name in enumerate(names):
            mean, low, high = rows[name]["measures"][key]
            color = "#1F83CC" if name == "minillm" else "#777"
            axes.errorbar(mean, -position, xerr=[[mean - low], [high - mean]], fmt="o", color=color, capsize=3)
        if key in rows["teacher"]["measures"]:
            mean = rows["teacher"]["measures"][key][0]
            axes.axvline(mean, color="#444", linestyle="--")
            axes.text(mean, 0.75, " teacher", color="#444", fontsize=8, va="center")
        axes.set_ylim(0.5 - len(names), 1)
        axes.set_yticks([-i for i in range(len(names))])
        axes.set_yticklabels([labels.get(name) or rows[name]["label"] for name in names] if axes is first else [])
        axes.set_title(title, fontsize=10)
        axes.grid(axis="x", alpha=0.25)
    shown = {"minillm": "#1F83CC", "sft": "#777", "kd": "#009E73", "seqkd": "#CC79A7"}
    shown |= {"distillation_time": "#D55E00", "no_mixing": "#56B4E9"}
    for name, color in shown.items():
        if name not in rows:
            continue
        scores = rows[name]["validation_rouge_l"]
        third.plot(
            [float(rate) for rate in scores], list(scores.values()), "o-", color=color, label=rows[name]["label"]
        )
    third.set_xscale("log")
    third.set_title("validation Rouge-L over learning rate", fontsize=10)
    figure.legend(loc="outside lower right", ncols=len(shown), frameon=False, fontsize=8)  # never over the lines
    third.grid(alpha=0.25)
    for axes in (first, second, third):
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def insert_table(readme: Path, name: str, text: str) -> None:
    """Put a table between its marks."""
    start, end = f"<!-- {name}: made by a script -->\n", f"<!-- end of {name} -->"
    before, rest = readme.read_text().split(start)
    readme.write_text(f"{before}{start}{text}\n{end}{rest.split(end)[1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="e2e")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="rows (default: all)")
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    arguments = parser.parse_args()
    task, methods = arguments.task, [name for name in METHODS if name in arguments.methods]
    summary = summarize(arguments.runs / task, task, methods)
    settings = {
        "training_seeds": SEEDS,
        "validation_seeds": VALIDATION_SEEDS,
        "test_seeds": TEST_SEEDS,
        "learning_rates": LEARNING_RATES,
    }
    words = f"--task {task}" if len(methods) == len(METHODS) else f"--task {task} --methods {' '.join(methods)}"
    command = " && ".join(f"python benchmarks/quality/{script}.py {words}" for script in ("run", "summarize"))
    from measurement import write_record  # in the folder above, which run.py puts on the path

    path = write_record(f"quality_{task}", PACKAGES, settings, summary, command)
    plot(summary, path.with_suffix(".png"))
    insert_table(README, task, table(summary))
    print(table(summary))


if __name__ == "__main__":
    main()
