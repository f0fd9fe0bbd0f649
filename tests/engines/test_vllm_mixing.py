"""Mixing with drafts of vLLM itself, in the process of the trainer, on a CPU: samples follow the mixture."""

from statistics import mean

import pytest
import torch
from peft import LoraConfig
from vllm_on_cpu import build_word_model, mixture_law, needs_vllm, record, surprise
from vllm_runs import GAP, make_trainer

from minillm_trl import MiniLLMTrainer

pytestmark = [*needs_vllm, pytest.mark.usefixtures("updatable_weights")]

ALPHA, HORIZON, SAMPLES, UPDATES = 0.5, 3, 4096, 6


def sample(trainer: MiniLLMTrainer) -> list[tuple[int, ...]]:
    """Return completions of a rollout with the current weights."""
    trainer.model.train()
    trainer._begin_rollout(torch.ones(SAMPLES, dtype=torch.bool))
    ids = trainer.processing_class("a b")["input_ids"]
    return [tuple(row) for row in trainer._sample_turn([ids] * SAMPLES, HORIZON)]


def measure(trainer: MiniLLMTrainer, name: str) -> dict[str, float]:
    """Train, and record how far samples are from the mixture, and from the student and the teacher alone."""
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollout/kept_drafts" in entry]
    samples = sample(trainer)
    totals = trainer._drafts.take_totals()
    kept, excess = (
        total / count for total, count in (totals["rollout/kept_drafts"], totals["rollout/mixture_distance"])
    )
    teacher, ids = build_word_model(1), trainer.processing_class("a b")["input_ids"]
    student, temperature = trainer.model.eval(), trainer.args.temperature
    found = {
        alpha: surprise(samples, mixture_law(student, teacher, ids, HORIZON, {0}, alpha, temperature))
        for alpha in (0.0, ALPHA, 1.0)
    }
    numbers = {
        "alpha": ALPHA,
        "updates": len(logs),
        "gap_mean": mean(entry[f"{GAP}/mean"] for entry in logs),
        "gap_max": max(entry[f"{GAP}/max"] for entry in logs),
        "samples": SAMPLES,
        "tokens": sum(map(len, samples)),
        "kept_drafts": kept,
        "mixture_distance": excess,
        "gap_max_of_samples": totals[f"{GAP}/max"][0],
        "distance_to_the_mixture": found[ALPHA],
        "distance_to_the_student": found[0.0],
        "distance_to_the_teacher": found[1.0],
    }
    record(name, numbers)
    assert len(logs) == UPDATES
    assert numbers["gap_mean"] < 0.02
    assert numbers["mixture_distance"] < 1e-3
    assert abs(found[ALPHA]) < 5 < min(found[0.0], found[1.0])
    return numbers


@pytest.fixture
def options() -> dict:
    return {"teacher_mixed_alpha": ALPHA, "mixing": "speculative", "max_steps": UPDATES}


def test_samples_follow_the_mixture_of_the_trained_student_and_its_teacher(tmp_path, student_folder, options):
    trainer = make_trainer(tmp_path, student_folder, **options)
    numbers = measure(trainer, "mixing")
    assert trainer._rollout_copy is None
    # no draft was beyond the margin
    assert 1e-3 < numbers["gap_max_of_samples"] < 0.02
    assert numbers["mixture_distance"] == 0.0


def test_samples_of_a_lora_student_at_another_temperature_follow_the_mixture(tmp_path, student_folder, options):
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    trainer = make_trainer(tmp_path, student_folder, lora, temperature=0.7, **options)
    assert trainer._rollout_copy is not None  # the student judges with merged adapters
    measure(trainer, "mixing_lora")
    adapter = [value.detach() for name, value in trainer.model.named_parameters() if "lora_B" in name]
    assert max(float(value.abs().max()) for value in adapter) > 0.02


def test_a_rollout_repeats_its_samples(tmp_path, student_folder, options):
    trainer = make_trainer(tmp_path, student_folder, **options)
    prompts = [{"prompt": "a b"}] * 8
    trainer.model.train()
    first, second = (trainer._generate_and_score_completions(prompts)["completion_ids"] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > 4
