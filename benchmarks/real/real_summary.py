"""Makes `results/real_<scale>.json`, its figure, and the tables and answers of the pages from `real_run.py`'s records.

    python benchmarks/real/real_summary.py [--scale cpu|cpu_context|cpu_context_long|gpu]

The tables have what is finished: rows name their training seeds and the learning rates that were tried, and a measure
that a record lacks is a dash. Intervals are those of `frontier_statistics.py`. The teacher's log-prob of an answer's
token is minus entropy and reverse KL a token, whose sum is the cross-entropy of the student's distribution from the
teacher's. Exposure bias is the excess accumulated error at the last position that half of the samples of every model
reach, so that all rows are compared at the same one.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "frontier"))
sys.path.insert(0, str(Path(__file__).parents[1] / "quality"))

from frontier_statistics import Frontier, difference, interval, prompt_weights
from measurement import write_record
from real_measures import OTHERS, TEMPERATURES
from real_methods import METHODS, SCALES
from real_run import LEARNING_RATES, PACKAGES, RESULTS, SEEDS, Run
from real_tables import SAMPLED, plot, write_pages
from real_tasks import TASKS, Task

MEASURES = ("rouge_l", "reverse_kl_per_token", "length", "eos_rate", "repeated_4grams", "entropy_per_token")
RIVALS = ("sft", "healing", "kd", "seqkd", "gkd", "distillation", "distillation_cool")

Record = dict[str, Any]


def task_of(scale: str) -> Task:
    """Return the task of a scale."""
    return TASKS[SCALES[scale].task]


def read_records(scale: str) -> dict[str, Record]:
    """Return the records of the scale by name, without those of another recipe than the start's."""
    records = {path.stem: json.loads(path.read_text()) for path in sorted((RESULTS / scale).glob("*.json"))}
    recipe = records[task_of(scale).start].get("recipe")
    return {name: record for name, record in records.items() if record.get("recipe") == recipe}


def validation_scores(records: dict[str, Record], method: str) -> dict[float, float]:
    """Return the mean validation Rouge-L over the decodings at the first training seed, by learning rate."""
    return {
        rate: float(np.mean([np.mean(found["rouge_l"]) for found in record["validation"].values()]))
        for rate in LEARNING_RATES
        if "validation" in (record := records.get(Run(method, rate, SEEDS[0]).name, {}))
    }


def chosen_rate(records: dict[str, Record], method: str) -> float | None:
    """Return the best learning rate of the method among those with a test; None before any is tested."""
    scores = validation_scores(records, method)
    tested = [rate for rate in scores if "test" in records[Run(method, rate, SEEDS[0]).name]]
    return max(tested, key=scores.__getitem__, default=None)


def chosen_runs(records: dict[str, Record], method: str) -> dict[str, Record]:
    """Return the tested runs of the method at its chosen learning rate, by name."""
    if (rate := chosen_rate(records, method)) is None:
        return {}
    names = [Run(method, rate, seed).name for seed in SEEDS]
    return {name: records[name] for name in names if "test" in records.get(name, {})}


def best_setting(records: dict[str, Record]) -> str | None:
    """Return the MiniLLM setting with the highest validation Rouge-L at its best rate; None before any is tested."""
    scores = {
        name: max(validation_scores(records, name).values())
        for name, method in METHODS.items()
        if method.kind == "minillm" and method.options.get("rkl_advantage", True) and chosen_runs(records, name)
    }
    return max(scores, key=scores.__getitem__, default=None)


