"""Claim: rows that take the slots of finished ones need fewer steps than batches that wait for their longest row.

    python benchmarks/slots.py --student tiny --teacher tiny --repeats 5
    python benchmarks/slots.py [--student gpt2] [--teacher gpt2-large] [--slots 8 32] [--repeats 3]

samples 64 completions of up to 256 tokens from GPT-2 shapes with random weights. A random part of the vocabulary ends
a row, so lengths have a long tail. The same loop decodes with slots that refill, and in batches that follow one
another (as it does for processes that sample together); both alternate, and results are ratios within a round.
Without teacher, and with alpha = 0.2 and coins of each row. The student's forward passes after the prompts are counted
too: they do not depend on the machine. The ratio of times lies between 1, where a step takes as long as it has rows
(a CPU with large models), and the ratio of passes, where it takes as long for any number of rows (tiny models, or a
GPU that reads the weights). Writes `results/slots.json`, for tiny students `results/slots_small.json`.
"""

import argparse
from typing import Any

import torch
from measurement import DTYPE, SHAPES, alternate, build, cpu_clock, parameter_ratio, percentiles, write_record
from transformers import PreTrainedModel

from minillm_trl.rollouts.sampling import sample_prompts

ALPHA, PROMPT, ROWS, LENGTH, END_SHARE = 0.2, 16, 64, 256, 0.012


def measure(
    student: PreTrainedModel, teacher: PreTrainedModel, slots: int, alpha: float, repeats: int
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    vocab_size = student.config.vocab_size
    prompts = torch.randint(vocab_size, (ROWS, PROMPT), generator=generator).tolist()
    ends = torch.nonzero(torch.rand(vocab_size, generator=generator) < END_SHARE).flatten().tolist()
    calls: list[int] = []
    lengths: list[int] = []

    def sample(**options: Any) -> None:
        calls.clear()
        completions = sample_prompts(
            student,
            prompts,
            keys=[(0, row) for row in range(ROWS)],
            coin_key=(1,),
            max_new_tokens=LENGTH,
            eos_token_ids=ends,
            pad_token_id=0,
            batch_size=slots,
            teacher=teacher,
            alpha=alpha,
            shared_coins=False,
            keep_states=True,
            **options,
        )
        lengths[:] = sorted(map(len, completions))

    ways = {"refilled": {}, "batches": {"on_every_process": bool}}
    hook = student.base_model.register_forward_pre_hook(
        lambda module, args, inputs: calls.append(1) if inputs["input_ids"].shape[1] < PROMPT - 1 else None,
        with_kwargs=True,
    )
    passes = {}
    for name, options in ways.items():
        sample(**options)
        passes[name] = len(calls)
    hook.remove()
    functions = {name: lambda options=options: sample(**options) for name, options in ways.items()}
    rounds = alternate(functions, repeats, cpu_clock())
    return {
        "slots": slots,
        "alpha": alpha,
        "speedup": percentiles([times["batches"] / times["refilled"] for times in rounds]),
        "passes": passes,
        "lengths": {"mean": sum(lengths) / ROWS, "median": lengths[ROWS // 2], "largest": lengths[-1]},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2")
    parser.add_argument("--teacher", choices=SHAPES, default="gpt2-large")
    parser.add_argument("--slots", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    student, teacher = build(arguments.student), build(arguments.teacher)
    settings = {
        "student": arguments.student,
        "teacher": arguments.teacher,
        "parameter_ratio": parameter_ratio(teacher, student),
        "rows": ROWS,
        "prompt_tokens": PROMPT,
        "max_new_tokens": LENGTH,
        "end_share": END_SHARE,
        "dtype": str(DTYPE),
        "seeds": {"weights": 0, "prompts": 0, "tokens": 0, "coins": 1},
    }
    results = []
    for alpha in (0.0, ALPHA):
        for slots in arguments.slots:
            results.append(measure(student, teacher, slots, alpha, arguments.repeats))
            passes = results[-1]["passes"]
            print(
                f"alpha {alpha}, {slots} slots: {results[-1]['speedup'][1]:.2f}x as fast, "
                f"{passes['batches'] / passes['refilled']:.2f}x fewer passes",
                flush=True,
            )
            name = "slots_small" if arguments.student == "tiny" else "slots"
            write_record(name, ("torch", "transformers"), settings, results)  # each as it comes


if __name__ == "__main__":
    main()
