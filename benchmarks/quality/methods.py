"""The methods that are compared, each a training run of the same student on the same prompts."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tasks import Task, pairs
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer
from minillm_trl.data import unique_prompts
from minillm_trl.rollouts.prompts import generate_completions

BATCH = 32  # completions of one update, for every method
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": BATCH,
    "lr_scheduler_type": "linear",
    "warmup_steps": 10,
    "weight_decay": 0.01,
    "gradient_checkpointing": False,
    "use_cpu": True,
    "bf16": False,
    "save_strategy": "no",
    "logging_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
SUPERVISED: dict[str, Any] = {**COMMON, "max_length": 256, "train_sampling_strategy": "group_by_length"}
SAMPLED: dict[str, Any] = {**COMMON, "disable_dropout": True, "temperature": 1.0}
# The paper's algorithm; 128 rollouts, four passes over them in mini-batches of 32
MINILLM: dict[str, Any] = {
    **SAMPLED,
    "steps_per_generation": 4,
    "num_iterations": 4,
    "sampling_batch_size": BATCH,
    "top_p": 1.0,
    "top_k": 0,
    "teacher_mixed_alpha": 0.2,
    "gamma": 1.0,
    "length_normalization": True,
    "single_step_decomposition": True,
    "epsilon": 0.2,
}


@dataclass(frozen=True)
class Method:
    """One row of the comparison.

    Attributes:
        label: in tables and pictures.
        kind: which trainer runs it, see `_make_trainer`.
        updates: optimizer steps of 32 completions.
        options: fields of the trainer's configuration besides the common ones.
        corpus: whether L_PT is part of the loss, on the training pairs (the only text that the student has seen).
    """

    label: str
    kind: str
    updates: int
    options: dict[str, Any]
    corpus: bool = False


def _without(**options: Any) -> dict[str, Any]:
    return {**MINILLM, **options}


ORIGINAL_CODE = _without(
    gamma=0.95,
    include_current_reward=True,
    discounted_length=False,
    reward_scale=0.5,
    reward_clip=100.0,
    whiten_advantages="padding",
    lm_kd_ratio=0.5,
)

METHODS = {
    # on data: as many updates as take MiniLLM's CPU time, and no fewer than MiniLLM has
    "sft": Method("SFT continued", "sft", 250, SUPERVISED),
    "kd": Method("KD", "kd", 160, SUPERVISED),
    "seqkd": Method("SeqKD", "seqkd", 250, SUPERVISED),
    "minillm": Method("MiniLLM", "minillm", 160, MINILLM),
    "no_mixing": Method("– no teacher-mixed sampling", "minillm", 160, _without(teacher_mixed_alpha=0.0)),
    # without it the policy gradient has to carry the current reward: Eq. 2 of the paper
    "no_single_step": Method(
        "– no single-step term",
        "minillm",
        160,
        _without(single_step_decomposition=False, include_current_reward=True),
    ),
    "no_length_norm": Method("– no length normalisation", "minillm", 160, _without(length_normalization=False)),
    "lpt": Method("+ L_PT on the training pairs", "minillm", 160, MINILLM, corpus=True),
    "original_code": Method("authors' code's settings", "minillm", 160, ORIGINAL_CODE, corpus=True),
    "distillation": Method(
        "TRL DistillationTrainer, as many updates", "distillation", 160, {**SAMPLED, "beta": 1.0, "top_k": 0}
    ),
    "distillation_time": Method(
        "TRL DistillationTrainer, as much time", "distillation", 46, {**SAMPLED, "beta": 1.0, "top_k": 0}
    ),
    "gkd": Method("TRL GKD, as many updates", "gkd", 160, {**SAMPLED, "lmbda": 0.5, "beta": 0.5}),
}


class CpuTimer(TrainerCallback):
    """CPU seconds of this process from the first update to the last: one thread, so other work hardly counts."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def on_train_begin(self, *unused: Any, **unused_too: Any) -> None:
        self.seconds = -time.process_time()

    def on_train_end(self, *unused: Any, **unused_too: Any) -> None:
        self.seconds += time.process_time()


def train(
    method: Method,
    task: Task,
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    learning_rate: float,
    seed: int,
) -> float:
    """Train `student` in place.

    Returns:
        `float`: CPU seconds of the updates.
    """
    torch.manual_seed(seed)
    random.seed(seed)  # GKD tosses its coins with it
    timer = CpuTimer()
    arguments = {
        "output_dir": str(folder / "trainer"),
        "max_steps": method.updates,
        "learning_rate": learning_rate,
        "seed": seed,
        **method.options,
    }
    trainer = _make_trainer(method, task, folder, teacher, arguments)(
        model=student, processing_class=tokenizer, callbacks=[timer]
    )
    trainer.train()
    return timer.seconds


