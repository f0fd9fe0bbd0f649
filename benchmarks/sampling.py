"""Claim: each step of teacher-mixed sampling costs one model, the student or the teacher, not both.

    python benchmarks/sampling.py [--teachers gpt2-large gpt2-xl] [--batch_sizes 1 8] [--new_tokens 64] [--repeats 2]

samples with alpha = 0.2 from GPT-2 shapes with random weights: with our sampler (a coin decides which model runs),
with a sampler that mixes both distributions at every step, and from each model alone. The coins are fixed to their
mean: every fifth token is the teacher's. No completion ends early. The four measurements alternate, so that a busy
machine slows all of them; results are ratios within a round. The lowest possible cost of our sampler is the student
alone, the teacher's pass over the prompts, and the share alpha of its steps. Writes `results/sampling.json`.
"""

import argparse
from typing import Any

import numpy as np
import torch
from measurement import DEVICE, DTYPE, SHAPES, alternate, build, parameter_ratio, percentiles, write_record
from transformers import DynamicCache, PreTrainedModel

from minillm_trl.models.lm_head import position_ids
from minillm_trl.rollouts.sampling import draw_tokens, sample_completions

ALPHA, PROMPT = 0.2, 64


def mean_coins(tokens: int) -> np.ndarray:
    """Return coins with the share `ALPHA` of teacher steps, evenly spaced."""
    every = round(1 / ALPHA)
    return np.arange(tokens)[None] % every == every - 1


@torch.no_grad()
def mix_every_step(
    student: PreTrainedModel, teacher: PreTrainedModel, ids: torch.Tensor, uniforms: torch.Tensor
) -> torch.Tensor:
    """Sample from mixed probabilities: run both models, with their caches, at every token."""
    caches = [DynamicCache(config=model.config) for model in (student, teacher)]
    fed = 0
    for step in range(uniforms.shape[1]):
        mask = torch.ones_like(ids)
        probabilities = [
            torch.softmax(
                model(
                    input_ids=ids[:, fed:],
                    attention_mask=mask,
                    position_ids=position_ids(mask)[:, fed:],
                    past_key_values=cache,
                    logits_to_keep=1,
                ).logits[:, -1],
                dim=-1,
            )
            for model, cache in zip((student, teacher), caches, strict=True)
        ]
        mixed = (1 - ALPHA) * probabilities[0] + ALPHA * probabilities[1]
        fed = ids.shape[1]
        ids = torch.cat([ids, draw_tokens(mixed.log(), uniforms[:, step], 1.0)[:, None]], dim=1)
    return ids


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, batch_size: int, new_tokens: int, repeats: int
) -> dict[str, Any]:
    ids = torch.randint(50257, (batch_size, PROMPT), device=DEVICE)
    uniforms = torch.rand(batch_size, new_tokens, dtype=torch.float64, device=DEVICE)

    def sample(model: PreTrainedModel, tokens: int = new_tokens, **mixture) -> None:
        common = {"eos_token_ids": [], "pad_token_id": 0, "uniforms": uniforms}
        sample_completions(model, ids, torch.ones_like(ids), max_new_tokens=tokens, **common, **mixture)

    rounds = alternate(
        {
            "ours": lambda: sample(student, teacher=teacher, teacher_coins=mean_coins(new_tokens)),
            "mix_every_step": lambda: mix_every_step(student, teacher, ids, uniforms),
            "student_alone": lambda: sample(student),
            "teacher_alone": lambda: sample(teacher),
            "teacher_prompt": lambda: sample(teacher, tokens=1),
        },
        repeats,
    )
    at_best = [
        seconds["student_alone"]
        + seconds["teacher_prompt"]
        + ALPHA * (seconds["teacher_alone"] - seconds["teacher_prompt"]) * new_tokens / (new_tokens - 1)
        for seconds in rounds
    ]
    return {
        "batch_size": batch_size,
        "speedup_over_mixing_every_step": percentiles(
            [seconds["mix_every_step"] / seconds["ours"] for seconds in rounds]
        ),
        "time_over_student_plus_alpha_teacher": percentiles(
            [seconds["ours"] / best for seconds, best in zip(rounds, at_best, strict=True)]
        ),
        "teacher_over_student": percentiles(
            [seconds["teacher_alone"] / seconds["student_alone"] for seconds in rounds]
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teachers", choices=SHAPES, nargs="+", default=["gpt2-large", "gpt2-xl"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    student = build(arguments.student)
    results = []
    for name in arguments.teachers:
        teacher = build(name)
        ratio = parameter_ratio(teacher, student)
        for batch_size in arguments.batch_sizes:
            result = measure(student, teacher, batch_size, arguments.new_tokens, arguments.repeats)
            results.append({"student": arguments.student, "teacher": name, "parameter_ratio": ratio, **result})
            low, middle, high = result["speedup_over_mixing_every_step"]
            print(
                f"{name} ({ratio:.1f}x), batch {batch_size}: {middle:.2f}x [{low:.2f}, {high:.2f}] faster than mixing "
                f"at every step; {result['time_over_student_plus_alpha_teacher'][1]:.2f}x of the least",
                flush=True,
            )
        del teacher
    settings = {"alpha": ALPHA, "prompt_tokens": PROMPT, "new_tokens": arguments.new_tokens, "dtype": str(DTYPE)}
    write_record("sampling", ("torch", "transformers"), settings, results)


if __name__ == "__main__":
    main()