def summarize(scale: str) -> dict[str, Any]:
    """Return the rows of the tables, the differences between them, and the answers."""
    records, task = read_records(scale), task_of(scale)
    found = {name: {name: records[name]} for name in (task.teacher, task.start) if "test" in records.get(name, {})}
    found |= {method: runs for method in METHODS if (runs := chosen_runs(records, method))}
    every_run = [run for runs in found.values() for run in runs.values()]
    entropies, position = shared_entropies(every_run), shared_position(every_run)
    rows, replicates = {}, {}
    for name, runs_by_name in found.items():
        runs = list(runs_by_name.values())
        frontier = Frontier([run["test"] for run in runs], SAMPLED, entropies)
        rows[name] = row_of(frontier, runs)
        replicates[name] = replicates_of(frontier, runs, rows[name]["tuned"], position)
        rows[name]["measures"] = {measure: interval(values) for measure, values in replicates[name].items()}
        if name in METHODS:
            scores = validation_scores(records, name)
            rows[name] |= {
                "label": METHODS[name].label,
                "learning_rate_is_best": max(scores, key=scores.__getitem__) == chosen_rate(records, name),
                "learning_rate": runs[0]["identity"]["run"]["learning_rate"],
                "learning_rates_tried": list(scores),
                "seeds": [run["identity"]["run"]["seed"] for run in runs],
                "updates": runs[0]["updates"],
                "seconds": float(np.mean([run["seconds"] for run in runs])),
            }
    for name in METHODS.keys() & rows.keys():
        rows[name]["minus"] = {
            rival: differences(replicates[name], replicates[rival])
            for rival in (task.start, *RIVALS)
            if rival in rows and rival != name and len(found[rival]) in (1, len(found[name]))
        }
    return {
        "entropies": entropies.tolist(),
        "exposure_bias_position": position,
        "prompts": len(records[task.start]["test"]["1.0"]["rouge_l"]),
        "answer_tokens": SCALES[scale].answer_tokens,
        "rows": rows,
        "answers": answers_of(records, task),
    }


def shared_entropies(runs: Sequence[Record]) -> np.ndarray:
    """Return entropies that every run reaches between its highest and its lowest temperature, in nats a token."""
    means = [[np.mean(run["test"][decoding]["entropy_per_token"]) for decoding in SAMPLED] for run in runs]
    return np.linspace(max(map(min, means)), min(map(max, means)), 9)


