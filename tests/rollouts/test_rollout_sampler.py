"""The sampler of rollouts on its own, without a trainer: completions and their scores."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model

from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.rollout_sampler import RolloutSampler
from minillm_trl.rollouts.rollout_teacher import RolloutTeacher
from minillm_trl.rollouts.scores import RolloutScorer
from minillm_trl.rollouts.several_teachers import SeveralTeachers

PROMPTS = [[5, 6, 7], [8], [9, 10]]
TEMPERATURE = 0.7


def build_sampler(alpha: float, kept_on: str = "device") -> RolloutSampler:
    teacher = build_model("gpt2", 40, seed=1, width=48)
    return RolloutSampler(
        RolloutTeacher(teacher, LMHead.of(teacher), Accelerator(cpu=True), batch_size=2, kept_on=kept_on),
        RolloutScorer(TEMPERATURE, TEMPERATURE, vocab_size=40),
        alpha=alpha,
        eos_token_ids=[0, 3],
        pad_token_id=1,
        batch_size=2,
    )


def sample(sampler: RolloutSampler, **options):
    keys = [(0, row) for row in range(len(PROMPTS))]
    student = build_model("gpt2", 40, seed=0)
    return student, sampler.sample(student, PROMPTS, keys, (0, 9), max_new_tokens=6, **options)


def plain_logps(model, prompt: list[int], completion: list[int]) -> torch.Tensor:
    with torch.no_grad():
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1]
    return (logits / TEMPERATURE).log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("alpha", [0.5, 0.0])
def test_scores_are_those_of_plain_forward_passes(alpha: float):
    sampler = build_sampler(alpha)
    student, turn = sample(sampler)
    scores = turn.scores.assemble(torch.Size((len(PROMPTS), 8)))  # wider than any completion
    for row, (prompt, completion) in enumerate(zip(PROMPTS, turn.completions, strict=True)):
        expected = plain_logps(student, prompt, completion)
        torch.testing.assert_close(scores.student_logps[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)
        assert not scores.student_logps[row, len(completion) :].any()
        if alpha > 0:
            expected = plain_logps(sampler.teacher.model, prompt, completion)
            torch.testing.assert_close(scores.teacher_logps[row, : len(completion)], expected, rtol=1e-4, atol=1e-5)
    assert (scores.teacher_logps is None) == (alpha == 0.0)  # the teacher has not run
    assert (scores.teacher_hidden_states is None) == (alpha == 0.0)
    assert scores.entropy is scores.student_top_ids is scores.expected_rewards is None  # not asked for


def test_turn_without_scores_has_the_same_completions():
    sampler = build_sampler(0.5)
    _, scored = sample(sampler)
    _, plain = sample(sampler, with_scores=False)
    assert plain.completions == scored.completions
    assert plain.scores.parts == []
    assert plain.scores.field("student_logps", torch.Size((3, 6))) is None


def test_states_are_copied_from_their_device_on_request_alone():
    states = torch.empty(2, 3, device="meta")  # which cannot be copied from
    assert build_sampler(0.5).teacher.keep(states) is states
    assert build_sampler(0.5, kept_on="recompute").teacher.keep(states) is None
    with pytest.raises(NotImplementedError):
        build_sampler(0.5, kept_on="cpu").teacher.keep(states)


def test_states_that_are_recomputed_are_not_kept():
    _, turn = sample(build_sampler(0.5, kept_on="recompute"))
    scores = turn.scores.assemble(torch.Size((3, 6)))
    assert scores.teacher_hidden_states is None
    assert scores.teacher_logps is not None


def test_a_row_beside_given_ones_keeps_its_own_teacher():
    """With coins of its own, each row is what it is where no completion is given."""
    first, second = build_sampler(0.9), build_sampler(0.9)
    second.teacher.model.load_state_dict(build_model("gpt2", 40, seed=2, width=48).state_dict())
    teachers = SeveralTeachers({"a": first.teacher, "b": second.teacher}, {name: nullcontext() for name in ("a", "b")})
    sampler = replace(first, teacher=teachers, shared_coins=False)
    _, free = sample(sampler, teacher_index=[0, 1, 0])
    _, swapped = sample(sampler, teacher_index=[1, 0, 1])
    assert free.completions[1:] != swapped.completions[1:]
    _, turn = sample(sampler, teacher_index=[0, 1, 0], given=[[7, 8, 9, 10, 11, 12, 13], None, None])
    assert turn.completions == [[7, 8, 9, 10, 11, 12], *free.completions[1:]]
