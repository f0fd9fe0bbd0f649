"""Choose the prompts whose answers a comparison shows side by side."""

import random
from collections.abc import Mapping, Sequence

from .report import Sample
from .results import TaskResult

_SEED = 0


def side_by_side(results: Mapping[str, TaskResult], students: Sequence[str], count: int) -> dict[str, list[Sample]]:
    """Choose prompts of a task and return the models' answers to them.

    Half of the prompts are random, the other half are those where the models' Rouge-L differs most.

    Args:
        results (`Mapping[str, TaskResult]`): results by model, on the same prompts.
        students (`Sequence[str]`): the models whose Rouge-L is compared, if two or more have results; otherwise all
            models are compared.
        count (`int`): number of prompts of each kind.

    Returns:
        `dict[str, list[Sample]]`: samples by a heading that says how they were chosen; empty if the models wrote no
        text.
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
    """Return the scores of the shown answer, which is the first seed's, with the Rouge-L mean over all seeds."""
    parts = []
    if scores.get("rouge_l"):
        rouge = scores["rouge_l"]
        mean = f" (all seeds {sum(rouge) / len(rouge):.1f})" if len(rouge) > 1 else ""
        parts.append(f"Rouge-L {rouge[0]:.1f}{mean}")
    if scores.get("length"):
        parts.append(f"{scores['length'][0]:.0f} tokens")
    return ", ".join(parts)


def _text(prompt: str | list[dict[str, str]]) -> str:
    if isinstance(prompt, str):
        return prompt
    return "\n".join(f"{message['role']}: {message['content']}" for message in prompt)
