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
from minillm_trl.rollouts.keyed_random import keyed_uniforms
from minillm_trl.rollouts.rollout_sampler import RolloutSampler
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.scores import RolloutScorer

VOCAB, TOP_K, TEMPERATURE, EOS = 5, 2, 0.8, 0
PROMPT = [1, 3, 2]


def build_pair(vocab: int = VOCAB) -> list[torch.nn.Module]:
    models = [build_model("gpt2", vocab, seed=seed, width=16, layers=1) for seed in (0, 1)]
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


@torch.no_grad()
def slow_completion(student, teacher, prompt: list[int], key: tuple[int, ...], top_k: int, limit: int) -> list[int]:
    """Judge each token in turn, with a plain forward pass of each model; a draft has four tokens."""

    def probabilities(model, tokens: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([[*prompt, *tokens]]), use_cache=False).logits[0, -1, :VOCAB]
        return torch.softmax(logits.double() / TEMPERATURE, -1)

    def drawn(probs: torch.Tensor, number: float) -> int:
        return int((probs.cumsum(0) <= number).sum())

    tokens: list[int] = []
    while len(tokens) < limit and EOS not in tokens:
        place = (*key, len(tokens) + 1)  # of the draft's first token
        for own, of_replacement in zip(keyed_uniforms(4, *place), keyed_uniforms(4, *place, 1), strict=True):
            proposed, probs = drawn(probabilities(student, tokens), own), probabilities(teacher, tokens)
            is_outside = int((probs > probs[proposed]).sum()) >= top_k
            tokens.append(drawn(probs, of_replacement) if is_outside else proposed)
            if is_outside or tokens[-1] == EOS or len(tokens) == limit:
                break
    return tokens


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_completions_are_those_of_a_slow_loop(monkeypatch: pytest.MonkeyPatch, top_k: int):
    """Prompts of different lengths, and models with more rows than the vocabulary, which are never sampled."""
    monkeypatch.setattr(minillm_trl.rollouts.teacher_replacement, "DRAFT_TOKENS", 4)
    student, teacher = build_pair(VOCAB + 3)
    prompts = [PROMPT, [2], [4, 4, 1, 3, 2]] * 4
    keys = [(5, row) for row in range(12)]
    found = build_sampler(teacher, top_k).sample(student, prompts, keys, (0,), max_new_tokens=6).completions
    assert found == [
        slow_completion(student, teacher, prompt, key, top_k, 6) for prompt, key in zip(prompts, keys, strict=True)
    ]


def test_k_of_the_whole_vocabulary_accepts_everything():
    """Drafts of 16 tokens, each of which has a key of its own."""
    student, teacher = build_pair()
    corrected, plain = (replace(build_sampler(teacher, top_k), eos_token_ids=[]) for top_k in (VOCAB, None))
    keys = [(5, row) for row in range(40)]
    found = corrected.sample(student, [PROMPT] * 40, keys, (0,), max_new_tokens=20).completions
    texts = [PROMPT] * 40
    for first, limit in ((1, 16), (17, 4)):
        drafts = plain.sample(student, texts, [(*key, first) for key in keys], (0,), limit).completions
        texts = [text + draft for text, draft in zip(texts, drafts, strict=True)]
    assert [PROMPT + completion for completion in found] == texts


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
