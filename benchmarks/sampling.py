"""Claim: teacher-mixed sampling costs the student's steps and the teacher's share of its own, not both models.

    python benchmarks/sampling.py [--teachers gpt2-large gpt2-xl] [--batch_sizes 1 8]

samples with alpha = 0.2 from GPT-2 shapes with random weights: ours (the coin decides which model runs), the sampler
that mixes both distributions at every step, and each model alone. The coin sequence is fixed to its mean: every fifth
token is the teacher's. No completion ends early. The four are timed in turn, so that a busy machine slows all of them;
the figures are ratios within a run. Writes `results/sampling.json`.
"""

import argparse
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedModel

from minillm_trl.fused_head import position_ids
from minillm_trl.sampling import draw_tokens, sample_completions

RESULTS = Path(__file__).with_name("results") / "sampling.json"
SHAPES = {
    "gpt2": {"n_embd": 768, "n_layer": 12, "n_head": 12},
    "gpt2-medium": {"n_embd": 1024, "n_layer": 24, "n_head": 16},
    "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20},
    "gpt2-xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25},
}
ALPHA, PROMPT, TOKENS = 0.2, 64, 40


def build(name: str, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    torch.manual_seed(0)
    with torch.device(device):
        return GPT2LMHeadModel(GPT2Config(**SHAPES[name])).to(dtype).eval()


@torch.no_grad()
def mix_every_step(student, teacher, ids: torch.Tensor, uniforms: torch.Tensor) -> None:
    """Both models at every token, each with its cache; the draw is from the mixed probabilities."""
    caches = [DynamicCache(config=model.config) for model in (student, teacher)]
    fed = 0
    for step in range(TOKENS):
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


def seconds(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure(student, teacher, batch_size: int, repeats: int, device: torch.device) -> dict:
    ids = torch.randint(50257, (batch_size, PROMPT), device=device)
    uniforms = torch.rand(batch_size, TOKENS, dtype=torch.float64, device=device)
    coins = np.arange(TOKENS)[None] % round(1 / ALPHA) == round(1 / ALPHA) - 1
    common = {"max_new_tokens": TOKENS, "eos_token_ids": [], "pad_token_id": 0, "uniforms": uniforms}
    prompt = (ids, torch.ones_like(ids))

    def ours() -> None:
        sample_completions(student, *prompt, **common, teacher=teacher, teacher_coins=coins)

    samplers = {
        "ours": ours,
        "mix_every_step": lambda: mix_every_step(student, teacher, ids, uniforms),
        "student_alone": lambda: sample_completions(student, *prompt, **common),
        "teacher_alone": lambda: sample_completions(teacher, *prompt, **common),
    }
    times: dict[str, list[float]] = {name: [] for name in samplers}
    for repeat in range(repeats + 1):  # the first round warms up
        for name, function in samplers.items():
            elapsed = seconds(function, device)
            if repeat:
                times[name].append(elapsed)
    rounds = [dict(zip(times, each, strict=True)) for each in zip(*times.values(), strict=True)]
    speedup = [each["mix_every_step"] / each["ours"] for each in rounds]
    overhead = [each["ours"] / (each["student_alone"] + ALPHA * each["teacher_alone"]) for each in rounds]
    return {
        "batch_size": batch_size,
        "speedup_over_mixing_every_step": np.percentile(speedup, [20, 50, 80]).tolist(),
        "time_over_student_plus_alpha_teacher": np.percentile(overhead, [20, 50, 80]).tolist(),
        "teacher_over_student": float(np.median([each["teacher_alone"] / each["student_alone"] for each in rounds])),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teachers", choices=SHAPES, nargs="+", default=["gpt2-large", "gpt2-xl"])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    student = build(arguments.student, device, dtype)
    results = []
    for name in arguments.teachers:
        teacher = build(name, device, dtype)
        ratio = teacher.num_parameters() / student.num_parameters()
        for batch_size in arguments.batch_sizes:
            result = measure(student, teacher, batch_size, arguments.repeats, device)
            results.append({"student": arguments.student, "teacher": name, "parameter_ratio": ratio, **result})
            low, middle, high = result["speedup_over_mixing_every_step"]
            over = result["time_over_student_plus_alpha_teacher"][1]
            print(
                f"{name} ({ratio:.1f}x), batch {batch_size}: {middle:.2f}x [{low:.2f}, {high:.2f}] faster than mixing "
                f"at every step; {over:.2f}x of student + alpha * teacher",
                flush=True,
            )
        del teacher
    revision = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    record = {
        "command": "python benchmarks/sampling.py",
        "commit": subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": {
            "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
            "threads": torch.get_num_threads(),
            "cores": os.cpu_count(),
        },
        "versions": {name: version(name) for name in ("torch", "transformers")},
        "settings": {"alpha": ALPHA, "prompt_tokens": PROMPT, "new_tokens": TOKENS, "dtype": str(dtype)},
        "percentiles": [20, 50, 80],
        "results": results,
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
