"""Write folders as `minillm-trl evaluate` does, from given numbers."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minillm_trl.evaluation.statistics import bootstrap_interval

SEEDS = [1, 2]
SETTINGS = {
    "seeds": SEEDS,
    "greedy": False,
    "temperature": 1.0,
    "no_repeat_ngram_size": 6,
    "max_new_tokens": 8,
    "split": "test",
    "label_words": None,
    "dataset": "data/dolly",
    "data_sha256": "1f",
    "model": "m",
    "adapter": None,
    "teacher": "t",
    "exposure_bias_samples": 0,
}


def summarize(per_prompt: Sequence[dict[str, float]]) -> dict[str, dict[str, Any]]:
    """Return the entry `summary`."""
    names = per_prompt[0] if per_prompt else ()
    return {name: bootstrap_interval([row[name] for row in per_prompt], resamples=200)._asdict() for name in names}


def write_results(
    folder: Path,
    per_prompt: dict[str, list[float]],
    *,
    prompts: Sequence[str] | None = None,
    reference: str = "r",
    outputs: Sequence[Sequence[str]] | None = None,
    bucket_of: Sequence[int] = (),
    excess_error: list[float | None] | None = None,
    counts: list[int] | None = None,
    calibration: dict[str, Any] | None = None,
    corpus: dict[str, float] | None = None,
    **settings: Any,
) -> Path:
    """Write `results.json` and `samples.jsonl`.

    Args:
        folder: must not exist.
        per_prompt: values by measure.
        prompts, outputs, reference: texts; each prompt has an output for each seed.
        bucket_of: number of each prompt's bucket of references; no buckets if None.
        excess_error, calibration, corpus: as in the file.
        counts: number of student samples at each position of `excess_error`; 10 by default.
        settings: settings that differ from `SETTINGS`.
    """
    folder.mkdir(parents=True)
    rows = [dict(zip(per_prompt, values, strict=True)) for values in zip(*per_prompt.values(), strict=True)]
    prompts = [f"x{i}" for i in range(len(rows))] if prompts is None else prompts
    outputs = [["o"] * len(SEEDS)] * len(rows) if outputs is None else outputs
    buckets = []
    for number, (low, high) in enumerate([(0, 5), (6, 10), (11, None)] if bucket_of else []):
        chosen = [row for row, bucket in zip(rows, bucket_of, strict=True) if bucket == number]
        buckets.append({"low": low, "high": high, "prompts": len(chosen), "summary": summarize(chosen)})
    counts = [10] * len(excess_error or ()) if counts is None else counts
    error = {"samples": 1, "prompts": len(rows), "student": [], "teacher": [], "excess_error": excess_error}
    error |= {"counts_student": counts, "counts_teacher": [10] * len(counts)}
    summary = summarize(rows)
    results = {
        "settings": {**SETTINGS, "prompts": len(rows), **settings},
        "versions": {},
        "summary": summary,
        "by_seed": {name: [each["mean"] - 0.5, each["mean"] + 0.5] for name, each in summary.items()},
        "corpus": corpus or {},
        "buckets": buckets,
        "exposure_bias": None if excess_error is None else error,
        "calibration": calibration,
        "per_prompt": rows,
    }
    (folder / "results.json").write_text(json.dumps(results))
    samples = [
        {
            "prompt": prompt,
            "references": [reference],
            "outputs": texts,
            "scores": {name: [value + 1, value - 1] for name, value in row.items()} if texts else {},
        }
        for prompt, texts, row in zip(prompts, outputs, rows, strict=True)
    ]
    text = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
    (folder / "samples.jsonl").write_text(text, encoding="utf-8")
    return folder
