"""Makes `results/real_<scale>.json`, its figure and the tables of this folder's README from `real_run.py`'s records.

    python benchmarks/real/real_summary.py [--scale cpu|gpu]

The table has what is finished: rows name their training seeds and the learning rates that were tried. Intervals are
those of `frontier_statistics.py`. The teacher's log-prob of an answer's token is minus entropy and reverse KL a token,
whose sum is the cross-entropy of the student's distribution from the teacher's.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "frontier"))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from frontier_statistics import Frontier, difference, interval
from matplotlib.figure import Figure
from measurement import write_record
from real_measures import TEMPERATURES
from real_methods import METHODS, SCALES
from real_run import LEARNING_RATES, PACKAGES, RESULTS, SEEDS, Run
from summarize import format_interval, insert_table

README = Path(__file__).with_name("README.md")
SAMPLED = [decoding for decoding in TEMPERATURES if decoding != "greedy"]
LABELS = {"teacher": "teacher", "heal": "healed student (the start)"}
MEASURES = ("rouge_l", "reverse_kl_per_token", "length", "eos_rate", "repeated_4grams", "entropy_per_token")
SHOWN = "low_variance_cool"  # whose answers are shown
RIVALS = ("heal", "sft", "healing", "distillation", "distillation_cool")


def read_records(scale: str) -> dict[str, dict[str, Any]]:
    """Return all records of the scale by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / scale).glob("*.json"))}


def chosen_runs(records: dict[str, dict[str, Any]], method: str) -> dict[str, dict[str, Any]]:
    """Return the tested runs of the method at its best learning rate of those tried, by name."""
    scores = {}
    for rate in LEARNING_RATES:
        if "validation" in (record := records.get(Run(method, rate, SEEDS[0]).name, {})):
            scores[rate] = np.mean([np.mean(found["rouge_l"]) for found in record["validation"].values()])
    if not scores:
        return {}
    names = [Run(method, max(scores, key=scores.__getitem__), seed).name for seed in SEEDS]
    return {name: records[name] for name in names if "test" in records.get(name, {})}


def summarize(scale: str) -> dict[str, Any]:
    """Return the rows of the table, and the differences between them."""
    records = read_records(scale)
    found = {name: {name: records[name]} for name in LABELS if "test" in records.get(name, {})}
    found |= {method: runs for method in METHODS if (runs := chosen_runs(records, method))}
    entropies = shared_entropies([run for runs in found.values() for run in runs.values()])
    frontiers = {
        name: Frontier([run["test"] for run in runs.values()], SAMPLED, entropies) for name, runs in found.items()
    }
    rows = {name: row_of(frontiers[name], list(runs.values())) for name, runs in found.items()}
    for name, row in rows.items():
        if name in METHODS:
            rates = [rate for rate in LEARNING_RATES if Run(name, rate, SEEDS[0]).name in records]
            runs = list(found[name].values())
            row |= {
                "label": METHODS[name].label,
                "learning_rate": runs[0]["identity"]["run"]["learning_rate"],
                "learning_rates_tried": rates,
                "seeds": [run["identity"]["run"]["seed"] for run in runs],
                "updates": runs[0]["updates"],
                "seconds": float(np.mean([run["seconds"] for run in runs])),
            }
            row["minus"] = {
                rival: differences(frontiers[name], frontiers[rival], row, rows[rival])
                for rival in RIVALS
                if rival in rows and rival != name and frontiers[rival].seeds in (1, frontiers[name].seeds)
            }
    return {"entropies": entropies.tolist(), "prompts": frontiers["heal"].prompts, "rows": rows}


def shared_entropies(runs: list[dict[str, Any]]) -> np.ndarray:
    """Return entropies that every run reaches between its highest and its lowest temperature, in nats a token."""
    means = [[np.mean(run["test"][decoding]["entropy_per_token"]) for decoding in SAMPLED] for run in runs]
    return np.linspace(max(map(min, means)), min(map(max, means)), 9)


