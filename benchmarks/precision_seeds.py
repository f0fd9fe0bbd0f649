"""Claim: over several seeds, bf16 autocast trains as well as float32; bf16 weights hardly train at a low rate.

    python benchmarks/precision_seeds.py
    python benchmarks/precision_seeds.py --first_updates 24   # shapes and schedule of mixed_precision.py on a GPU

fine-tunes a student fully (GPT-2 shape, random weights as in `mixed_precision.py`) with float32 weights, with float32
weights in bf16 autocast, and with bf16 weights, each with several trainer seeds. All runs start from the same student
and teacher; seeds change only the samples. There are two learning rates, that of `mixed_precision.py` for 40 updates
and the paper's for 8. Reports the reverse KL per completion in nats at start and end, and the share of weights in
linear layers that did not change by a bit. Writes `results/precision_seeds.json`.

With `--first_updates` the student is the 124M shape and the teacher the 355M one, and a run with the schedule of
`mixed_precision.py` stops after this many updates: how much do the same updates differ between seeds, and how much
between precisions? It also lists the student's entropy. Writes `results/precision_seeds_first.json`.
"""

import argparse
import itertools
import tempfile
from functools import cache
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from measurement import ON_GPU, write_record
from mixed_precision import PACKAGES, VOCAB
from mixed_precision import STEPS as GPU_STEPS
from mixed_precision import save_model as save_large_model
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import load_examples, unique_prompts
from minillm_trl.demo.models import train_tokenizer

SHAPES = {
    "student": {"n_embd": 96, "n_layer": 2, "n_head": 3},
    "teacher": {"n_embd": 128, "n_layer": 3, "n_head": 4},
}
WAYS = {"float32": ("float32", False), "bf16 autocast": ("float32", True), "bf16 weights": ("bfloat16", True)}
STEPS = {2e-4: 40, 5e-6: 8}  # updates, by learning rate
SEEDS = (0, 1, 2)
LARGE = {"student": "gpt2", "teacher": "gpt2-medium"}


def save_model(name: str, folder: Path, tokenizer: Any, seed: int) -> str:
    """Save a model with random weights, and logits of the same spread as the 124M shape in `mixed_precision.py`."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = GPT2LMHeadModel(GPT2Config(**SHAPES[name], vocab_size=len(tokenizer), n_positions=256, **ends))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(4.0 * (768 / SHAPES[name]["n_embd"]) ** 0.5)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)
    return str(folder / name)


class FirstWeights(TrainerCallback):
    """Keep a copy of the initial weights of linear layers."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **unused: Any) -> None:
        """Copy the weights."""
        self.weights = {name: parameter.detach().clone() for name, parameter in linear_weights(model).items()}


def linear_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if ".h." in name and parameter.dim() == 2}


@cache
def load_prompts() -> tuple[Any, Any]:
    prompts = unique_prompts(load_examples("e2e", split="train"))
    return prompts, train_tokenizer(prompts["prompt"], VOCAB)


class StopAfter(TrainerCallback):
    """Stop after some updates, so that the schedule is that of a longer run."""

    def __init__(self, updates: int):
        self.updates = updates

    def on_step_end(self, args: Any, state: Any, control: Any, **unused: Any) -> None:
        """Stop if the updates are made."""
        control.should_training_stop = state.global_step >= self.updates


def train(way: str, rate: float, steps: int, seed: int, first_updates: int | None = None) -> dict[str, Any]:
    dtype, bf16 = WAYS[way]
    prompts, tokenizer = load_prompts()
    first = FirstWeights()
    callbacks: list[TrainerCallback] = [first, *([StopAfter(first_updates)] if first_updates else [])]
    with tempfile.TemporaryDirectory() as folder:
        args = MiniLLMConfig(
            folder,
            use_cpu=not ON_GPU,
            bf16=bf16,
            half_precision_rollouts=bf16,
            model_init_kwargs={"dtype": dtype},
            per_device_train_batch_size=8,
            steps_per_generation=2,
            num_iterations=2,
            max_completion_length=24,
            max_steps=steps,
            learning_rate=rate,
            warmup_steps=20 if steps > 20 else 0,
            logging_steps=1,
            seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            gradient_checkpointing=False,
        )
        trainer = MiniLLMTrainer(
            *(
                save_large_model(LARGE[name], Path(folder), tokenizer, seed_of_model)
                if first_updates
                else save_model(name, Path(folder), tokenizer, seed_of_model)
                for seed_of_model, name in enumerate(SHAPES)
            ),
            args=args,
            train_dataset=prompts.select_columns(["prompt"]),
            callbacks=callbacks,
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    trained = linear_weights(trainer.model)
    same = sum(int((trained[name] == parameter).sum()) for name, parameter in first.weights.items())
    kl = [entry["objective/reverse_kl"] for entry in logs]
    return {
        "steps": len(logs),
        "trained_dtype": sorted({str(parameter.dtype) for parameter in trainer.model.parameters()}),
        "weights_unchanged": same / sum(parameter.numel() for parameter in trained.values()),
        "largest_gradient_norm": max(entry["grad_norm"] for entry in logs),
        "reverse_kl_first": kl[0],
        "reverse_kl": [round(value, 3) for value in kl],
        "entropy": [entry["entropy"] for entry in logs],
        "gradient_norm": [entry["grad_norm"] for entry in logs],
        "reverse_kl_first_20": mean(kl[:20]),
        "reverse_kl_last_20": mean(kl[-20:]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first_updates", type=int)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--ways", choices=WAYS, nargs="+", metavar="WAY", help=f"default: all, {', '.join(WAYS)}")
    arguments = parser.parse_args()
    first = arguments.first_updates
    steps, ways = ({2e-4: GPU_STEPS}, list(WAYS)[:2]) if first else (STEPS, list(WAYS))
    ways = arguments.ways or ways
    results = []
    settings = {"steps": steps, "seeds": arguments.seeds, "model_seeds": [0, 1]}
    settings |= {"shapes": LARGE, "first_updates": first} if first else {"shapes": SHAPES}
    name = "precision_seeds_first" if first else "precision_seeds"
    for way, seed, (rate, updates) in itertools.product(ways, arguments.seeds, steps.items()):
        found = {"way": way, "learning_rate": rate, "seed": seed, **train(way, rate, updates, seed, first)}
        print(found, flush=True)
        results.append(found)
        path = write_record(name, PACKAGES, settings, results)
    print(path)


if __name__ == "__main__":
    main()
