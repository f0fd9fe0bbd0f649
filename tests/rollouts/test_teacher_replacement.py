"""SKD's sampler: the law of its tokens by enumeration, and what it does in training."""

import itertools
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model
from test_trainer import make_trainer, weights

import minillm_trl.rollouts.teacher_replacement
from minillm_trl.models.lm_head import LMHead
from minillm_trl.presets import preset
from minillm_trl.rollouts.compiled_steps import CompiledDecoding
from minillm_trl.rollouts.rollout_sampler import RolloutSampler
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.scores import RolloutScorer

VOCAB, TOP_K, TEMPERATURE, EOS = 5, 2, 0.8, 0
PROMPT = [1, 3, 2]


def build_pair() -> list[torch.nn.Module]:
    models = [build_model("gpt2", VOCAB, seed=seed, width=16, layers=1) for seed in (0, 1)]
    with torch.no_grad():  # far enough from uniform, and flat enough to tell K from K + 1
        for model in models:
            model.get_output_embeddings().weight.mul_(2.0)
    return models


def build_sampler(teacher, top_k: int | None) -> RolloutSampler:
    return RolloutSampler(
        RolloutTeacher(teacher, LMHead.of(teacher).frozen(torch.device("cpu")), Accelerator(cpu=True), 64, "device"),
        RolloutScorer(TEMPERATURE, TEMPERATURE, vocab_size=VOCAB),
        alpha=0.0,
        eos_token_ids=[EOS],
        pad_token_id=1,
        skd_top_k=top_k,
    )


def law(student, teacher, context: list[int]) -> torch.Tensor:
    """Return mu of the next token, from the formula."""
    with torch.no_grad():
        q, p = (
            torch.softmax(model(torch.tensor([context])).logits[0, -1].double() / TEMPERATURE, -1)
            for model in (student, teacher)
        )
    inside = torch.zeros(VOCAB, dtype=torch.bool)
    inside[p.topk(TOP_K).indices] = True
    return q * inside + q[~inside].sum() * p


@pytest.mark.parametrize("draft_tokens", [1, 2, 16])
def test_completions_follow_the_law_of_judging_each_token(monkeypatch: pytest.MonkeyPatch, draft_tokens: int):
    monkeypatch.setattr(minillm_trl.rollouts.teacher_replacement, "DRAFT_TOKENS", draft_tokens)
    student, teacher = build_pair()
    count = 3000
    keys = [(5, row) for row in range(count)]
    turn = build_sampler(teacher, TOP_K).sample(student, [PROMPT] * count, keys, (0,), max_new_tokens=3)
    assert turn.scores.parts == []
    found = {completion: turn.completions.count(list(completion)) for completion in set(map(tuple, turn.completions))}
    total = 0.0
    for length in (1, 2, 3):
        for completion in itertools.product(range(VOCAB), repeat=length):
            ends = [token == EOS for token in completion]
            if any(ends[:-1]) or (length < 3 and not ends[-1]):
                continue  # this one has ended before, or has not ended
            probability = 1.0
            for place, token in enumerate(completion):
                probability *= law(student, teacher, [*PROMPT, *completion[:place]])[token].item()
            total += probability
            deviation = (count * probability * (1 - probability)) ** 0.5
            assert abs(found.get(completion, 0) - count * probability) < 4.5 * deviation + 1
    assert total == pytest.approx(1.0)


def test_k_of_the_whole_vocabulary_accepts_everything():
    student, teacher = build_pair()
    keys = [(5, row) for row in range(40)]
    options = {"keys": keys, "coin_key": (0,), "max_new_tokens": 6}
    corrected = build_sampler(teacher, VOCAB).sample(student, [PROMPT] * 40, **options).completions
    # the draft of a whole completion is that of its first key
    options["keys"] = [(*key, 1) for key in keys]
    assert corrected == build_sampler(teacher, None).sample(student, [PROMPT] * 40, **options).completions


@pytest.mark.parametrize("limit", [1, 5, 6])
def test_ends_and_limits_are_those_of_each_row(monkeypatch: pytest.MonkeyPatch, limit: int):
    """Prompts of different lengths, drafts of four tokens, and a row that ends early."""
    monkeypatch.setattr(minillm_trl.rollouts.teacher_replacement, "DRAFT_TOKENS", 4)
    student, teacher = build_pair()
    teacher.base_model.register_forward_pre_hook(lambda *_: grad_modes.append(torch.is_grad_enabled()))
    grad_modes: list[bool] = []
    prompts, keys = [PROMPT, [2], [4, 4, 1, 3, 2]] * 4, [(5, row) for row in range(12)]
    sampler = build_sampler(teacher, TOP_K)
    completions = sampler.sample(student, prompts, keys, (0,), max_new_tokens=limit).completions
    for row, completion in enumerate(completions):
        assert EOS not in completion[:-1]
        assert len(completion) == limit or completion[-1] == EOS
        alone = sampler.sample(student, [prompts[row]], [keys[row]], (0,), max_new_tokens=limit).completions
        assert alone == [completion]
    assert len({len(completion) for completion in completions}) > (limit > 1)
    assert not any(grad_modes)


def test_drafts_run_in_compiled_steps():
    student, teacher = build_pair()
    options = {"keys": [(5, row) for row in range(2)], "coin_key": (0,), "max_new_tokens": 6}
    sampler = build_sampler(teacher, TOP_K)
    expected = sampler.sample(student, [PROMPT] * 2, **options).completions
    compiled = CompiledDecoding(student, "eager")
    assert replace(sampler, compiled=compiled).sample(student, [PROMPT] * 2, **options).completions == expected
    ran, asked = compiled.take_counts()
    assert ran == asked > 0


def test_prompts_with_given_completions_keep_them():
    student, teacher = build_pair()
    turn = build_sampler(teacher, TOP_K).sample(
        student, [PROMPT] * 3, [(5, row) for row in range(3)], (0,), 4, given=[None, [2, 2, 2, 2, 2, EOS], None]
    )
    assert turn.completions[1] == [2, 2, 2, 2]
    assert all(1 <= len(turn.completions[row]) <= 4 for row in (0, 2))


def test_training_samples_are_corrected_and_those_of_evaluation_not(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, **preset("skd", skd_top_k=1))
    for training in (True, False):
        trainer.model.train(training)
        assert trainer._make_sampler().skd_top_k == (1 if training else None)
    before = weights(trainer)
    trainer.train()
    assert not torch.equal(weights(trainer), before)
    assert weights(trainer).isfinite().all()


def test_top_k_that_replaces_no_token_is_refused(tmp_path):
    with pytest.raises(ValueError, match="skd_top_k=5000 replaces no token"):
        make_trainer(tmp_path, **preset("skd", skd_top_k=5000))


def test_teacher_that_the_caller_has_sharded_is_refused(tmp_path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("minillm_trl.training.teacher_setup.is_sharded", lambda teacher: True)
    with pytest.raises(ValueError, match="this teacher is sharded"):
        make_trainer(tmp_path, **preset("skd", skd_top_k=1))