def shared_position(runs: Sequence[Record]) -> int | None:
    """Return the last position that half of the samples of every run, and of the teacher, reach; None without any."""
    samples = [samples for run in runs for samples in run.get("forward_errors", {}).values()]
    lengths = [sorted(map(len, of_one), reverse=True) for of_one in samples]
    return min((by_length[(len(by_length) - 1) // 2] for by_length in lengths), default=None)


def row_of(frontier: Frontier, runs: Sequence[Record]) -> dict[str, Any]:
    """Return the measures of a row by decoding, distinct-n, and the decoding with the best validation Rouge-L."""
    validation = {
        decoding: np.mean([run["validation"][decoding]["rouge_l"] for run in runs]) for decoding in TEMPERATURES
    }
    row: dict[str, Any] = {
        "decodings": {
            decoding: {name: interval(frontier.replicates(decoding, name)) for name in MEASURES if name in values}
            for decoding, values in frontier.values.items()
        },
        "tuned": max(validation, key=validation.__getitem__),
    }
    if all("distinct" in run for run in runs):
        row["distinct"] = {
            decoding: {n: float(np.mean([run["distinct"][decoding][n] for run in runs])) for n in values}
            for decoding, values in runs[0]["distinct"].items()
        }
    return row


def replicates_of(
    frontier: Frontier, runs: Sequence[Record], tuned: str, position: int | None
) -> dict[str, np.ndarray]:
    """Return the bootstrap's replicates of each measure that is compared, `(replicates + 1, seeds)`.

    A measure that one of the runs lacks is left out.
    """
    found = {
        "tuned_rouge_l": frontier.replicates(tuned, "rouge_l"),
        "greedy_rouge_l": frontier.replicates("greedy", "rouge_l"),
        "equal_entropy_rouge_l": frontier.at_entropies("rouge_l"),
    }
    if "reverse_kl_per_token" in frontier.values["1.0"]:
        found["reverse_kl_per_token"] = frontier.replicates("1.0", "reverse_kl_per_token")
        found["equal_entropy_reverse_kl"] = frontier.at_entropies("reverse_kl_per_token")
        found["greedy_teacher_logp"] = -(
            frontier.replicates("greedy", "entropy_per_token") + frontier.replicates("greedy", "reverse_kl_per_token")
        )
    if position is not None and all("forward_errors" in run for run in runs):
        errors = [run["forward_errors"] for run in runs]
        found["forward_kl_per_token"] = _mean_replicates(
            [[np.mean(values) for values in run["on_teacher"]] for run in errors]
        )
        found["exposure_bias"] = np.stack([exposure_replicates(run, position) for run in errors], axis=1)
    for task, decodings in OTHERS.items():
        for decoding in decodings:
            tests = [run.get("other_prompts", {}).get(task, {}).get(decoding) for run in runs]
            if all(test is not None for test in tests):
                values = [test["rouge_l"] for test in tests]
                found[f"{task}_{decoding}_rouge_l"] = _mean_replicates(values)
    return found


def _mean_replicates(values: Sequence[Sequence[float]]) -> np.ndarray:
    """Return the means over prompts of each seed's values, `(replicates + 1, seeds)`."""
    by_seed = np.array(values)
    return prompt_weights(by_seed.shape[1]) @ by_seed.T


def exposure_replicates(errors: dict[str, list[list[float]]], position: int) -> np.ndarray:
    """Return the excess accumulated error at the position in per cent, `(replicates + 1,)`.

    See `minillm_trl.evaluation.exposure_bias`; the bootstrap draws prompts, with one sample of each model.
    """
    own, teachers = (
        accumulated_error(errors[source], position, prompt_weights(len(errors[source])))
        for source in ("on_model", "on_teacher")
    )
    return 100 * (own - teachers) / teachers


def accumulated_error(samples: Sequence[Sequence[float]], position: int, weights: np.ndarray) -> np.ndarray:
    """Return the sum over positions up to this one of the mean error, with each row of weights of the samples.

    The mean at a position is over the samples that have a token there. Where a draw has no such sample, it counts as
    zero: if half of 40 samples reach the position, that is one draw in 10^12.
    """
    errors, reached = np.zeros((2, len(samples), position))
    for row, values in enumerate(samples):
        kept = values[:position]
        errors[row, : len(kept)], reached[row, : len(kept)] = kept, 1
    totals, counts = weights @ errors, weights @ reached
    return np.divide(totals, counts, out=np.zeros_like(totals), where=counts > 0).sum(axis=1)


def differences(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Return the differences of two rows, paired by prompt and training seed."""
    return {name: difference(values, second[name]) for name, values in first.items() if name in second}


def answers_of(records: dict[str, Record], task: Task) -> dict[str, Any] | None:
    """Return the first greedy answers of teacher, start and MiniLLM student; None before they are measured."""
    if (setting := best_setting(records)) is None:
        return None
    student = next(iter(chosen_runs(records, setting).values()))
    writers = {"teacher": records[task.teacher], "start": records[task.start], "student": student}
    return {
        "label": METHODS[setting].label,
        "seed": student["identity"]["run"]["seed"],
        "rows": [
            {"prompt": first["prompt"]} | {name: record["answers"][row]["answer"] for name, record in writers.items()}
            for row, first in enumerate(writers["teacher"]["answers"])
        ],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", choices=SCALES, default="cpu")
    scale = parser.parse_args().scale
    summary = summarize(scale)
    settings = {"training_seeds": SEEDS, "learning_rates": LEARNING_RATES, "decodings": TEMPERATURES}
    options = {"run": " --selfinst FILE --vicuna FOLDER" * task_of(scale).has_other_tests, "summary": ""}
    command = " && ".join(
        f"python benchmarks/real/real_{script}.py --scale {scale}{words}" for script, words in options.items()
    )
    path = write_record(f"real_{scale}", PACKAGES, settings, summary, command)
    plot(summary, path.with_suffix(".png"))
    if scale != "gpu":
        write_pages(summary, scale)


if __name__ == "__main__":
    main()
