"""Training runs whose rollouts vLLM samples in their process."""

from statistics import mean

from datasets import Dataset
from peft import LoraConfig
from vllm_on_cpu import build_word_model, law, surprise

from minillm_trl import MiniLLMConfig, MiniLLMTrainer

PROMPTS = ["a b", "c d e", "f a", "b b c"] * 8
UPDATES = 20
# vLLM runs the student in bfloat16, whose rounding is what remains between sampler and trainer
FRESH = {"mean": 0.02, "max": 0.25}
GAP = "sampling/sampling_logp_difference"
REQUEST = 1024  # prompts that vLLM's server takes in one request


def make_trainer(tmp_path, student: str, peft_config: LoraConfig | None = None, **options) -> MiniLLMTrainer:
    defaults = {
        "use_cpu": True,
        "report_to": "none",
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "per_device_train_batch_size": 8,
        "steps_per_generation": 1,
        "max_completion_length": 6,
        "max_steps": UPDATES,
        "learning_rate": 2e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "teacher_mixed_alpha": 0.0,
        "use_vllm": True,
        "vllm_max_model_length": 64,
    }
    return MiniLLMTrainer(
        student,
        build_word_model(1),
        args=MiniLLMConfig(str(tmp_path), **{**defaults, **options}),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        peft_config=peft_config,
    )


def gaps(trainer: MiniLLMTrainer) -> dict[str, float]:
    """Return the difference of log-probs between vLLM and the trainer over all updates, in nats a token."""
    logs = [entry for entry in trainer.state.log_history if f"{GAP}/mean" in entry]
    assert len(logs) == trainer.args.max_steps
    return {
        "mean": mean(entry[f"{GAP}/mean"] for entry in logs),
        "max": max(entry[f"{GAP}/max"] for entry in logs),
    }


def is_fresh(gap: dict[str, float]) -> bool:
    return all(gap[name] < FRESH[name] for name in FRESH)


def sample(trainer: MiniLLMTrainer, prompt: str, count: int, horizon: int) -> list[tuple[int, ...]]:
    """Return completions by vLLM with the weights that it has."""
    trainer.vllm_generation.max_completion_length = horizon
    ids = trainer.processing_class(prompt)["input_ids"]
    sizes = [min(REQUEST, count - start) for start in range(0, count, REQUEST)]
    parts = [trainer.vllm_generation.generate([ids] * size, None, 1)[1] for size in sizes]
    return [tuple(row) for part in parts for row in part]


def distances(trainer: MiniLLMTrainer, ends: set[int]) -> tuple[float, float]:
    """Return how far samples of the trained student are from its law, and from that of the untrained one."""
    trainer.vllm_generation.sync_weights()
    samples = sample(trainer, "a b", 4096, 3)
    ids = trainer.processing_class("a b")["input_ids"]
    trained, untrained = trainer.model.eval(), build_word_model(0)
    return tuple(surprise(samples, law(model, ids, 3, ends)) for model in (trained, untrained))
