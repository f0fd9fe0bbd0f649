"""Rollouts with `use_vllm` in the process of the trainer, with vLLM itself on a CPU."""

import pytest
from vllm_on_cpu import build_word_model, needs_vllm, record
from vllm_runs import FRESH, GAP, UPDATES, distances, gaps, is_fresh, make_trainer

pytestmark = [*needs_vllm, pytest.mark.usefixtures("updatable_weights")]


def test_weights_are_fresh_samples_follow_them_and_a_run_resumes(tmp_path, student_folder):
    trainer = make_trainer(tmp_path, student_folder, save_strategy="steps", save_steps=UPDATES // 2)
    trainer.train()
    gap = gaps(trainer)
    final = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    own, before = distances(trainer, {0})
    untrained = build_word_model(0).state_dict()
    moved = max(float((value - untrained[name]).abs().max()) for name, value in final.items())
    engine = str(trainer.vllm_generation.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    del trainer

    resumed = make_trainer(tmp_path, student_folder)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{UPDATES // 2}"))
    after = [entry[f"{GAP}/max"] for entry in resumed.state.log_history if f"{GAP}/max" in entry][UPDATES // 2 :]
    difference = max(
        float((value.detach() - final[name]).abs().max()) for name, value in resumed.model.named_parameters()
    )
    numbers = {
        "dtype": engine,
        "updates": UPDATES,
        "gap_mean": gap["mean"],
        "gap_max": gap["max"],
        "largest_change_of_a_weight": moved,
        "samples": 4096,
        "distance_to_own_law": own,
        "distance_to_law_before_training": before,
        "gap_max_after_resuming": max(after),
        "weight_difference_after_resuming": difference,
    }
    record("colocate", numbers)
    assert is_fresh(gap)
    assert abs(own) < 5 < before
    assert len(after) == UPDATES // 2
    assert max(after) < FRESH["max"]


def test_a_sampler_with_old_weights_is_seen(tmp_path, student_folder, monkeypatch):
    trainer = make_trainer(tmp_path, student_folder, max_steps=6)
    monkeypatch.setattr(trainer.vllm_generation, "sync_weights", lambda: None)
    trainer.train()
    gap = gaps(trainer)
    record("without_weight_updates", {"updates": 6, "gap_mean": gap["mean"], "gap_max": gap["max"]})
    assert not is_fresh(gap)
