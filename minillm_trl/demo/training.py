"""Run the demo's two kinds of training: supervised fine-tuning and MiniLLM."""

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback

from ..baselines import FineTuningConfig, FineTuningTrainer
from ..config import MiniLLMConfig
from ..trainer import MiniLLMTrainer
from ..training.reliable_trainer import ReliableTrainer
from .progress import StageProgress, UpdateTimer
from .settings import DemoSettings

_COMMON: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "save_total_limit": 1,
    "weight_decay": 0.01,
}


def train_sft(
    title: str,
    folder: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    dataset: Dataset,
    settings: DemoSettings,
    steps: int,
    learning_rate: float,
) -> dict:
    """Fine-tune `model` on prompts and completions and save it in `folder/model`.

    Returns:
        `dict` with the number of `updates` and their `seconds`.
    """
    args = FineTuningConfig(
        str(folder / "checkpoints"),
        per_device_train_batch_size=settings.sft_batch_size,
        max_steps=steps,
        learning_rate=learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=min(50, steps // 10),
        max_length=256,
        train_sampling_strategy="group_by_length",
        logging_steps=10,
        save_steps=max(1, steps // 5),
        seed=settings.seed,
        **_COMMON,
    )
    trainer = FineTuningTrainer(
        model=model,
        args=args,
        train_dataset=dataset.select_columns(["prompt", "completion"]),
        processing_class=tokenizer,
        callbacks=[StageProgress(title, {"loss": "loss"}), UpdateTimer()],
    )
    _train(trainer, folder)
    return {"updates": steps, "seconds": _seconds(trainer)}


def train_minillm(
    folder: Path,
    student: PreTrainedModel,
    teacher: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Dataset,
    validation: Dataset,
    settings: DemoSettings,
) -> dict:
    """Train `student` with MiniLLM and save it in `folder/model`.

    Returns:
        `dict` with `updates`, `seconds`, and `history`: the evaluations on the validation prompts.
    """
    rollout_steps = settings.steps_per_generation * settings.num_iterations
    checkpoint_every = (
        max(1, settings.minillm_steps // 5 // rollout_steps) * rollout_steps
    )  # at the end of a rollout buffer
    args = MiniLLMConfig(
        str(folder / "checkpoints"),
        per_device_train_batch_size=settings.minillm_batch_size,
        per_device_eval_batch_size=64,
        steps_per_generation=settings.steps_per_generation,
        num_iterations=settings.num_iterations,
        sampling_batch_size=settings.minillm_batch_size,
        max_completion_length=settings.max_completion_length,
        max_steps=settings.minillm_steps,
        learning_rate=settings.minillm_learning_rate,
        lr_scheduler_type="linear",
        warmup_steps=10,
        logging_steps=8,
        eval_strategy="steps",
        eval_steps=settings.eval_steps,
        eval_on_start=True,
        save_steps=checkpoint_every,
        seed=settings.seed,
        **_COMMON,
    )
    shown = {"objective/reverse_kl": "reverse KL", "eval_rouge_l": "Rouge-L"}
    trainer = MiniLLMTrainer(
        model=student,
        teacher_model=teacher,
        args=args,
        train_dataset=prompts.select_columns(["prompt"]),
        eval_dataset=validation,
        processing_class=tokenizer,
        callbacks=[StageProgress("MiniLLM", shown), UpdateTimer()],
    )
    _train(trainer, folder)
    history = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    return {"updates": settings.minillm_steps, "seconds": _seconds(trainer), "history": history}


def _train(trainer: ReliableTrainer, folder: Path) -> None:
    trainer.remove_callback(PrinterCallback)  # the progress bar shows what matters
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model(str(folder / "model"))


def _seconds(trainer: ReliableTrainer) -> float:
    return sum(timer.seconds for timer in trainer.callback_handler.callbacks if isinstance(timer, UpdateTimer))
