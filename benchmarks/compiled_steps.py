"""Claim: steps that are one graph sample small models in half the time, and nearly all steps run compiled.

    python benchmarks/compiled_steps.py [--repeats 8]

samples 16 completions of 64 tokens from small GPT-2 shapes with random weights, without mixing and with alpha = 0.2,
by the loop over slots, and by steps that `torch.compile` turns into one graph each ("inductor"; compilation comes
first and is reported apart). Both alternate; results are ratios of CPU-seconds of one thread within a round (on a GPU:
of seconds). The completions of both are compared.

Then 100 rollouts of 4 rows over prompts of 1 to 600 tokens, with a backend that compiles nothing but counts: how many
model calls after the prompts are steps of a compiled graph, and how many shapes there are.
Writes `results/compiled_steps.json`.
"""

import argparse
import time
from typing import Any

import numpy as np
import torch
from measurement import DEVICE, alternate, cpu_clock, parameter_ratio, percentiles, write_record
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from minillm_trl.rollouts.compiled_steps import WIDTHS, CompiledDecoding, Reader
from minillm_trl.rollouts.sampling import sample_prompts

ALPHA, ROWS, PROMPT, TOKENS, VOCAB = 0.2, 16, 20, 64, 2000
ROLLOUTS, LONGEST_PROMPT = 100, 600
PAIRS = {
    "0.2M from 2M": ({"n_embd": 64, "n_layer": 2, "n_head": 2}, {"n_embd": 192, "n_layer": 4, "n_head": 6}),
    "5M from 39M": ({"n_embd": 256, "n_layer": 6, "n_head": 4}, {"n_embd": 512, "n_layer": 12, "n_head": 8}),
}
TINY = {"n_embd": 16, "n_layer": 1, "n_head": 2}


def build(seed: int, shape: dict[str, int]) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(**shape, vocab_size=VOCAB, bos_token_id=None, eos_token_id=None)
    return GPT2LMHeadModel(config).to(DEVICE).eval()


def sample(
    models: tuple[PreTrainedModel, PreTrainedModel],
    prompts: list[list[int]],
    alpha: float,
    compiled: CompiledDecoding | None,
    seed: int = 0,
) -> list[list[int]]:
    return sample_prompts(
        models[0],
        prompts,
        keys=[(seed, row) for row in range(len(prompts))],
        coin_key=(seed, 1),
        max_new_tokens=TOKENS,
        eos_token_ids=[],
        pad_token_id=0,
        teacher=models[1],
        alpha=alpha,
        compiled=compiled,
        keep_states=True,
    )


def measure(name: str, alpha: float, repeats: int) -> dict[str, Any]:
    """Compare the loop with compiled steps for one pair of models."""
    student, teacher = (build(seed, shape) for seed, shape in enumerate(PAIRS[name]))
    compiled = CompiledDecoding(student, "inductor", teacher)
    prompts = torch.randint(VOCAB, (ROWS, PROMPT), generator=torch.Generator().manual_seed(0)).tolist()
    models, clock = (student, teacher), cpu_clock()
    start = clock()
    found = sample(models, prompts, alpha, compiled)  # compiles
    sample(models, prompts, alpha, compiled)  # records CUDA graphs
    first = clock() - start
    expected = sample(models, prompts, alpha, None)
    rounds = alternate(
        {
            way: lambda own=own: sample(models, prompts, alpha, own)
            for way, own in (("loop", None), ("graph", compiled))
        },
        repeats,
        clock,
    )
    ran, steps = compiled.take_counts()
    return {
        "pair": name,
        "alpha": alpha,
        "parameter_ratio": parameter_ratio(teacher, student),
        "speedup": percentiles([times["loop"] / times["graph"] for times in rounds]),
        "seconds_of_the_first_two_rollouts": first,
        "equal_completions": sum(own == other for own, other in zip(found, expected, strict=True)),
        "compiled_steps": ran / steps,
    }


def count_calls() -> dict[str, float]:
    """Count model calls after the prompts, and those that are compiled steps, over prompts of all lengths."""
    student, teacher = (build(seed, {**TINY, "n_positions": 1024}) for seed in (0, 1))
    compiled = CompiledDecoding(student, "eager", teacher)
    calls = {"all": 0, "long": 0}
    step = Reader.step

    def counted(reader: Reader, plan: Any, end: int) -> None:
        if reader.fed:
            calls["all"] += 1
            calls["long"] += end - reader.fed > WIDTHS[-1]
        step(reader, plan, end)

    Reader.step = counted  # type: ignore[method-assign]
    lengths = np.random.default_rng(0).integers(1, LONGEST_PROMPT, size=(ROLLOUTS, 4))
    for rollout, row_lengths in enumerate(lengths):
        sample((student, teacher), [[5] * int(length) for length in row_lengths], ALPHA, compiled, rollout)
    Reader.step = step  # type: ignore[method-assign]
    ran, steps = compiled.take_counts()
    assert steps == calls["all"] - calls["long"]
    return {
        "rollouts": ROLLOUTS,
        "calls_after_prompts": calls["all"],
        "compiled_share": ran / calls["all"],
        "shapes": len(compiled._shapes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    arguments = parser.parse_args()
    start = time.perf_counter()
    results: dict[str, Any] = {"calls": count_calls(), "speed": []}
    print(results["calls"], f"{time.perf_counter() - start:.0f} s", flush=True)
    settings = {
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "new_tokens": TOKENS,
        "vocab_size": VOCAB,
        "shapes": {name: dict(zip(("student", "teacher"), shapes, strict=True)) for name, shapes in PAIRS.items()},
        "repeats": arguments.repeats,
        "dtype": "float32",
    }
    for name in PAIRS:
        for alpha in (0.0, ALPHA):
            results["speed"].append(measure(name, alpha, arguments.repeats))
            print(results["speed"][-1], flush=True)
            write_record("compiled_steps", ("torch", "transformers"), settings, results)  # each as it comes


if __name__ == "__main__":
    main()
