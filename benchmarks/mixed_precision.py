"""Claim: training in half precision works, for full fine-tuning and for QLoRA students of an NF4 teacher.

    python benchmarks/mixed_precision.py

trains GPT-2 shapes with random weights for 200 updates on prompts of the E2E data, in each precision that the device
supports: fp16 and bf16 on GPUs, bf16 on CPUs, and float32 for comparison. Each case runs in a separate process. It
reports the reverse KL at start and end, the largest gradient norm, overflowed steps, and whether all logged numbers
and trained weights are finite. The weights are random, but large enough for distributions far from uniform. This
measures whether numbers stay finite, not how well a student learns. Writes `results/mixed_precision.json`.
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from measurement import ON_GPU, SHAPES, write_record
from peft import LoraConfig
from transformers import BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.data import load_examples, unique_prompts
from minillm_trl.demo.models import train_tokenizer

STEPS, VOCAB = 200, 2000
PACKAGES = ("minillm-trl", "torch", "trl", "transformers", "peft", "bitsandbytes", "accelerate")


def save_model(name: str, folder: Path, tokenizer, seed: int) -> str:
    """Save a model of the named shape whose next-token distributions are far from uniform."""
    torch.manual_seed(seed)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = GPT2LMHeadModel(GPT2Config(**SHAPES[name], vocab_size=len(tokenizer), n_positions=256, **ends))
    with torch.no_grad():
        model.transformer.ln_f.weight.mul_(4.0)
    model.save_pretrained(folder / f"{name}-{seed}")
    tokenizer.save_pretrained(folder / f"{name}-{seed}")
    return str(folder / f"{name}-{seed}")


def train(student: str, teacher: str, precision: str, qlora: bool) -> dict[str, Any]:
    prompts = unique_prompts(load_examples("e2e", split="train"))
    tokenizer = train_tokenizer(prompts["prompt"], VOCAB)
    compute = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(precision, torch.float32)
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute)
    with tempfile.TemporaryDirectory() as folder:
        models = save_model(student, Path(folder), tokenizer, 0), save_model(teacher, Path(folder), tokenizer, 1)
        args = MiniLLMConfig(
            folder,
            use_cpu=not ON_GPU,
            fp16=precision == "fp16",
            bf16=precision == "bf16",
            per_device_train_batch_size=8,
            steps_per_generation=2,
            num_iterations=2,
            max_completion_length=24,
            max_steps=STEPS,
            learning_rate=2e-4,
            warmup_steps=20,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            teacher_model_init_kwargs={"quantization_config": nf4} if qlora else None,
        )
        trainer = MiniLLMTrainer(
            *models,
            args=args,
            train_dataset=prompts.select_columns(["prompt"]),
            peft_config=LoraConfig(r=8, target_modules="all-linear") if qlora else None,
            quantization_config=nf4 if qlora else None,
        )
        trainer.train()
    logs = [entry for entry in trainer.state.log_history if "loss" in entry]
    overflowed = [0.0, *(entry.get("fp16/skipped_steps", 0.0) for entry in logs)]
    taken = [log for log, old, new in zip(logs, overflowed, overflowed[1:], strict=False) if new == old]
    numbers = [value for log in taken for value in log.values() if isinstance(value, float)]
    weights = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    return {
        "steps": len(logs),
        "all_finite": all(map(math.isfinite, numbers)) and all(bool(weight.isfinite().all()) for weight in weights),
        "trained_dtype": sorted({str(parameter.dtype) for parameter in weights}),
        "skipped_steps": overflowed[-1],
        "largest_gradient_norm": max(entry["grad_norm"] for entry in taken),
        "reverse_kl_first_20": sum(entry["objective/reverse_kl"] for entry in logs[:20]) / 20,
        "reverse_kl_last_20": sum(entry["objective/reverse_kl"] for entry in logs[-20:]) / 20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", choices=SHAPES, default="gpt2" if ON_GPU else "tiny")
    parser.add_argument("--teacher", choices=SHAPES, default="gpt2-medium" if ON_GPU else "tiny")
    parser.add_argument("--case", nargs=2, metavar=("PRECISION", "WAY"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        precision, way = arguments.case
        print(json.dumps(train(arguments.student, arguments.teacher, precision, way == "qlora_nf4")))
        return
    precisions = ["float32", "bf16"] if not ON_GPU else ["float32", "fp16"]
    if ON_GPU and torch.cuda.get_device_capability() >= (8, 0):
        precisions.append("bf16")

    def run(case: tuple[str, str]) -> dict[str, Any]:
        way, precision = case
        command = [sys.executable, __file__, "--student", arguments.student, "--teacher", arguments.teacher]
        finished = subprocess.run([*command, "--case", precision, way], stdout=subprocess.PIPE, text=True, check=True)
        result = {"way": way, "precision": precision, **json.loads(finished.stdout.splitlines()[-1])}
        print(result, flush=True)
        return result

    cases = [(way, precision) for way in ("full", "qlora_nf4") for precision in precisions]
    with ThreadPoolExecutor(len(cases) if ON_GPU else 1) as pool:  # nothing is timed
        results = list(pool.map(run, cases))
    settings = {"student": arguments.student, "teacher": arguments.teacher, "steps": STEPS, "seeds": [0, 1]}
    print(write_record("mixed_precision", PACKAGES, settings, results))


if __name__ == "__main__":
    main()
