"""Rollouts by vLLM with an adapter, with end tokens of one's own, and with a seed."""

import pytest
from peft import LoraConfig
from vllm_on_cpu import build_word_model, needs_vllm, record
from vllm_runs import UPDATES, distances, gaps, is_fresh, make_trainer, sample

pytestmark = [*needs_vllm, pytest.mark.usefixtures("updatable_weights")]


def test_lora_student_at_another_temperature(tmp_path, student_folder):
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    trainer = make_trainer(tmp_path, student_folder, lora, temperature=0.7)
    trainer.train()
    gap = gaps(trainer)
    base = build_word_model(0).state_dict()
    # merging and unmerging the adapter at each update rounds
    drift = max(
        float((value.detach() - base[name.removeprefix("base_model.model.").replace(".base_layer", "")]).abs().max())
        for name, value in trainer.model.named_parameters()
        if "lora" not in name
    )
    adapter = [value.detach() for name, value in trainer.model.named_parameters() if "lora_B" in name]
    record("lora", {"updates": UPDATES, "gap_mean": gap["mean"], "gap_max": gap["max"], "drift_of_the_base": drift})
    assert is_fresh(gap)
    assert max(float(value.abs().max()) for value in adapter) > 0.05
    assert drift < 1e-5


def test_completions_end_with_the_end_tokens_and_nothing_else(tmp_path, student_folder):
    trainer = make_trainer(
        tmp_path, student_folder, max_steps=4, eos_tokens=["e", "f"]
    )  # not the EOS of the folder, 0
    trainer.train()
    ends = {*trainer.eos_token_ids}
    own, _ = distances(trainer, ends)
    samples = sample(trainer, "a b", 512, 6)
    record("end_tokens", {"ends": sorted(ends), "gap_max": gaps(trainer)["max"], "distance_to_own_law": own})
    assert ends == {6, 7}
    assert not any(ends & {*row[:-1]} for row in samples)
    assert any(0 in row[:-1] for row in samples)
    assert all(row[-1] in ends for row in samples if len(row) < 6)
    assert {row[-1] for row in samples} >= ends
    assert abs(own) < 5


def test_a_seed_in_generation_kwargs_gives_all_completions_the_same_numbers(tmp_path, student_folder):
    trainer = make_trainer(tmp_path, student_folder, generation_kwargs={"seed": 1})
    assert len({*sample(trainer, "a b", 16, 6)}) == 1
