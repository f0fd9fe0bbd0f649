"""What `overlap_rollouts` gains in time, and what the stale rollouts cost in reverse KL.

    python benchmarks/overlap.py [--rounds 3] [--seeds 3]

Models have Llama's shape and random weights, the teacher's logits are scaled so that its distributions are peaked.

*Time*: three runs alternate. "overlapped" and "in turn" have one thread for each computation, "in turn, two threads"
has two, as a run without overlap would have on two cores. An iteration is a rollout and two passes over it; the first
and the last, in which only one of the two threads works, do not count. `bound` is
the speed-up over "in turn" if both threads had a core each and never waited for each other: the CPU-seconds of an
iteration in turn, over those of the thread that has more of them with overlap. It does not depend on other work of the
machine. `speedup` and `speedup_over_two_threads` compare seconds by the wall's clock. They mean something only if
`cores`, what the process got while it trained with overlap, was near 2.

*Reverse KL*: as many updates with and without overlap, with one and with four passes over a buffer, over a few seeds
of data order and rollouts, evaluated on held-out prompts with the same random numbers.

Writes `results/overlap.json`.
"""

import argparse
import tempfile
import time
from dataclasses import asdict
from typing import Any

import torch
from datasets import Dataset
from measurement import percentiles, write_record
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.demo.models import build_model, train_tokenizer
from minillm_trl.demo.settings import Shape

# Student and teacher: for times, large enough that products take longer than Python
TIMED = Shape(256, 4, 8), Shape(384, 6, 8)
TRAINED = Shape(64, 1, 4), Shape(96, 2, 4)
PEAKED = 4.0  # scales the teacher's logits
ROWS, TOKENS = 16, 48  # of an optimizer step, of a completion
STEPS_OF_A_PASS, TIMED_PASSES, ITERATIONS = 4, 2, 2
PASSES, UPDATES, LEARNING_RATE = (1, 4), 96, 2e-3
WORDS = "the punter serves italian food near the river and the mill is a cheap family friendly pub in the city centre"


def prompts(first: int, number: int) -> Dataset:
    words = WORDS.split()
    return Dataset.from_dict(
        {"prompt": [f"{' '.join(words[i % 7 : i % 7 + 3 + i % 4])} {i}\n" for i in range(first, first + number)]}
    )


