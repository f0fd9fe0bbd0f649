"""Claim: a LoRA student samples faster with its adapters merged into the weights for a rollout.

    python benchmarks/merged_rollouts.py --student PATH [--rows 16] [--new_tokens 48] [--repeats 2]

gives a real student (SmolLM2-135M-Instruct, for example) adapters of rank 16 on all linear layers of its blocks, and
samples `--rows` completions of `--new_tokens` tokens from it without mixing. Merging at the start of the rollout and
freeing the memory afterwards are part of its time. The two ways alternate after a warm-up; times are CPU-seconds of
the process with one thread, on a GPU seconds. Hidden states are kept, as in a rollout. The script counts the
completions that are equal token for token: rounding differs. Writes `results/merged_rollouts.json`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from measurement import DEVICE, DTYPE, alternate, cpu_clock, percentiles, write_record
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from minillm_trl.models.merged_adapters import adapted_layers
from minillm_trl.models.student_copy import RolloutCopy
from minillm_trl.rollouts.sampling import sample_prompts

RANK, PROMPT_TOKENS = 16, 32


def adapted_student(path: Path) -> torch.nn.Module:
    """Return the base model inside a LoRA student whose adapters change it a little."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(path, dtype=DTYPE).to(DEVICE)
    model = get_peft_model(base, LoraConfig(r=RANK, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.002)
    return model.eval().get_base_model()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--new_tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    clock = cpu_clock()
    student = adapted_student(arguments.student)
    copied = RolloutCopy(student, merged=adapted_layers(student))
    copied.release()
    torch.manual_seed(1)
    prompts = torch.randint(1000, student.config.vocab_size, (arguments.rows, PROMPT_TOKENS)).tolist()
    found: dict[str, list[list[int]]] = {}

    def sample(name: str, model: torch.nn.Module) -> None:
        found[name] = sample_prompts(
            model,
            prompts,
            keys=[(0, row) for row in range(arguments.rows)],
            max_new_tokens=arguments.new_tokens,
            eos_token_ids=[],
            pad_token_id=0,
            keep_states=True,
        )

    def merged() -> None:
        copied.refresh(student)
        sample("merged", copied.model)
        copied.release()

    ways: dict[str, Callable[[], None]] = {"merged": merged, "adapters": lambda: sample("adapters", student)}
    rounds = alternate(ways, arguments.repeats, clock)
    speedup = percentiles([times["adapters"] / times["merged"] for times in rounds])
    print(f"merged: {speedup[1]:.2f}x as fast as adapters [{speedup[0]:.2f}, {speedup[2]:.2f}]")
    results = {
        "speedup": speedup,
        "seconds": {name: percentiles([times[name] for times in rounds]) for name in ways},
        "equal_completions": sum(a == b for a, b in zip(found["merged"], found["adapters"], strict=True)),
    }
    settings = {
        "student": "SmolLM2-135M-Instruct",
        "rank": RANK,
        "target_modules": "all-linear",
        "rows": arguments.rows,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": arguments.new_tokens,
        "rounds": arguments.repeats,
        "dtype": str(DTYPE).removeprefix("torch."),
    }
    command = "python benchmarks/merged_rollouts.py --student PATH"
    write_record("merged_rollouts", ("torch", "transformers", "peft"), settings, results, command)


if __name__ == "__main__":
    main()
