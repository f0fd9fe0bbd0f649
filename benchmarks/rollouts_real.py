"""Claim: rollouts of real models take half the time that they took before slots and packed weights.

    python benchmarks/rollouts_real.py --before PATH --student PATH --teacher PATH --prompts PATH [--repeats 2]

samples 64 completions of natural lengths up to 256 tokens, at a temperature of 0.7, for the first prompts of a JSONL
of conversations (`prepare-data --task dolly`), without mixing and with alpha = 0.2. `--before` is a checkout of the
commit before slots. Each checkout runs in its own process with one thread. The ways of sampling alternate, the order
changes from round to round, and times are CPU-seconds of the process, which other jobs on the machine change little.
Hidden states are kept, as in a rollout. Results are ratios of tokens per CPU-second within a round.

The student is that of [iteration_real.py](iteration_real.py), which says how to make it.

Rounding differs between the two loops, and a token whose random number lies within rounding of the border between two
tokens becomes the other one. So the script counts the completions that are equal token for token. `--exact` runs a few
rows in float64 instead, where all of them must be equal, and fails otherwise. Writes `results/rollouts_real.json`.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measurement import given_command, percentiles, write_record
from transformers import AutoModelForCausalLM, AutoTokenizer

ALPHA, TEMPERATURE = 0.2, 0.7
HERE = Path(__file__).resolve().parent.parent
SHARED, OWN = {"alpha": ALPHA, "shared_coins": True}, {"alpha": ALPHA, "shared_coins": False}
# (checkout, options of `sample_prompts`) by name; each case compares one of now with one of before
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "before, alpha 0": ("before", {}),
    "alpha 0": ("now", {}),
    "before, shared coins": ("before", SHARED),
    "shared coins": ("now", SHARED),
    "before, own coins": ("before", OWN),
    "own coins": ("now", OWN),
    "speculative": ("now", {"alpha": ALPHA, "mixing": "speculative"}),
}
CASES = {
    "alpha 0": "before, alpha 0",
    "shared coins": "before, shared coins",
    "own coins": "before, own coins",
    "speculative": "before, own coins",
}


class Worker:
    """A process that samples with the package of one checkout."""

    def __init__(self, checkout: Path, arguments: argparse.Namespace, dtype: str):
        command = [sys.executable, __file__, "--serve", dtype]
        for name in ("student", "teacher", "prompts"):
            command += [f"--{name}", str(getattr(arguments, name))]
        command += ["--rows", str(arguments.rows)]
        threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment = {**os.environ, **threads, "PYTHONPATH": str(checkout)}
        self.process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def sample(self, options: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(options) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"The process of {self.process.args} ended. Its error is above.")
        return json.loads(line)


def serve(arguments: argparse.Namespace) -> None:
    """Sample with the options of each line of the standard input, and write completions and CPU-seconds."""
    from minillm_trl.rollouts.sampling import sample_prompts  # of the checkout in PYTHONPATH

    torch.set_num_threads(1)
    dtype = getattr(torch, arguments.serve)
    student, teacher = (
        AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
        for path in (arguments.student, arguments.teacher)
    )
    tokenizer = AutoTokenizer.from_pretrained(arguments.teacher)
    with open(arguments.prompts) as lines:
        conversations = [json.loads(line)["prompt"] for _, line in zip(range(arguments.rows), lines, strict=False)]
    prompts = [
        tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) for turns in conversations
    ]
    for line in sys.stdin:
        options = json.loads(line)
        start = time.process_time()
        completions = sample_prompts(
            student,
            prompts,
            keys=[(0, row) for row in range(len(prompts))],
            coin_key=(1,),
            eos_token_ids=[tokenizer.eos_token_id],
            pad_token_id=tokenizer.pad_token_id,
            temperature=TEMPERATURE,
            teacher=teacher,
            keep_states=True,
            **options,
        )
        seconds = time.process_time() - start
        print(json.dumps({"seconds": seconds, "completions": completions}), flush=True)


def compare(rounds: list[dict[str, dict[str, Any]]]) -> dict[str, Any]:
    """Return the result of each case from the answers of the workers in each round."""
    results = {}
    for name, slow in CASES.items():
        speeds = [
            {way: sum(map(len, answers[way]["completions"])) / answers[way]["seconds"] for way in (name, slow)}
            for answers in rounds
        ]
        lengths = sorted(map(len, rounds[0][name]["completions"]))
        results[name] = {
            "speedup": percentiles([speed[name] / speed[slow] for speed in speeds]),
            "tokens_per_cpu_second": percentiles([speed[name] for speed in speeds]),
            "tokens_per_cpu_second_before": percentiles([speed[slow] for speed in speeds]),
            "lengths": {
                "mean": sum(lengths) / len(lengths),
                "median": lengths[len(lengths) // 2],
                "largest": lengths[-1],
            },
        }
        if name != "speculative":  # which has random numbers of its own
            pairs = zip(*(rounds[0][way]["completions"] for way in (name, slow)), strict=True)
            results[name]["equal_completions"] = sum(first == second for first, second in pairs)
    return results


def check_exact(arguments: argparse.Namespace) -> None:
    """Compare the completions of both checkouts in float64, and fail unless they are equal."""
    workers = {
        name: Worker(path, arguments, "float64") for name, path in (("before", arguments.before), ("now", HERE))
    }
    for name, slow in CASES.items():
        if name == "speculative":
            continue
        found = [
            workers[way].sample({**WAYS[way_name][1], "max_new_tokens": arguments.max_new_tokens})["completions"]
            for way, way_name in (("now", name), ("before", slow))
        ]
        print(f"{name}: {'equal' if found[0] == found[1] else 'DIFFERENT'} in float64", flush=True)
        if found[0] != found[1]:
            raise SystemExit(1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--before", type=Path, help="checkout of the commit to compare with")
    parser.add_argument("--student", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of conversations")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--exact", action="store_true")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        serve(arguments)
        return
    if arguments.exact:
        check_exact(arguments)
        return
    torch.set_num_threads(1)  # as the workers, for the record
    workers = {
        name: Worker(path, arguments, "float32") for name, path in (("before", arguments.before), ("now", HERE))
    }
    for name, worker in workers.items():
        for options in (SHARED, WAYS["speculative"][1])[: 1 + (name == "now")]:
            worker.sample({**options, "max_new_tokens": 8})
    rounds: list[dict[str, dict[str, Any]]] = []
    for number in range(arguments.repeats):
        answers = {}
        for name in list(WAYS) if number % 2 == 0 else reversed(WAYS):
            checkout, options = WAYS[name]
            answers[name] = workers[checkout].sample({**options, "max_new_tokens": arguments.max_new_tokens})
            tokens = sum(map(len, answers[name]["completions"]))
            print(f"{name}: {tokens / answers[name]['seconds']:.0f} tokens per CPU-second", flush=True)
        rounds.append(answers)
        settings = {
            "student": "SmolLM2-135M-Instruct, layers 0 to 6 and 27 to 29 of 30, healed at a rate of 2e-3",
            "teacher": "SmolLM2-135M-Instruct",
            "before": subprocess.run(
                ["git", "-C", str(arguments.before), "rev-parse", "HEAD"], capture_output=True, text=True, check=True
            ).stdout.strip(),
            "alpha": ALPHA,
            "temperature": TEMPERATURE,
            "rows": arguments.rows,
            "max_new_tokens": arguments.max_new_tokens,
            "rounds": len(rounds),
            "dtype": "float32",
            "seeds": {"tokens": 0, "coins": 1},
        }
        command = given_command(("before", "student", "teacher", "prompts"))
        path = write_record("rollouts_real", ("torch", "transformers"), settings, compare(rounds), command)
    for name, result in json.loads(path.read_text())["results"].items():
        print(f"{name}: {result['speedup'][1]:.2f}x as fast as before")


if __name__ == "__main__":
    main()