def peaked_teacher(shape: Shape, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    teacher = build_model(shape, tokenizer, seed=1)
    with torch.no_grad():
        teacher.model.norm.weight.mul_(PEAKED)
    return teacher


class BufferTimes(TrainerCallback):
    """The seconds of the wall, the process and the main thread at the end of each buffer."""

    def __init__(self, steps: int):
        self.steps, self.wall, self.process, self.main = steps, [], [], []

    def on_step_end(self, args, state, control, **unused):
        if state.global_step % self.steps == 0:
            self.wall.append(time.perf_counter())
            self.process.append(time.process_time())
            self.main.append(time.thread_time())


def make_trainer(
    folder: str, shapes: tuple[Shape, Shape], tokenizer: PreTrainedTokenizerFast, **options: Any
) -> MiniLLMTrainer:
    args = MiniLLMConfig(
        folder,
        use_cpu=True,
        bf16=False,
        report_to="none",
        disable_tqdm=True,
        gradient_checkpointing=False,
        per_device_train_batch_size=ROWS,
        per_device_eval_batch_size=64,
        steps_per_generation=STEPS_OF_A_PASS,
        max_completion_length=TOKENS,
        lr_scheduler_type="constant",
        logging_steps=STEPS_OF_A_PASS,
        save_strategy="no",
        learning_rate=LEARNING_RATE,
        **options,
    )
    return MiniLLMTrainer(
        build_model(shapes[0], tokenizer, seed=0),
        peaked_teacher(shapes[1], tokenizer),
        args=args,
        train_dataset=prompts(0, 512),
        eval_dataset=prompts(512, 64),
        processing_class=tokenizer,
    )


def time_iterations(tokenizer: PreTrainedTokenizerFast, overlap: bool, threads: int) -> dict[str, float]:
    """Return seconds of an iteration by three clocks, those of waiting, and the cores that the process got."""
    torch.set_num_threads(threads)
    steps = STEPS_OF_A_PASS * TIMED_PASSES
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_iterations": TIMED_PASSES, "max_steps": steps * (ITERATIONS + 2)}
        trainer = make_trainer(folder, TIMED, tokenizer, overlap_rollouts=overlap, **options)
        times = BufferTimes(steps)
        trainer.add_callback(times)
        trainer.train()
    waits = [log["rollout/wait_seconds"] for log in trainer.state.log_history if "rollout/wait_seconds" in log]
    elapsed, process, main = (clock[ITERATIONS] - clock[0] for clock in (times.wall, times.process, times.main))
    return {
        "iteration": elapsed / ITERATIONS,
        "process": process / ITERATIONS,
        "main_thread": main / ITERATIONS,
        "cores": process / elapsed,
        "wait": sum(waits[1:-1]) / ITERATIONS,
    }


def reverse_kl(tokenizer: PreTrainedTokenizerFast, overlap: bool, passes: int, seed: int) -> dict[str, float]:
    """Return the reverse KL on held-out prompts before and after training, and what the ratio did."""
    with tempfile.TemporaryDirectory() as folder:
        options = {"num_iterations": passes, "max_steps": UPDATES, "seed": seed}
        trainer = make_trainer(folder, TRAINED, tokenizer, overlap_rollouts=overlap, **options)
        before = trainer.evaluate()["eval_objective/reverse_kl"]
        trainer.train()
        after = trainer.evaluate()["eval_objective/reverse_kl"]
    logs = [log for log in trainer.state.log_history if "clip_ratio/drift" in log]
    means = {
        name: sum(log[name] for log in logs) / len(logs)
        for name in ("clip_ratio/drift", "importance_weight/effective_sample_size")
    }
    return {"before": before, "after": after, **means}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seeds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = train_tokenizer([WORDS] * 4, 300)
    ways = {"in turn": (False, 1), "in turn, two threads": (False, 2), "overlapped": (True, 1)}
    rounds = [{name: time_iterations(tokenizer, *way) for name, way in ways.items()} for _ in range(arguments.rounds)]
    torch.set_num_threads(1)
    pairs = [(times["in turn"], times["overlapped"]) for times in rounds]
    speedup = percentiles([turns["iteration"] / both["iteration"] for turns, both in pairs])
    bound = percentiles(
        [turns["process"] / max(both["main_thread"], both["process"] - both["main_thread"]) for turns, both in pairs]
    )
    over_two = percentiles(
        [times["in turn, two threads"]["iteration"] / times["overlapped"]["iteration"] for times in rounds]
    )
    print(f"overlapped: {speedup[1]:.2f}x as fast, at most {bound[1]:.2f}x on two idle cores", flush=True)
    print(f"over two threads in turn: {over_two[1]:.2f}x", flush=True)
    quality = []
    for passes in PASSES:
        for seed in range(arguments.seeds):
            row = {
                name: reverse_kl(tokenizer, overlap, passes, seed)
                for name, overlap in (("in turn", False), ("overlapped", True))
            }
            quality.append({"passes": passes, "seed": seed, **row})
            print(f"passes {passes}, seed {seed}: {row}", flush=True)
    results = {
        "bound": bound,
        "speedup": speedup,
        "speedup_over_two_threads": over_two,
        "cores": percentiles([times["overlapped"]["cores"] for times in rounds]),
        "seconds": {
            name: {kind: percentiles([times[name][kind] for times in rounds]) for kind in rounds[0][name]}
            for name in rounds[0]
        },
        "reverse_kl": quality,
    }
    settings = {
        "timed": {"student": asdict(TIMED[0]), "teacher": asdict(TIMED[1]), "passes": TIMED_PASSES},
        "trained": {"student": asdict(TRAINED[0]), "teacher": asdict(TRAINED[1]), "updates": UPDATES},
        **{"rows": ROWS, "tokens": TOKENS, "steps_of_a_pass": STEPS_OF_A_PASS, "iterations": ITERATIONS},
        **{"learning_rate": LEARNING_RATE, "rounds": arguments.rounds, "seeds": arguments.seeds},
    }
    write_record("overlap", ("torch", "transformers"), settings, results)


if __name__ == "__main__":
    main()