def _make_trainer(
    method: Method,
    task: Task,
    folder: Path,
    teacher: PreTrainedModel,
    arguments: dict[str, Any],
) -> Callable[..., Trainer]:
    """The method's trainer, but for the student and what all of them are given."""
    data = task.load_data(folder.parent)["train"]
    prompts = unique_prompts(data).select_columns(["prompt"])
    sampled = {"max_completion_length": task.max_completion_length, **arguments}
    match method.kind:
        case "sft":
            return partial(FineTuningTrainer, args=FineTuningConfig(**arguments), train_dataset=pairs(data))
        case "seqkd":
            answers = Dataset.from_json(str(folder.parent / "seqkd.jsonl"))
            return partial(FineTuningTrainer, args=FineTuningConfig(**arguments), train_dataset=answers)
        case "kd":
            args = KDConfig(**arguments)
            return partial(KDTrainer, teacher_model=teacher, args=args, train_dataset=pairs(data))
        case "minillm":
            args, corpus = MiniLLMConfig(**sampled), pairs(data) if method.corpus else None
            rows = prompts if args.lmbda == 1 else unique_prompts(pairs(data), keep_completion=True)
            return partial(MiniLLMTrainer, teacher_model=teacher, args=args, train_dataset=rows, lm_dataset=corpus)
        case "distillation":
            args = DistillationConfig(**sampled)
            return partial(DistillationTrainer, teacher_model=teacher, args=args, train_dataset=prompts)
        case "gkd":
            args = GKDConfig(max_new_tokens=task.max_completion_length, **arguments)
            return partial(_make_gkd, teacher_model=teacher, args=args, train_dataset=pairs(data))
    raise ValueError(f"no trainer for {method.kind!r}")


def _make_gkd(processing_class: PreTrainedTokenizerBase, **options: Any) -> GKDTrainer:
    return GKDTrainer(processing_class=processing_class, data_collator=_gkd_collator(processing_class), **options)


def _gkd_collator(tokenizer: PreTrainedTokenizerBase) -> Callable[[list[dict[str, str]]], dict[str, torch.Tensor]]:
    """What GKD wants of a batch, from pairs of texts: its own collator takes conversations only."""

    def collate(rows: list[dict[str, str]]) -> dict[str, torch.Tensor]:
        prompts = [tokenizer(row["prompt"])["input_ids"] for row in rows]
        completions = [tokenizer(row["completion"])["input_ids"] + [tokenizer.eos_token_id] for row in rows]
        whole = [prompt + completion for prompt, completion in zip(prompts, completions, strict=True)]
        labels = [[-100] * len(prompt) + completion for prompt, completion in zip(prompts, completions, strict=True)]
        return {
            "input_ids": _left_pad(whole, tokenizer.pad_token_id),
            "attention_mask": _left_pad([[1] * len(ids) for ids in whole], 0),
            "labels": _left_pad(labels, -100),
            "prompts": _left_pad(prompts, tokenizer.pad_token_id),
            "prompt_attention_mask": _left_pad([[1] * len(ids) for ids in prompts], 0),
        }

    return collate


def _left_pad(rows: list[list[int]], value: int) -> torch.Tensor:
    width = max(map(len, rows))
    return torch.tensor([[value] * (width - len(row)) + row for row in rows])


def generate_seqkd_data(
    task: Task, folder: Path, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    """The teacher's completions for the training prompts, finished ones only and each once, in `seqkd.jsonl`."""
    path = folder / "seqkd.jsonl"
    if path.is_file():
        return
    prompts = list(unique_prompts(task.load_data(folder)["train"])["prompt"])
    found: dict[tuple[str, str], None] = {}
    for seed in range(task.seqkd_samples):
        completions = generate_completions(
            teacher, tokenizer, prompts, max_new_tokens=task.max_completion_length, seed=1000 + seed, batch_size=128
        )
        for prompt, completion in zip(prompts, completions, strict=True):
            if completion.finished and completion.text.strip():
                found[prompt, completion.text] = None
    partial = path.with_suffix(".partial")
    Dataset.from_list([{"prompt": p, "completion": c} for p, c in found]).to_json(str(partial))
    partial.rename(path)
