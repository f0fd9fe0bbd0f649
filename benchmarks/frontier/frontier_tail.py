"""Question: why do a few completions have a very large reverse KL, and which methods make them rarer?

    python benchmarks/frontier/frontier_tail.py   # needs the runs of frontier_run.py

Samples at temperature 1 for the validation prompts, five sampling seeds. Of the 2 % of completions with the largest
reverse KL: the KL per token before and after the token that the student itself found least likely.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from frontier_methods import MAIN  # puts the quality benchmark's folder on the path
from frontier_run import Benchmark, best_rate
from measurement import write_record
from resumable_jobs import Run
from run import SEEDS, start_worker
from tasks import load_model, make_tokenizer

from minillm_trl.data import unique_prompts
from minillm_trl.evaluation.divergence import completion_losses, score_completions
from minillm_trl.rollouts.prompts import encode_prompts, generate_completions

SAMPLING_SEEDS = (1, 2, 3, 4, 5)
TAIL = 0.02
MODELS = ("minillm", "distillation", "single_step", "single_step_cool", "low_variance_normalised", "low_variance")


def measure(benchmark: Benchmark, name: str) -> dict[str, Any]:
    """Return percentiles of the reverse KL of a completion, and the KL per token in the tail."""
    task, folder = benchmark.task, benchmark.folder
    student, teacher = load_model(folder, name), load_model(folder, "teacher")
    tokenizer = make_tokenizer(task, folder)
    texts = unique_prompts(task.load_data(folder)["validation"])["prompt"][:]
    prompt_ids = encode_prompts(tokenizer, texts)
    rows: list[tuple[list[float], list[float]]] = []
    for seed in SAMPLING_SEEDS:
        completions = generate_completions(
            student, tokenizer, texts, max_new_tokens=task.max_completion_length, seed=seed, batch_size=128
        )
        ids = [completion.token_ids for completion in completions]
        scores = score_completions(student, teacher, prompt_ids, ids, vocab_size=len(tokenizer), batch_size=128)
        assert scores.divergence is not None  # there is a teacher
        rows += zip(scores.divergence, completion_losses(student, prompt_ids, ids, batch_size=128), strict=True)
    totals = np.array([sum(divergence) for divergence, _ in rows])
    before, after = [], []
    for index in np.argsort(-totals)[: int(TAIL * len(rows))]:
        divergence, losses = rows[index]
        least_likely = int(np.argmax(losses))
        before += divergence[: least_likely + 1]  # the KL at a position comes before its token
        after += divergence[least_likely + 1 :]
    return {
        "mean": totals.mean(),
        **{f"percentile_{share}": np.percentile(totals, share) for share in (50, 90, 99)},
        "largest": totals.max(),
        "largest_over_median": totals.max() / np.median(totals),
        "per_token": sum(map(sum, (divergence for divergence, _ in rows))) / sum(len(losses) for _, losses in rows),
        "tail_per_token_before": np.mean(before),
        "tail_per_token_after": np.mean(after),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/quality"))
    benchmark = Benchmark("e2e", parser.parse_args().runs / "e2e")
    start_worker()
    names = {"SFT student (the start)": f"sft-{SEEDS[0]}"}
    for method in MODELS:
        rate = best_rate(benchmark, method)
        name = None if rate is None else f"frontier/{Run(method, rate, SEEDS[0]).name}"
        if name is None or not (benchmark.folder / name).is_dir():
            raise SystemExit(f"{benchmark.folder} lacks runs of {method}: frontier_run.py makes them.")
        names[MAIN[method].label] = name
    results = {}
    for label, name in names.items():
        results[label] = {key: round(float(value), 3) for key, value in measure(benchmark, name).items()}
        print(label, results[label], flush=True)
    settings = {"sampling_seeds": SAMPLING_SEEDS, "tail": TAIL, "training_seed": SEEDS[0]}
    write_record(
        "frontier_tail", ("torch", "transformers"), settings, results, "python benchmarks/frontier/frontier_tail.py"
    )


if __name__ == "__main__":
    main()
