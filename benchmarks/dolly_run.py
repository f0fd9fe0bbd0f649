"""Claim: all parts of the trainer work together on real instructions.

    python benchmarks/dolly_run.py --dolly DIR --runs runs/dolly

runs mixing, four passes, L_PT, a reference KL, a LoRA student, evaluation and checkpoints on Dolly. DIR holds
`minillm_train.jsonl.gz` and `minillm_dev.jsonl` with `instruction`, `input` and `output` (the split in use with
MiniLLM). GPT-2-shaped models are built from a config and fine-tuned for a few minutes, then the student is distilled,
all through the command line. The run shows that the parts work, and their logs. It does not show quality: models of
this size learn little of Dolly in this time (Rouge-L is about 2 before and after), and adapters do not train the
student's embeddings.
Writes `results/dolly_run.json`.
"""

import argparse
import gzip
import json
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

RESULTS = Path(__file__).with_name("results") / "dolly_run.json"
CONTEXT = 192
SHAPES = {"teacher": {"n_embd": 128, "n_layer": 3, "n_head": 4}, "student": {"n_embd": 64, "n_layer": 2, "n_head": 4}}
CURVES = [
    ("eval_objective/reverse_kl", "reverse KL (nats per completion)"),
    ("eval_rouge_l", "Rouge-L"),
    ("eval_completions/mean_length", "length (tokens)"),
    ("eval_rollout/repeated_4grams", "repeated 4-grams (share)"),
]
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "gradient_checkpointing": False, "seed": 0}
SFT_STEPS = {"teacher": 1200, "student": 300}
SFT = {
    **COMMON,
    "per_device_train_batch_size": 16,
    "learning_rate": 1e-3,
    "lr_scheduler_type": "cosine",
    "max_length": CONTEXT,
    "save_strategy": "no",
    "logging_steps": 50,
}
MINILLM = {
    **COMMON,
    "use_peft": True,
    "lora_r": 16,
    "lora_target_modules": ["c_attn", "c_proj", "c_fc"],
    "lora_task_type": "CAUSAL_LM",
    "teacher_mixed_alpha": 0.2,
    "num_iterations": 4,
    "per_device_train_batch_size": 16,
    "steps_per_generation": 4,
    "max_completion_length": 64,
    "lm_coef": 1.0,
    "lm_kd_ratio": 0.5,
    "lm_max_length": 96,
    "beta": 0.01,
    "learning_rate": 4e-3,
    "lr_scheduler_type": "constant",
    "max_steps": 384,
    "eval_strategy": "steps",
    "eval_steps": 48,
    "eval_on_start": True,
    "per_device_eval_batch_size": 64,
    "max_eval_rows": 96,
    "save_strategy": "steps",
    "save_steps": 192,
    "logging_steps": 8,
}


def write_data(dolly: Path, folder: Path) -> None:
    """Write prompts in the paper's wrapper that fit into the context, and the answers as plain text for L_PT."""
    for name, file in (("train", "minillm_train.jsonl.gz"), ("dev", "minillm_dev.jsonl")):
        path = dolly / file
        text = gzip.decompress(path.read_bytes()).decode() if file.endswith(".gz") else path.read_text()
        rows = [json.loads(line) for line in text.splitlines()]
        rows = [row for row in rows if len(row["instruction"]) + len(row["input"]) < 120 and len(row["output"]) < 240]
        with (folder / f"{name}.jsonl").open("w") as output:
            for row in rows:
                given = f"\n\n### Input:\n{row['input']}" if row["input"] else ""
                prompt = (
                    "Below is an instruction that describes a task. Write a response.\n\n### Instruction:\n"
                    f"{row['instruction']}{given}\n\n### Response:\n"
                )
                output.write(json.dumps({"prompt": prompt, "completion": row["output"]}) + "\n")
        if name == "train":
            lines = (row["output"].replace("\n", " ") for row in rows)
            (folder / "corpus.txt").write_text("\n".join(lines))


def build_models(folder: Path) -> None:
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048, special_tokens=["<|endoftext|>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator((row["prompt"] + row["completion"] for row in rows), trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    for seed, (name, shape) in enumerate(SHAPES.items()):
        torch.manual_seed(seed)
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=CONTEXT, bos_token_id=0, eos_token_id=0, **shape)
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def run(subcommand: str, folder: Path, output: str, settings: dict) -> None:
    """Run one stage through the command line, unless its result exists."""
    if (folder / output / "tokenizer_config.json").exists():
        return
    path = folder / f"{output}.yaml"
    path.write_text(yaml.safe_dump({**settings, "output_dir": str(folder / output)}))
    subprocess.run([sys.executable, "-m", "minillm_trl", subcommand, "--config", str(path)], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dolly", type=Path, required=True)
    parser.add_argument("--runs", type=Path, default=Path("runs/dolly"))
    arguments = parser.parse_args()
    folder = arguments.runs
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "student").exists():
        write_data(arguments.dolly, folder)
        build_models(folder)
    data = {"dataset": str(folder / "train.jsonl")}
    for name in SHAPES:
        settings = {"max_steps": SFT_STEPS[name], "model_name_or_path": str(folder / name)}
        run("sft", folder, f"{name}-sft", {**SFT, **data, **settings})
    settings = {
        **MINILLM,
        **data,
        "eval_dataset": str(folder / "dev.jsonl"),
        "lm_dataset": str(folder / "corpus.txt"),
        "model_name_or_path": str(folder / "student-sft"),
        "teacher_model_name_or_path": str(folder / "teacher-sft"),
    }
    run("minillm", folder, "minillm", settings)

    steps = MINILLM["max_steps"]
    state = json.loads((folder / f"minillm/checkpoint-{steps}/trainer_state.json").read_text())
    evaluations = [entry for entry in state["log_history"] if "eval_loss" in entry]
    training = [entry for entry in state["log_history"] if "loss" in entry]
    revision = ["git", "-C", str(RESULTS.parent), "rev-parse", "HEAD"]
    result = {
        "command": "python benchmarks/dolly_run.py --dolly DIR",
        "commit": subprocess.run(revision, capture_output=True, text=True, check=True).stdout.strip(),
        "machine": {"processor": platform.machine(), "system": platform.system()},
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "peft", "accelerate")},
        "shapes": SHAPES,
        "sft": {**SFT, "max_steps": SFT_STEPS},
        "minillm": MINILLM,
        "first_evaluation": evaluations[0],
        "last_evaluation": evaluations[-1],
        "first_training": training[0],
        "last_training": training[-1],
        "curves": {key: [[entry["step"], entry[key]] for entry in evaluations] for key, _ in CURVES},
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    for key, label in CURVES:
        print(f"{label}: {evaluations[0][key]:.3g} before, {evaluations[-1][key]:.3g} after")


if __name__ == "__main__":
    main()
