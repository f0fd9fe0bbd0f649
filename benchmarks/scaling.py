"""Claim: time per token does not rise with the batch, and memory rises in proportion to batch and length.

    python benchmarks/scaling.py

generates and scores rollouts and computes one gradient, for GPT-2 shapes with random weights (124M from 355M), batches
of 8 to 64 rows and completions of 32 to 256 tokens. Each case reports seconds per token of the rollout (after a
warm-up) and of the update (median of three), and peak memory without the models' weights and gradients: allocated on a
GPU, resident on a CPU, where each case runs in a separate process. Memory is compared with the straight line through
the smallest and the largest case. Writes `results/scaling.json`.
"""

import argparse
import json
from statistics import median
from typing import Any

import torch
from measurement import DEVICE, DTYPE, build, bytes_before, in_own_process, peak_bytes, seconds, write_record

from minillm_trl.models.fused_head import ScoreRequest, add_scoring
from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.keyed_random import toss_coins
from minillm_trl.rollouts.sampling import Completions, sample_completions
from minillm_trl.rollouts.scores import HeadStates, RolloutScorer

PROMPT, VOCAB = 32, 50257
BATCHES, LENGTHS = (8, 16, 32, 64), (32, 64, 128, 256)
DEFAULT_BATCH, DEFAULT_LENGTH = 8, 32


def rollout(student, teacher, prompts: torch.Tensor, length: int) -> Completions:
    sampled = sample_completions(
        student,
        prompts,
        torch.ones_like(prompts),
        max_new_tokens=length,
        eos_token_ids=[],
        pad_token_id=0,
        uniforms=torch.rand(len(prompts), length, dtype=torch.float64, device=DEVICE),
        teacher=teacher,
        teacher_coins=toss_coins(length, 0.2, 0)[None],
        keep_states=True,
    )
    states = zip(sampled[2:], (student, teacher), strict=True)
    both = (HeadStates(hidden_states, LMHead.of(model)) for hidden_states, model in states)
    RolloutScorer(1.0, 1.0, VOCAB).score(sampled.ids, sampled.mask, *both)
    return sampled


def update(student, prompts: torch.Tensor, sampled: Completions) -> None:
    ids = torch.cat([prompts, sampled.ids], dim=1)
    request = ScoreRequest(
        ids,
        torch.ones_like(ids),
        sampled.mask,
        teacher_hidden_states=sampled.teacher_hidden_states,
        loss=lambda scores, _: 0.3 * scores.logps + scores.divergence,
    )
    (scores,) = student(score_requests=[request])
    scores.loss.backward()


def measure(batch_size: int, length: int) -> dict[str, Any]:
    student, teacher = build("gpt2"), build("gpt2-medium")
    add_scoring(student, VOCAB, LMHead.of(teacher))
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    warm_up = torch.randint(VOCAB, (1, PROMPT), device=DEVICE)
    update(student, warm_up, rollout(student, teacher, warm_up, 2))
    before = bytes_before()
    prompts = torch.randint(VOCAB, (batch_size, PROMPT), device=DEVICE)
    sampled = rollout(student, teacher, prompts, length)
    tokens = batch_size * (PROMPT + length)
    times = {
        "rollout": seconds(lambda: rollout(student, teacher, prompts, length)) / tokens,
        "update": median(seconds(lambda: update(student, prompts, sampled)) for _ in range(3)) / tokens,
    }
    return {"bytes": peak_bytes() - before, "seconds_per_token": times}


def deviation(sizes: tuple[int, ...], found: list[float]) -> float:
    """Return the largest distance from the line through first and last point, relative to the last."""
    slope = (found[-1] - found[0]) / (sizes[-1] - sizes[0])
    line = [found[0] + slope * (size - sizes[0]) for size in sizes]
    return max(abs(a - b) for a, b in zip(found, line, strict=True)) / found[-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measure", nargs=2, type=int, metavar=("BATCH", "LENGTH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure)))
        return
    cases: dict[str, list[dict]] = {}
    for name, sizes in (("batch", BATCHES), ("length", LENGTHS)):
        for size in sizes:
            case = (size, DEFAULT_LENGTH) if name == "batch" else (DEFAULT_BATCH, size)
            output = in_own_process(measure, *case)
            cases.setdefault(name, []).append({"batch_size": case[0], "length": case[1], **output})
            print(f"{name} {size}: {output}", flush=True)
    per_token = {
        phase: [
            case["seconds_per_token"][phase] / cases["batch"][0]["seconds_per_token"][phase] for case in cases["batch"]
        ]
        for phase in ("rollout", "update")
    }
    results = {
        "cases": cases,
        "time_per_token_relative_to_the_smallest_batch": per_token,
        "memory_deviation_from_linear": {
            name: deviation(sizes, [case["bytes"] for case in cases[name]])
            for name, sizes in (("batch", BATCHES), ("length", LENGTHS))
        },
    }
    write_record("scaling", ("torch", "transformers"), {"prompt_tokens": PROMPT, "dtype": str(DTYPE)}, results)
    print({name: value for name, value in results.items() if name != "cases"})


if __name__ == "__main__":
    main()
