"""Answers of several models side by side: which prompts are shown."""

import random
from collections.abc import Mapping, Sequence

from .report import Sample
from .results import TaskResult

_SEED = 0


def side_by_side(results: Mapping[str, TaskResult], students: Sequence[str], count: int) -> dict[str, list[Sample]]:
    """Choose prompts of a task, and put the answers to each side by side.

    Args:
        results (`Mapping[str, TaskResult]`): of the task by model, on the same prompts.
        students (`Sequence[str]`): the models whose differences count, if there are two or more.
        count (`int`): number of prompts chosen at random, and of those where the models differ most.

    Returns:
        `dict[str, list[Sample]]`: by how they were chosen; empty if the models wrote no text.
    """
    first = next(iter(results.values()))
    if not first.samples[0]["outputs"]:
        return {}
    rows = range(len(first.samples))
    drawn = sorted(random.Random(_SEED).sample(rows, min(count, len(rows))))
    groups = {f"Drawn at random (seed {_SEED})": drawn}
    compared = [name for name in results if name in students]
    kind = "students" if len(compared) > 1 else "models"
    scores = [
        [row["rouge_l"] for row in results[name].per_prompt]
        for name in (compared if len(compared) > 1 else results)
        if "rouge_l" in results[name].summary
    ]
    if len(scores) > 1:
        spread = [max(values) - min(values) for values in zip(*scores, strict=True)]
        rest = sorted((row for row in rows if row not in drawn and spread[row] > 0), key=lambda row: -spread[row])
        groups[f"Where the {kind} differ most in Rouge-L, mean over seeds"] = rest[:count]
    return {heading: [_sample(results, row) for row in chosen] for heading, chosen in groups.items() if chosen}


def _sample(results: Mapping[str, TaskResult], row: int) -> Sample:
    shown = {name: result.samples[row] for name, result in results.items()}
    prompt, references = (next(iter(shown.values()))[key] for key in ("prompt", "references"))
    return Sample(
        _text(prompt),
        references,
        {name: sample["outputs"][0] for name, sample in shown.items()},
        {name: _scores(sample.get("scores", {})) for name, sample in shown.items()},
    )


def _scores(scores: Mapping[str, Sequence[float]]) -> str:
    """Of the answer of the first seed, which is shown, beside the mean over all seeds."""
    parts = []
    if scores.get("rouge_l"):
        rouge = scores["rouge_l"]
        mean = f" (all seeds {sum(rouge) / len(rouge):.1f})" if len(rouge) > 1 else ""
        parts.append(f"Rouge-L {rouge[0]:.1f}{mean}")
    if scores.get("length"):
        parts.append(f"{scores['length'][0]:.0f} tokens")
    return ", ".join(parts)


def _text(prompt: str | list[dict[str, str]]) -> str:
    return prompt if isinstance(prompt, str) else "\n".join(f"{each['role']}: {each['content']}" for each in prompt)