def row_of(frontier: Frontier, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the measures of a row, and the decoding with the best validation Rouge-L."""
    validation = {
        decoding: np.mean([run["validation"][decoding]["rouge_l"] for run in runs]) for decoding in TEMPERATURES
    }
    decodings: dict[str, dict[str, list[float]]] = {}
    for decoding, values in frontier.values.items():
        decodings[decoding] = {
            name: interval(frontier.replicates(decoding, name)) for name in MEASURES if name in values
        }
        if "reverse_kl_per_token" in values:
            both = (frontier.replicates(decoding, name) for name in ("entropy_per_token", "reverse_kl_per_token"))
            decodings[decoding]["teacher_logp"] = interval(-sum(both))
    return {
        "decodings": decodings,
        "tuned": max(validation, key=validation.__getitem__),
        "at_equal_entropy": {
            name: interval(frontier.at_entropies(name))
            for name in ("rouge_l", "reverse_kl_per_token")
            if name in frontier.values["1.0"]
        },
    }


def differences(first: Frontier, second: Frontier, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Return the differences of two rows, paired by prompt and training seed."""

    def of(name: str, one: str, two: str) -> list[float]:
        return difference(first.replicates(one, name), second.replicates(two, name))

    return {
        "reverse_kl_per_token": of("reverse_kl_per_token", "1.0", "1.0"),
        "tuned_rouge_l": of("rouge_l", row["tuned"], other["tuned"]),
        "greedy_rouge_l": of("rouge_l", "greedy", "greedy"),
        "greedy_teacher_logp": [
            -value for value in np.array(of("reverse_kl_per_token", "greedy", "greedy"))[[0, 2, 1]].tolist()
        ],
        "equal_entropy_rouge_l": difference(first.at_entropies("rouge_l"), second.at_entropies("rouge_l")),
        "equal_entropy_reverse_kl": difference(
            first.at_entropies("reverse_kl_per_token"), second.at_entropies("reverse_kl_per_token")
        ),
    }


def main_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the rows."""
    head = [
        *("", "updates", "rate (tried)", "seeds", "reverse KL a token at 1", "entropy at 1", "best decoding"),
        *("Rouge-L there", "Rouge-L, greedy", "teacher's log-prob a token, greedy", "ends, greedy"),
        *("repeated 4-grams, greedy", "Rouge-L at equal entropy", "reverse KL a token at equal entropy"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, row in summary["rows"].items():
        at_one, best, greedy = (row["decodings"][decoding] for decoding in ("1.0", row["tuned"], "greedy"))
        trained, equal = "label" in row, row["at_equal_entropy"]
        cells = [
            row.get("label", LABELS.get(name, name)),
            str(row["updates"]) if trained else "–",
            f"{row['learning_rate']:g} ({len(row['learning_rates_tried'])})" if trained else "–",
            str(len(row["seeds"])) if trained else "–",
            format_interval(at_one.get("reverse_kl_per_token"), 2),
            format_interval(at_one["entropy_per_token"], 2),
            row["tuned"],
            format_interval(best["rouge_l"], 1),
            format_interval(greedy["rouge_l"], 1),
            format_interval(greedy.get("teacher_logp"), 2),
            f"{100 * greedy['eos_rate'][0]:.0f} %",
            f"{greedy['repeated_4grams'][0]:.2f}",
            format_interval(equal["rouge_l"], 1),
            format_interval(equal.get("reverse_kl_per_token"), 2),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the differences between MiniLLM and its rivals."""
    columns = {
        "reverse_kl_per_token": ("reverse KL a token at 1", 2),
        "tuned_rouge_l": ("Rouge-L, best decoding of each", 1),
        "greedy_rouge_l": ("Rouge-L, greedy", 1),
        "greedy_teacher_logp": ("teacher's log-prob a token, greedy", 2),
        "equal_entropy_rouge_l": ("Rouge-L at equal entropy", 1),
        "equal_entropy_reverse_kl": ("reverse KL a token at equal entropy", 2),
    }
    lines = ["| | minus | " + " | ".join(title for title, _ in columns.values()) + " |"]
    lines.append("|---|---|" + "---:|" * len(columns))
    rows = summary["rows"]
    for name in [name for name in rows if name in METHODS and METHODS[name].kind == "minillm"]:
        for rival, found in rows[name]["minus"].items():
            cells = [rows[name]["label"], rows[rival].get("label", LABELS.get(rival, rival))]
            cells += [format_interval(found[key], digits, sign=True) for key, (_, digits) in columns.items()]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def answers_table(records: dict[str, dict[str, Any]], student: dict[str, Any]) -> str:
    """Return the Markdown table of the first answers of teacher, start and the student of a run."""
    columns = {"teacher": records["teacher"], "healed student": records["heal"], "MiniLLM student": student}
    lines = ["| prompt | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for row, first in enumerate(records["teacher"]["answers"]):
        cells = [first["prompt"], *(record["answers"][row]["answer"] for record in columns.values())]
        lines.append("| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path) -> None:
    """Draw Rouge-L and reverse KL over entropy."""
    figure = Figure(figsize=(10.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2)
    titles = ("Rouge-L →", "← reverse KL (nats a token)")
    for axes, key, title in zip(panels, ("rouge_l", "reverse_kl_per_token"), titles, strict=True):
        for number, (name, row) in enumerate(summary["rows"].items()):
            points = [row["decodings"][decoding] for decoding in SAMPLED]
            if key in points[0]:
                values = np.array([point[key] for point in points])
                axes.errorbar(
                    [point["entropy_per_token"][0] for point in points],
                    values[:, 0],
                    yerr=[values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]],
                    color=f"C{number}",
                    linestyle="--" if name in LABELS else "-",
                    marker="o",
                    markersize=4,
                    capsize=2,
                    label=row.get("label", LABELS.get(name, name)),
                )
        axes.set_xlabel("entropy (nats a token), at temperatures " + ", ".join(SAMPLED), fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
    )
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    scale = parser.parse_args().scale
    summary = summarize(scale)
    settings = {"training_seeds": SEEDS, "learning_rates": LEARNING_RATES, "decodings": TEMPERATURES}
    command = " && ".join(f"python benchmarks/real/real_{script}.py --scale {scale}" for script in ("run", "summary"))
    path = write_record(f"real_{scale}", PACKAGES, settings, summary, command)
    plot(summary, path.with_suffix(".png"))
    tables = {"main": main_table(summary), "differences": differences_table(summary)}
    if students := chosen_runs(records := read_records(scale), SHOWN):
        tables["answers"] = answers_table(records, next(iter(students.values())))
    for name, table in tables.items():
        if scale == "cpu":
            insert_table(README, name, table)
        print(table, "\n")


if __name__ == "__main__":
    main()
