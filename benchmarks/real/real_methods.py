"""The methods compared on a real model: training runs of the same healed student, for the same CPU or GPU time."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from datasets import Dataset
from real_tasks import TASKS
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer

COOL = 0.7  # a temperature of rollouts, rewards and single step at which the teacher's answers read well


@dataclass(frozen=True)
class Scale:
    """How much is computed.

    Attributes:
        batch: completions of one update.
        answer_tokens: length limit of every answer that a model writes.
        seconds: CPU or GPU seconds of the updates of each method.
        validation_rows, test_rows: prompts.
        task: a key of `TASKS`.
        recipe: values that replace those of the recipe's YAMLs, by stage.
    """

    batch: int
    answer_tokens: int
    seconds: int
    validation_rows: int
    test_rows: int
    task: str = "short"
    recipe: dict[str, dict[str, Any]] = field(default_factory=dict)


_CONTEXT = Scale(batch=8, answer_tokens=48, seconds=720, validation_rows=40, test_rows=100, task="context")

SCALES = {
    "cpu": Scale(batch=8, answer_tokens=64, seconds=300, validation_rows=40, test_rows=80),
    "cpu_context": _CONTEXT,
    "cpu_context_long": replace(_CONTEXT, task="context_long"),
    "gpu": Scale(
        batch=32,
        answer_tokens=256,
        seconds=3600,
        validation_rows=500,
        test_rows=500,
        recipe={
            "dolly": {"max_rows": None, "max_prompt_length": 256, "validation_rows": 1000, "test_rows": 500},
            "answers": {"max_completion_length": 256, "generation_batch_size": 512, "use_cpu": False},
            "heal": {"per_device_train_batch_size": 32, "max_length": 512, "num_train_epochs": 6, "use_cpu": False},
        },
    ),
}


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Attributes:
        label: in tables and pictures.
        kind: which trainer runs it, see [`make_trainer`].
        options: fields of the trainer's configuration besides the common ones.
        multiple: the number of updates is a multiple of it, so that every rollout is used up.
    """

    label: str
    kind: str
    options: dict[str, Any] = field(default_factory=dict)
    multiple: int = 1


_PAPER: dict[str, Any] = {"steps_per_generation": 4, "num_iterations": 4, "teacher_mixed_alpha": 0.2}
_LOW_VARIANCE = {"reward_estimator": "expected", "advantage_baseline": "position", "teacher_mixed_alpha": 0.0}
_ON_POLICY = {"beta": 1.0, "top_k": 0}

METHODS = {
    "sft": Method("SFT continued", "sft"),
    "healing": Method("healing continued (KD on the teacher's answers)", "healing"),
    "minillm": Method("MiniLLM (the paper's)", "minillm", _PAPER, multiple=16),
    "low_variance_cool": Method(
        f"MiniLLM, expected rewards, baseline, no mixing, trained at {COOL}",
        "minillm",
        {**_PAPER, **_LOW_VARIANCE, "temperature": COOL},
        multiple=16,
    ),
    "distillation": Method("TRL DistillationTrainer", "distillation", _ON_POLICY),
    "distillation_cool": Method(
        f"TRL DistillationTrainer, trained at {COOL}", "distillation", {**_ON_POLICY, "temperature": COOL}
    ),
    "gkd": Method("TRL GKD", "gkd", {"lmbda": 0.5, "beta": 0.5}),
    "seqkd": Method("SeqKD", "seqkd"),
    "kd": Method("KD", "kd"),
    "single_step_cool": Method(
        f"single step alone, no mixing, trained at {COOL}",
        "minillm",
        {**_PAPER, "rkl_advantage": False, "teacher_mixed_alpha": 0.0, "temperature": COOL},
        multiple=16,
    ),
}


@dataclass(frozen=True)
class Data:
    """What the methods are trained on.

    Attributes:
        human: Dolly's prompts with their own answers.
        answers: the prompts with the teacher's answers; None unless [`takes_answers`].
        messages: Dolly's conversations for GKD, with answers cut at the limit. Its collator drops the prompt of a row
            that is too long.
    """

    human: Dataset
    answers: Dataset | None
    messages: Dataset


def takes_answers(method: Method) -> bool:
    """Return whether the method is trained on the teacher's answers."""
    return method.kind in ("seqkd", "healing")


def make_trainer(method: Method, scale: Scale, data: Data, arguments: dict[str, Any]) -> Callable[..., Trainer]:
    """Return the method's trainer; the caller adds student, teacher, tokenizer and callbacks."""
    common = {
        "per_device_train_batch_size": scale.batch,
        "lr_scheduler_type": "linear",
        "warmup_steps": 5,
        "weight_decay": 0.01,
        "gradient_checkpointing": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
        **method.options,
    }
    supervised = {**common, "max_length": TASKS[scale.task].prompt_tokens + scale.answer_tokens}
    sampled = {**common, "max_completion_length": scale.answer_tokens, "disable_dropout": True}
    prompts = data.human.select_columns(["prompt"])
    match method.kind:
        case "sft" | "seqkd":
            dataset = data.human if method.kind == "sft" else data.answers
            return partial(_without_teacher, FineTuningTrainer, FineTuningConfig(**supervised), dataset)
        case "kd":
            return partial(KDTrainer, args=KDConfig(**supervised), train_dataset=data.human)
        case "healing":
            return partial(KDTrainer, args=KDConfig(**supervised, kd_ratio=1.0), train_dataset=data.answers)
        case "minillm":
            args = MiniLLMConfig(**{"temperature": 1.0, "sampling_batch_size": 4 * scale.batch, **sampled})
            return partial(MiniLLMTrainer, args=args, train_dataset=prompts)
        case "distillation":
            args = DistillationConfig(**{"temperature": 1.0, **sampled})
            return partial(DistillationTrainer, args=args, train_dataset=prompts)
        case "gkd":
            args = GKDConfig(max_new_tokens=scale.answer_tokens, temperature=1.0, **supervised)
            return partial(GKDTrainer, args=args, train_dataset=data.messages)
    raise ValueError(f"no trainer for {method.kind!r}")


def cut_conversations(rows: Dataset, tokenizer: PreTrainedTokenizerBase, answer_tokens: int) -> Dataset:
    """Return the rows as `messages`, with answers of at most `answer_tokens` tokens."""

    def convert(row: dict[str, Any]) -> dict[str, Any]:
        ids = tokenizer(row["completion"][0]["content"], add_special_tokens=False)["input_ids"]
        answer = {"role": "assistant", "content": tokenizer.decode(ids[:answer_tokens])}
        return {"messages": [*row["prompt"], answer]}

    return rows.map(convert, remove_columns=rows.column_names)


def _without_teacher(
    trainer: type[Trainer], args: Any, train_dataset: Dataset, teacher_model: PreTrainedModel, **options: Any
) -> Trainer:
    return trainer(args=args, train_dataset=train_dataset, **options)
