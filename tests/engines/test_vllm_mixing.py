"""Mixing with drafts of vLLM itself, in the process of the trainer, on a CPU: samples follow the mixture."""

from statistics import mean

import pytest
import torch
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


def test_samples_follow_the_mixture_of_the_trained_student_and_its_teacher(tmp_path, student_folder):
    options = {"teacher_mixed_alpha": ALPHA, "mixing": "speculative", "max_steps": UPDATES}
    trainer = make_trainer(tmp_path, student_folder, **options)
    trainer.train()
    logs = [entry for entry in trainer.state.log_history if "rollout/kept_drafts" in entry]
    samples = sample(trainer)
    totals = {name: total / count for name, (total, count) in trainer._drafts.take_totals().items()}
    teacher, ids = build_word_model(1), trainer.processing_class("a b")["input_ids"]
    student = trainer.model.eval()
    found = {
        alpha: surprise(samples, mixture_law(student, teacher, ids, HORIZON, {0}, alpha))
        for alpha in (0.0, ALPHA, 1.0)
    }
    numbers = {
        "alpha": ALPHA,
        "updates": UPDATES,
        "gap_mean": mean(entry[f"{GAP}/mean"] for entry in logs),
        "gap_max": max(entry[f"{GAP}/max"] for entry in logs),
        "samples": SAMPLES,
        "kept_drafts": totals["rollout/kept_drafts"],
        "mixture_distance": totals["rollout/mixture_distance"],
        "distance_to_the_mixture": found[ALPHA],
        "distance_to_the_student": found[0.0],
        "distance_to_the_teacher": found[1.0],
    }
    record("mixing", numbers)
    assert len(logs) == UPDATES
    assert numbers["gap_mean"] < 0.02
    assert numbers["mixture_distance"] < 1e-3
    assert abs(found[ALPHA]) < 5 < min(found[0.0], found[1.0])


def test_a_rollout_repeats_its_samples(tmp_path, student_folder):
    trainer = make_trainer(tmp_path, student_folder, teacher_mixed_alpha=ALPHA, mixing="speculative")
    prompts = [{"prompt": "a b"}] * 8
    trainer.model.train()
    first, second = (trainer._generate_and_score_completions(prompts)["completion_ids"] for _ in range(2))
    assert torch.equal(first, second)
    assert len({tuple(row) for row in first.tolist()}) > 4
