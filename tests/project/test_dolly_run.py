"""A run with everything on, on real instructions, logs exactly the metrics that the documentation explains."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from minillm_trl.cli import main

SAMPLE = Path(__file__).parents[1] / "data/dolly_sample.jsonl"
DOCS = Path(__file__).parents[2] / "docs/metrics.md"
TEMPLATE = "Below is an instruction that describes a task.\n\n### Instruction:\n{}\n\n### Response:\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Train through the command line; the run's folder."""
    folder = tmp_path_factory.mktemp("dolly")
    rows = [json.loads(line) for line in SAMPLE.read_text().splitlines()]
    examples = [{"prompt": TEMPLATE.format(row["instruction"]), "completion": row["response"]} for row in rows]
    for name, part in (("train", examples[:144]), ("eval", examples[144:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    (folder / "corpus.txt").write_text("\n".join(row["response"].replace("\n", " ") for row in rows[:144]))

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([row["prompt"] + row["completion"] for row in examples], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")
    for name, width, seed in (("student", 32, 0), ("teacher", 64, 1)):
        torch.manual_seed(seed)
        config = GPT2Config(
            vocab_size=len(tokenizer), n_embd=width, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0
        )
        GPT2LMHeadModel(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)

    settings = {
        "model_name_or_path": str(folder / "student"),
        "teacher_model_name_or_path": str(folder / "teacher"),
        "dataset": str(folder / "train.jsonl"),
        "eval_dataset": str(folder / "eval.jsonl"),
        "output_dir": str(folder / "out"),
        "use_peft": True,
        "lora_r": 8,
        "lora_target_modules": ["c_attn", "c_proj", "c_fc"],
        "lora_task_type": "CAUSAL_LM",
        "teacher_mixed_alpha": 0.2,
        "num_iterations": 4,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 2,
        "max_completion_length": 24,
        "lm_dataset": str(folder / "corpus.txt"),
        "lm_kd_ratio": 0.5,
        "lm_max_length": 64,
        "beta": 0.02,
        "learning_rate": 1e-3,
        "max_steps": 16,
        "eval_strategy": "steps",
        "eval_steps": 8,
        "per_device_eval_batch_size": 16,
        "save_strategy": "steps",
        "save_steps": 8,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_rouge_l",
        "logging_steps": 1,
        "use_cpu": True,
        "bf16": False,
    }
    (folder / "minillm.yaml").write_text(yaml.safe_dump(settings))
    assert main(["minillm", "--config", str(folder / "minillm.yaml")]) == 0
    return folder / "out"


@pytest.fixture(scope="module")
def history(run: Path) -> list[dict]:
    return json.loads((run / "checkpoint-16/trainer_state.json").read_text())["log_history"]


def documented(*headings: str) -> set[str]:
    """Names in the first column of the tables under the headings."""
    names = set()
    for heading in headings:
        section = DOCS.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
        rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
        names |= {name for row in rows for name in re.findall(r"`([\w/]+)`", row)}
    return names


ALWAYS = ("Always", "With L_PT (`lm_dataset`)", "With a reference model (`beta` > 0)")


def test_every_documented_metric_is_logged_and_every_logged_one_documented(history: list[dict]):
    logged = set().union(*(entry for entry in history if "loss" in entry)) - {"step"}
    assert logged == documented(*ALWAYS)


def test_evaluation_logs_the_same_but_for_what_only_training_has(history: list[dict]):
    logged = {name.removeprefix("eval_") for entry in history if "eval_loss" in entry for name in entry} - {"step"}
    training_only = documented("With L_PT (`lm_dataset`)") | {
        "grad_norm",
        "learning_rate",
        "nonfinite_completions",
        "nonfinite_steps",
        "step_time",
        *(f"objective/{term}_{moment}" for term in ("long_term", "single_step") for moment in ("signal", "variance")),
    }
    assert logged == documented(*ALWAYS, "In evaluation only") - training_only


def test_values_are_numbers_in_their_range(history: list[dict]):
    entries = [entry for entry in history if "loss" in entry]
    assert len(entries) == 16
    for entry in entries:
        assert all(isinstance(value, (int, float)) and value == value for value in entry.values())
        for name in ("rollout/eos_rate", "clip_ratio/mixing", "clip_ratio/drift", "completions/clipped_ratio"):
            if name in entry:
                assert 0.0 <= entry[name] <= 1.0
        assert entry["objective/single_step"] > 0
        assert 0.5 < entry["importance_weight/mean"] < 2.0
        assert 0.0 < entry["importance_weight/effective_sample_size"] <= 1.0 + 1e-6
    assert entries[0]["kl"] == pytest.approx(0.0, abs=1e-6)
    assert entries[-1]["objective/lm_cross_entropy"] < entries[0]["objective/lm_cross_entropy"]


def test_checkpoints_and_the_result_are_adapters(run: Path):
    for folder in (run, run / "checkpoint-8", run / "checkpoint-16"):
        assert (folder / "adapter_model.safetensors").is_file()
        assert not (folder / "model.safetensors").exists()
