"""Makes `results/frontier_TASK.json`, its figure and the tables in Markdown from the records of `frontier_run.py`.

    python benchmarks/frontier/frontier_summary.py [--task e2e]

Means are over test prompts, sampling seeds and training seeds. Intervals are 95 % percentiles of a bootstrap that
draws training seeds and prompts, both with replacement. At equal entropy, Rouge-L and reverse KL are interpolated
between temperatures, for each replicate and training seed separately, so that the entropies vary along with the
values. The differences of two methods are paired by training seed and prompt.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from frontier_methods import (  # which puts the folders it needs on the path
    ABLATIONS,
    FAMILY,
    FAMILY_RIVALS,
    MAIN,
    METHODS,
    SAME_AS,
)
from frontier_run import (
    ENTROPIES,
    GREEDY,
    LEARNING_RATES,
    STARTS,
    TEMPERATURES,
    TEST_SEEDS,
    VALIDATION_SEEDS,
    Benchmark,
    best_rate,
    finished,
    scores_by_rate,
)
from frontier_statistics import Frontier, difference, interval
from matplotlib.figure import Figure
from resumable_jobs import Run
from run import SEEDS
from summarize import format_interval, insert_table

README = Path(__file__).with_name("README.md")
SCRIPTS = ("run", "summary")
PACKAGES = ("torch", "transformers", "trl", "accelerate")
FAMILY_PAGE = README.parents[2] / "docs" / "family.md"
COMPARED = ("sft_student", "sft", "distillation_at_one", "distillation_cool", "minillm")
SHOWN = {  # in the figure
    "teacher": "#444444",
    "sft_student": "#999999",
    "sft": "#b85c00",
    "distillation_at_one": "#b0478a",
    "distillation_cool": "#7a6500",
    "minillm": "#0072b2",
    "low_variance_normalised": "#007a5a",
    "low_variance_cool": "#5b4fc4",
}
LABELS = {"teacher": "teacher", "sft_student": "SFT student (the start)"}


def tuned(records: list[dict[str, Any]]) -> str:
    """Return the decoding with the highest Rouge-L on the validation prompts, mean over the training seeds."""
    means = {
        decoding: np.mean([record["validation"][decoding]["rouge_l"] for record in records])
        for decoding in records[0]["validation"]
    }
    return max(means, key=means.__getitem__)


def summarize(benchmark: Benchmark) -> dict[str, Any]:
    """Return all numbers of the rows that have records, or had them earlier."""
    records, rates = {"teacher": [benchmark.record("teacher")]}, {}
    records["sft_student"] = [benchmark.record(name) for name in STARTS if name != "teacher"]
    for method in (*MAIN, *FAMILY):
        rate = best_rate(benchmark, method)
        runs = [] if rate is None else [finished(benchmark, Run(method, rate, seed)) for seed in SEEDS]
        if runs and all("test" in run for run in runs):
            rates[method], records[method] = rate, runs
    frontiers = {
        name: Frontier([record["test"] for record in found], [str(value) for value in TEMPERATURES], ENTROPIES)
        for name, found in records.items()
    }
    rows = {name: _measures(frontier, tuned(records[name])) for name, frontier in frontiers.items()}
    for name, rate in rates.items():
        rows[name] |= {
            "label": METHODS[name].label,
            "updates": METHODS[name].updates,
            "learning_rate": rate,
            "cpu_seconds": float(np.mean([record["cpu_seconds"] for record in records[name]])),
            "validation_at_equal_entropy": {
                f"{rate:g}": score for rate, score in scores_by_rate(benchmark, name).items()
            },
            "commits": sorted({record["commit"] for record in records[name]}),
        }
        if "minillm" in rates:
            mean = np.mean([record["cpu_seconds"] for record in records["minillm"]])
            rows[name]["cpu_time_over_minillm"] = rows[name]["cpu_seconds"] / float(mean)
    for name in rates:
        rows[name]["minus"] = {
            rival: _differences(frontiers[name], frontiers[rival], rows[name], rows[rival])
            for rival in (*COMPARED, "single_step_cool")
            if rival in rows and rival != name
        }
    order = ("teacher", "sft_student", *MAIN, *FAMILY)
    rows = {name: rows[name] for name in order if name in rows}
    sizes = [benchmark.record(name).get("parameters") for name in STARTS[:2]]
    return {
        "prompts": frontiers["teacher"].prompts,
        "teacher_over_student": sizes[0] / sizes[1] if all(sizes) else None,
        "rows": rows,
        "ablations": _ablations(benchmark),
    }


def _measures(frontier: Frontier, decoding: str) -> dict[str, Any]:
    measures = {
        point: {name: interval(frontier.replicates(point, name)) for name in values}
        for point, values in frontier.values.items()
    }
    # The teacher's own reverse KL is 0
    median = np.median(frontier.values["1.0"]["reverse_kl"], axis=1)
    largest = frontier.values["1.0"]["largest_kl"].max(axis=1)[median > 0] / median[median > 0]
    return {
        "decodings": measures,
        "tuned": decoding,
        "at_equal_entropy": {name: interval(frontier.at_entropies(name)) for name in ("rouge_l", "reverse_kl")},
        "by_seed": {
            point: {name: values[name].mean(axis=1).tolist() for name in ("rouge_l", "entropy_per_token")}
            for point, values in frontier.values.items()
            if point != GREEDY
        },
        "largest_kl_over_median": largest.tolist(),
    }


def _differences(first: Frontier, second: Frontier, row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {
        "rouge_l": difference(first.replicates("1.0", "rouge_l"), second.replicates("1.0", "rouge_l")),
        "reverse_kl": difference(first.replicates("1.0", "reverse_kl"), second.replicates("1.0", "reverse_kl")),
        "tuned_rouge_l": difference(
            first.replicates(row["tuned"], "rouge_l"), second.replicates(other["tuned"], "rouge_l")
        ),
        "greedy_rouge_l": difference(first.replicates(GREEDY, "rouge_l"), second.replicates(GREEDY, "rouge_l")),
        "equal_entropy_rouge_l": difference(first.at_entropies("rouge_l"), second.at_entropies("rouge_l")),
        "equal_entropy_reverse_kl": difference(first.at_entropies("reverse_kl"), second.at_entropies("reverse_kl")),
    }


def _ablations(benchmark: Benchmark) -> dict[str, Any]:
    """Return the validation results of every kind of long term at its best rate, at the first training seed."""
    rows = {}
    for name in ABLATIONS:
        method = SAME_AS.get(name, name)
        rate = best_rate(benchmark, method)
        record = finished(benchmark, Run(method, rate, SEEDS[0])) if rate is not None else {}
        if record:
            rows[name] = {
                "learning_rate": rate,
                "at_equal_entropy": record["at_equal_entropy"],
                "validation": record["validation"],
            }
    return rows


def family_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the family, with the differences from SFT continued and from OPD."""
    head = ["method", "rate", "CPU time", "reverse KL at 1", "forward KL at 1", "Rouge-L, greedy"]
    head += ["Rouge-L at equal entropy", "– SFT continued", "– OPD", "distinct 4-grams at 1"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    rows = summary["rows"]
    for name in (*FAMILY_RIVALS, *FAMILY):
        if name not in rows:
            continue
        row, at_one = rows[name], rows[name]["decodings"]["1.0"]
        gains = [
            format_interval(row["minus"][rival]["equal_entropy_rouge_l"], 1, sign=True)
            if rival in row["minus"]
            else "–"
            for rival in ("sft", "single_step_cool")
        ]
        cells = [
            "OPD (single step alone)" if name == "single_step_cool" else row["label"],
            f"{row['learning_rate']:g}",
            f"{row['cpu_time_over_minillm']:.2f}",
            format_interval(at_one["reverse_kl"], 1),
            format_interval(at_one["forward_kl"], 1),
            format_interval(row["decodings"][GREEDY]["rouge_l"], 1),
            format_interval(row["at_equal_entropy"]["rouge_l"], 1),
            *gains,
            f"{at_one['distinct_4grams'][0]:.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the methods."""
    head = [
        *("", "rate", "CPU time", "Rouge-L at 1", "reverse KL at 1", "entropy at 1"),
        *("best decoding", "Rouge-L there", "greedy", "Rouge-L at equal entropy", "reverse KL at equal entropy"),
    ]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, row in summary["rows"].items():
        if name in FAMILY:
            continue
        at_one, best, equal = row["decodings"]["1.0"], row["decodings"][row["tuned"]], row["at_equal_entropy"]
        trained = "label" in row
        cells = [
            row.get("label", LABELS.get(name, name)),
            f"{row['learning_rate']:g}" if trained else "–",
            f"{row['cpu_time_over_minillm']:.2f}" if "cpu_time_over_minillm" in row else "–",
            format_interval(at_one["rouge_l"], 1),
            format_interval(at_one["reverse_kl"], 1) if name != "teacher" else "–",
            format_interval(at_one["entropy_per_token"], 2),
            row["tuned"],
            format_interval(best["rouge_l"], 1),
            format_interval(row["decodings"][GREEDY]["rouge_l"], 1),
            format_interval(equal["rouge_l"], 1),
            format_interval(equal["reverse_kl"], 1),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def diversity_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of diversity and coverage."""
    head = ["", "forward KL at 1", "distinct 4-grams at 1", "at 0.7", "self-BLEU at 1", "at 0.7"]
    head += [f"best Rouge-L of {len(TEST_SEEDS)} at 1", "at 0.7"]
    lines = ["| " + " | ".join(head) + " |", "|---|" + "---:|" * (len(head) - 1)]
    for name, row in summary["rows"].items():
        if name in FAMILY:
            continue
        points = [row["decodings"][temperature] for temperature in ("1.0", "0.7")]
        cells = [row.get("label", LABELS.get(name, name))]
        cells.append(format_interval(points[0]["forward_kl"], 1) if name != "teacher" else "–")
        cells += [f"{point['distinct_4grams'][0]:.2f}" for point in points]
        cells += [f"{point['self_bleu'][0]:.1f}" for point in points]
        cells += [format_interval(point["best_rouge_l"], 1) for point in points]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def differences_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the differences from the rivals."""
    columns = {
        "rouge_l": "Rouge-L at 1",
        "reverse_kl": "reverse KL at 1",
        "tuned_rouge_l": "Rouge-L, best decoding of each",
        "greedy_rouge_l": "greedy",
        "equal_entropy_rouge_l": "Rouge-L at equal entropy",
        "equal_entropy_reverse_kl": "reverse KL at equal entropy",
    }
    lines = ["| | minus | " + " | ".join(columns.values()) + " |", "|---|---|" + "---:|" * len(columns)]
    rows = summary["rows"]
    for name in ("minillm", "low_variance_normalised", "low_variance_normalised_cool", "low_variance_cool"):
        for rival, found in rows.get(name, {}).get("minus", {}).items():
            if rival not in COMPARED:
                continue
            cells = [rows[name]["label"], LABELS.get(rival) or rows[rival]["label"]]
            cells += [format_interval(found[key], 1, sign=True) for key in columns]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def ablations_table(summary: dict[str, Any]) -> str:
    """Return the Markdown table of the kinds of long term."""
    points = ("1.0", "0.7", "0.55", GREEDY)
    head = ["long term", "length normalisation", "mixing", "rate", *(f"Rouge-L at {point}" for point in points)]
    head += ["Rouge-L at equal entropy", "length at 1"]
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * (len(head) - 2)]
    for name, row in summary["ablations"].items():
        options, validation = METHODS[SAME_AS.get(name, name)].options, row["validation"]
        long_term = name.split("-")[0]
        normalised = "–" if long_term == "none" else "yes" if options["length_normalization"] else "no"
        long_term += f", gamma {options['gamma']:g}" if options["gamma"] != 1 else ""
        cells = [long_term, normalised, f"{options['teacher_mixed_alpha']:g}"]
        cells += [f"{row['learning_rate']:g}", *(f"{validation[point]['rouge_l']:.1f}" for point in points)]
        cells += [f"{row['at_equal_entropy']:.1f}", f"{validation['1.0']['length']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(summary: dict[str, Any], path: Path, highest: float | None) -> None:
    """Draw Rouge-L and reverse KL over entropy, with intervals; reverse KL up to `highest` nats."""
    figure = Figure(figsize=(10.5, 4.6), layout="constrained")
    panels = figure.subplots(1, 2)
    for axes, key, title in zip(panels, ("rouge_l", "reverse_kl"), ("Rouge-L →", "← reverse KL (nats)"), strict=True):
        for name, color in SHOWN.items():
            row = summary["rows"].get(name)
            if row is None:
                continue
            points = [row["decodings"][str(temperature)] for temperature in TEMPERATURES]
            values = np.array([point[key] for point in points])
            axes.errorbar(
                [point["entropy_per_token"][0] for point in points],
                values[:, 0],
                yerr=[values[:, 0] - values[:, 1], values[:, 2] - values[:, 0]],
                color=color,
                linestyle="--" if name == "teacher" else "-",
                marker="o",
                markersize=4,
                capsize=2,
                linewidth=1.6,
                label=LABELS.get(name) or row["label"],
            )
        axes.set_xlabel("entropy (nats a token), at temperatures " + ", ".join(map(str, TEMPERATURES)), fontsize=9)
        axes.set_title(title, fontsize=10)
        axes.grid(alpha=0.25)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    panels[1].set_ylim(0, highest)
    figure.legend(
        *panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False, fontsize=8.5
    )
    figure.savefig(path, dpi=120, facecolor="white", metadata={"Software": None})


def main() -> None:
    from tasks import TASKS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=TASKS, default="e2e")
    task = parser.parse_args().task
    summary = summarize(Benchmark(task, Path("unused")))
    settings = {
        "training_seeds": SEEDS,
        "validation_seeds": VALIDATION_SEEDS,
        "test_seeds": TEST_SEEDS,
        "temperatures": TEMPERATURES,
        "learning_rates": LEARNING_RATES,
        "entropies": ENTROPIES.tolist(),
    }
    from measurement import write_record

    command = " && ".join(f"python benchmarks/frontier/frontier_{script}.py --task {task}" for script in SCRIPTS)
    path = write_record(f"frontier_{task}", PACKAGES, settings, summary, command)
    if task in ("e2e", "dolly"):  # sizes have a table in common
        plot(summary, path.with_suffix(".png"), 16 if task == "e2e" else None)
    if task == "e2e":
        insert_table(README, "main", main_table(summary))
        insert_table(README, "diversity", diversity_table(summary))
        insert_table(README, "differences", differences_table(summary))
        insert_table(README, "ablations", ablations_table(summary))
        insert_table(FAMILY_PAGE, "family", family_table(summary))
    elif task == "dolly":
        insert_table(README, "dolly", main_table(summary))
        insert_table(README, "dolly differences", differences_table(summary))
    print(f"{len(summary['rows']) - 2} rows of {len(MAIN) + len(FAMILY)}, {len(summary['ablations'])} ablations")


if __name__ == "__main__":
    main()
