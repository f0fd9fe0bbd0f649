"""Evaluate trainers on rows that do not fill the processes' batches; tests start this in several processes."""

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from conftest import WORDS, build_model, build_tokenizer
from datasets import Dataset

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer

PROMPTS = [f"the punter {'near the river ' * (i % 4)}{i}\n" for i in range(16)]
COMMON = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "gradient_checkpointing": False}


def length(completion_ids: list[list[int]], **_: object) -> list[float | None]:
    """Return rewards that do not apply to short completions."""
    return [None if len(ids) < 3 else float(len(ids) ** 2) for ids in completion_ids]


def evaluate_minillm(
    folder: str, batch_size: int, rows: int = 5, stream: bool = False, reward: bool = False, **options
) -> dict:
    """Return the metrics of an evaluation, and its part of GRPO's table of completions."""
    tokenizer = build_tokenizer()
    args = MiniLLMConfig(
        folder,
        **COMMON,
        per_device_train_batch_size=4,
        steps_per_generation=4,
        per_device_eval_batch_size=batch_size,
        max_completion_length=24,
        log_completions=True,
        num_completions_to_print=0,
        **options,
    )
    student = build_model("gpt2", len(tokenizer))
    student.generation_config.eos_token_id = list(range(0, 300, 12))  # many ends, so that lengths differ
    data = Dataset.from_dict({"prompt": PROMPTS[:rows], "references": [[WORDS]] * rows})
    trainer = MiniLLMTrainer(
        student,
        build_model("gpt2", len(tokenizer), 1, width=48),
        reward_funcs=length if reward else None,
        args=args,
        train_dataset=Dataset.from_dict({"prompt": PROMPTS * 2}),
        eval_dataset=data.to_iterable_dataset(num_shards=2) if stream else data,
        processing_class=tokenizer,
    )
    metrics = trainer.evaluate()
    columns = [trainer._logs["prompt"], trainer._logs["completion"], *trainer._logs["rewards"].values()]
    return {"metrics": metrics, "table": sorted(map(str, zip(*columns, strict=True)))}


def evaluate_tuning(folder: str, batch_size: int, kd: bool = False, stream: bool = False) -> dict:
    """Return the metrics of an evaluation of fine-tuning or KD on completions of very different lengths."""
    tokenizer = build_tokenizer()
    data = Dataset.from_dict({"prompt": PROMPTS[:5], "completion": [" is a cheap pub" * n for n in (1, 12, 2, 1, 5)]})
    student, teacher = build_model("gpt2", len(tokenizer)), build_model("gpt2", len(tokenizer), 1, width=48)
    trainer_class, config_class = (KDTrainer, KDConfig) if kd else (FineTuningTrainer, FineTuningConfig)
    trainer = trainer_class(
        model=student,
        args=config_class(folder, **COMMON, per_device_eval_batch_size=batch_size),
        train_dataset=data,
        eval_dataset=data.to_iterable_dataset(num_shards=2) if stream else data,
        processing_class=tokenizer,
        **({"teacher_model": teacher} if kd else {}),
    )
    return {"metrics": trainer.evaluate()}


# By name: what evaluates, and rows that all processes evaluate at a time
GROUPS = {"num_generations_eval": 4, "rows": 3, "reward": True}
CASES: dict[str, tuple[Callable[..., dict], int]] = {
    "minillm": (evaluate_minillm, 4),
    "minillm, stream": (partial(evaluate_minillm, stream=True), 4),
    "minillm, sums of sequences": (partial(evaluate_minillm, loss_reduction="sequence_sum"), 4),
    "minillm, moments of the batch": (
        partial(evaluate_minillm, whiten_advantages="tokens", scale_rewards="batch", reward=True),
        8,
    ),
    "minillm, several samples": (partial(evaluate_minillm, **GROUPS), 4),
    "minillm, several samples, stream": (partial(evaluate_minillm, **GROUPS, stream=True), 8),
    "sft": (evaluate_tuning, 4),
    "sft, one row at a time": (evaluate_tuning, 2),
    "sft, stream": (partial(evaluate_tuning, stream=True), 4),
    "kd": (partial(evaluate_tuning, kd=True), 4),
}


def evaluate(folder: str, processes: int) -> dict[str, dict]:
    """Return the results of each case."""
    return {name: run(folder, rows // processes) for name, (run, rows) in CASES.items()}


if __name__ == "__main__":
    found = evaluate(sys.argv[1], int(os.environ["WORLD_SIZE"]))
    if os.environ["RANK"] == "0":
        Path(sys.argv[1], "found.json").write_text(json.dumps(found))
