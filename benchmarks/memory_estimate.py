"""Claim: the memory estimate that `minillm-trl doctor` prints is within 15 % of the peak in training on a GPU.

    python benchmarks/memory_estimate.py

trains on two rollout buffers, each case in a separate process. It compares the peak allocation in the second buffer
(in sampling and scoring, and in the optimizer steps) with the estimate of `minillm_trl/hardware/memory_estimate.py`.
Models have published sizes and random weights, which end no completion early. The result also has the memory reserved
by the allocator; both numbers exclude the libraries' own memory. Writes `results/gpu/memory_estimate.json`; without a
GPU, `--try_out` runs a tiny case and writes nothing.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measurement import DEVICE, ON_GPU, write_record
from optimizer_step import make_prompts, make_tokenizer, never_end
from peft import LoraConfig
from recipe_memory import MODELS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, GPT2Config, PreTrainedModel

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.hardware.memory_estimate import Workload, estimate_memory

AT_ONCE = 4  # cases side by side on the GPU
SIZES = {**MODELS, "tiny": GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=300)}


@dataclass(frozen=True)
class Case:
    """A run: models by their names in `SIZES`, mixed precision, and arguments of the estimate."""

    student: str
    teacher: str
    precision: str
    load: Workload


GPT2 = Workload(rows=16, sampled_rows=32, buffered_rows=64, prompt_tokens=256, completion_tokens=128)
QWEN = replace(GPT2, rows=8, sampled_rows=16, buffered_rows=32)
CASES = {
    "GPT-2": Case("openai-community/gpt2", "openai-community/gpt2-xl", "fp16", GPT2),
    "GPT-2, no checkpointing": Case(
        "openai-community/gpt2", "openai-community/gpt2-xl", "fp16", replace(GPT2, gradient_checkpointing=False)
    ),
    "GPT-2 medium, LoRA": Case(
        "openai-community/gpt2-medium",
        "openai-community/gpt2-xl",
        "fp16",
        replace(GPT2, lora_rank=16, merged_rollouts=True),
    ),
    "Qwen2.5": Case("Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "bf16", QWEN),
    "Qwen2.5, no checkpointing": Case(
        "Qwen/Qwen2.5-0.5B", "Qwen/Qwen2.5-1.5B", "bf16", replace(QWEN, gradient_checkpointing=False)
    ),
    "Qwen2.5, QLoRA, NF4 teacher": Case(
        "Qwen/Qwen2.5-0.5B",
        "Qwen/Qwen2.5-1.5B",
        "bf16",
        replace(QWEN, lora_rank=16, student_4bit=True, teacher_4bit=True),
    ),
    "OPT": Case("facebook/opt-1.3b", "facebook/opt-2.7b", "fp16", QWEN),
}
TRIAL = Case(
    "tiny", "tiny", "no", Workload(rows=2, sampled_rows=2, buffered_rows=4, prompt_tokens=8, completion_tokens=8)
)


def build(name: str, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device(DEVICE):
        model = AutoModelForCausalLM.from_config(SIZES[name], dtype=dtype)
    return never_end(model) if hasattr(model, "transformer") else model


def make_trainer(case: Case, folder: Path) -> MiniLLMTrainer:
    load = case.load
    half = {"fp16": torch.float16, "bf16": torch.bfloat16, "no": torch.float32}[case.precision]
    nf4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=half)
    tokenizer = make_tokenizer(SIZES[case.student].vocab_size)

    def save(name: str) -> str:  # only loaded models are quantised
        build(name, half).save_pretrained(folder / name)
        return str(folder / name)

    student = build(case.student, torch.float32 if load.lora_rank is None else half)
    if load.student_4bit:
        student = save(case.student)
    if load.teacher_4bit:
        teacher = AutoModelForCausalLM.from_pretrained(save(case.teacher), dtype=half, quantization_config=nf4)
        teacher.config._name_or_path = ""  # there is no tokenizer
    else:
        teacher = build(case.teacher, half)

    args = MiniLLMConfig(
        str(folder / "out"),
        use_cpu=not ON_GPU,
        fp16=case.precision == "fp16",
        bf16=case.precision == "bf16",
        per_device_train_batch_size=load.rows,
        steps_per_generation=load.buffered_rows // load.rows,
        sampling_batch_size=load.sampled_rows,
        max_completion_length=load.completion_tokens,
        gradient_checkpointing=load.gradient_checkpointing,
        max_steps=2 * load.buffered_rows // load.rows,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return MiniLLMTrainer(
        student,
        teacher,
        args=args,
        train_dataset=make_prompts(2 * load.buffered_rows, load.prompt_tokens, len(tokenizer), seed=0),
        processing_class=tokenizer,
        peft_config=None if load.lora_rank is None else LoraConfig(r=load.lora_rank, target_modules="all-linear"),
        quantization_config=nf4 if load.student_4bit else None,
    )


def train(case: Case) -> dict[str, Any]:
    """Train, and return the peak bytes in both phases of the second rollout buffer."""
    peaks = {}

    def note(phase: str) -> None:
        if ON_GPU:
            peaks[phase] = torch.cuda.max_memory_allocated()
            torch.cuda.reset_peak_memory_stats()

    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(case, Path(folder))
        roll_out = trainer._generate_and_score_completions

        def noted(inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
            note("while updating")
            batch = roll_out(inputs)
            note("while sampling")
            return batch

        trainer._generate_and_score_completions = noted
        trainer.train()
        note("while updating")
    length = "completions/mean_length"
    lengths = [entry[length] for entry in trainer.state.log_history if length in entry]
    reserved = torch.cuda.memory_reserved() if ON_GPU else 0
    return {"measured": peaks, "reserved": reserved, "mean_completion_length": min(lengths)}


def compare(name: str) -> dict[str, Any]:
    """Compare one case, in a separate process."""
    case = CASES.get(name, TRIAL)
    command = [sys.executable, __file__, "--case", name]
    finished = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if finished.returncode:
        return {"case": name, "failed": finished.returncode}
    found = json.loads(finished.stdout.splitlines()[-1])
    estimated = estimate_memory(SIZES[case.student], SIZES[case.teacher], case.load)
    print(name, {phase: (value / 2**30, estimated[phase] / 2**30) for phase, value in found["measured"].items()})
    return {"case": name, **asdict(case), **found, "estimated": estimated}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    parser.add_argument("--try_out", action="store_true", help="a tiny case, and no record")
    arguments = parser.parse_args()
    if arguments.case:
        print(json.dumps(train(CASES.get(arguments.case, TRIAL))))
        return
    if not (ON_GPU or arguments.try_out):
        parser.error("there is no GPU to measure: --try_out runs a tiny case without one")
    with ThreadPoolExecutor(AT_ONCE) as pool:  # nothing is timed
        results = list(pool.map(compare, ["trial"] if arguments.try_out else CASES))
    if arguments.try_out:
        print(results)
    else:
        packages = ("torch", "trl", "transformers", "peft", "bitsandbytes", "accelerate")
        write_record("memory_estimate", packages, {"at_once": AT_ONCE}, results)


if __name__ == "__main__":
    main()
