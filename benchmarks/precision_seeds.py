"""Claim: over several seeds, bf16 autocast trains as well as float32; bf16 weights hardly train at a low rate.

    python benchmarks/precision_seeds.py

fine-tunes a student fully (GPT-2 shape, random weights as in `mixed_precision.py`) with float32 weights, with float32
weights in bf16 autocast, and with bf16 weights, each with several trainer seeds. All runs start from the same student
and teacher; seeds change only the samples. There are two learning rates, that of `mixed_precision.py` for 40 updates
and the paper's for 8. Reports the reverse KL per completion in nats at start and end, and the share of weights in
linear layers that did not change by a bit. Writes `results/precision_seeds.json`.
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


def train(way: str, rate: float, steps: int, seed: int) -> dict[str, Any]:
    dtype, bf16 = WAYS[way]
    prompts, tokenizer = load_prompts()
    first = FirstWeights()
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
            save_model("student", Path(folder), tokenizer, 0),
            save_model("teacher", Path(folder), tokenizer, 1),
            args=args,
            train_dataset=prompts.select_columns(["prompt"]),
            callbacks=[first],
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
        "reverse_kl_first_20": mean(kl[:20]),
        "reverse_kl_last_20": mean(kl[-20:]),
    }


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    results = []
    settings = {"shapes": SHAPES, "steps": STEPS, "seeds": SEEDS, "model_seeds": [0, 1]}
    for seed, (rate, steps), way in itertools.product(SEEDS, STEPS.items(), WAYS):
        found = {"way": way, "learning_rate": rate, "seed": seed, **train(way, rate, steps, seed)}
        print(found, flush=True)
        results.append(found)
        path = write_record("precision_seeds", PACKAGES, settings, results)
    print(path)


if __name__ == "__main__":
    main()
