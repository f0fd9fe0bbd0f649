"""Scores of rollouts against the plain formulas, in chunks, of one model or both."""

import pytest
import torch

import minillm_trl.models.fused_head
from minillm_trl.models.lm_head import LMHead
from minillm_trl.objectives import expected_rewards
from minillm_trl.rollouts.scores import HeadStates, RolloutRequest, RolloutScorer, RolloutScores, TeacherStates

ROWS, LENGTH, VOCAB, SHARED = 3, 4, 11, 9


def states(seed: int, width: int) -> HeadStates:
    draws = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(*shape, width, dtype=torch.float64, generator=draws) for shape in ((ROWS, LENGTH), (VOCAB,))
    )
    return HeadStates(hidden.requires_grad_(), LMHead(weight.requires_grad_(), None))


STUDENT, TEACHER = states(0, 5), TeacherStates(*states(1, 6))
IDS = torch.randint(SHARED, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[True, True, True, False], [True, False, True, True], [False] * 4])


def log_probs(model: HeadStates | TeacherStates, temperature: float) -> torch.Tensor:
    logits = (model.hidden_states @ model.head.weight.T).detach()
    return torch.log_softmax(logits[..., :SHARED] / temperature, -1)


def expect(found: torch.Tensor | None, values: torch.Tensor) -> None:
    assert found is not None
    assert not found.requires_grad
    torch.testing.assert_close(found[MASK], values[MASK].to(found.dtype))
    assert not found[~MASK].any()


@pytest.mark.parametrize("kd_temperature", [0.7, 2.0])
@pytest.mark.parametrize("chunk_elements", [1, 2 * SHARED, 2**20])
@pytest.mark.parametrize("models", ["both", "student", "teacher"])
def test_scores_are_those_of_whole_distributions(monkeypatch, models: str, chunk_elements: int, kd_temperature: float):
    monkeypatch.setattr(minillm_trl.models.fused_head, "CHUNK_ELEMENTS", chunk_elements)
    given = {name: model for name, model in (("student", STUDENT), ("teacher", TEACHER)) if models in ("both", name)}
    scorer = RolloutScorer(0.7, kd_temperature, SHARED, expected_rewards, measure_entropy=True, student_top_k=3)
    scores = scorer.score(IDS, MASK, **given)
    for name, model in (("student", STUDENT), ("teacher", TEACHER)):
        for part, temperature in (("", 0.7), ("_kd", kd_temperature)):
            found = getattr(scores, f"{name}{part}_logps")
            if name in given:
                expect(found, log_probs(model, temperature).gather(2, IDS[..., None])[..., 0])
            else:
                assert found is None
    sampling = log_probs(STUDENT, 0.7)
    if "student" in given:
        expect(scores.entropy, torch.special.entr(sampling.exp()).sum(-1))
        expect(scores.student_top_ids, sampling.topk(3).indices)
        assert scores.student_top_ids.dtype == torch.int32
    else:
        assert scores.entropy is scores.student_top_ids is None
    if models == "both":
        expect(
            scores.expected_rewards,
            expected_rewards(log_probs(TEACHER, kd_temperature), log_probs(STUDENT, kd_temperature), sampling),
        )
    else:
        assert scores.expected_rewards is None
    assert scores.teacher_hidden_states is None


def test_what_is_not_asked_for_is_not_scored():
    scores = RolloutScorer(1.0, 1.0, SHARED).score(IDS, MASK, STUDENT, TEACHER)
    assert [name for name, value in scores._asdict().items() if value is None] == [
        *("expected_rewards", "entropy", "student_top_ids", "teacher_hidden_states")
    ]


def test_completions_without_tokens_have_scores_of_zero():
    nothing = torch.zeros_like(MASK)
    scores = RolloutScorer(0.7, 2.0, SHARED, expected_rewards, True, 2).score(IDS, nothing, STUDENT, TEACHER)
    known = [value for value in scores if value is not None]
    assert len(known) == 7
    assert all(value.shape[:2] == MASK.shape and not value.any() for value in known)


@pytest.mark.parametrize("has_teacher", [False, True])
def test_request_scores_the_completion_after_its_prompt(has_teacher: bool):
    prompts = torch.randint(SHARED, (ROWS, 2))
    ids = torch.cat([prompts, IDS], dim=1)
    scorer = RolloutScorer(0.7, 2.0, SHARED)
    request = RolloutRequest(ids, torch.ones_like(ids), MASK, scorer, TEACHER.hidden_states if has_teacher else None)
    found = request.score(STUDENT.hidden_states, STUDENT.head, SHARED, TEACHER.head)
    expected = scorer.score(IDS, MASK, STUDENT, TEACHER if has_teacher else None)
    for actual, reference in zip(found, expected, strict=True):
        assert actual is reference is None or torch.equal(actual, reference)


def test_move_to_a_device_leaves_what_is_to_stay():
    scores = RolloutScores(student_logps=torch.ones(2), entropy=torch.ones(2), teacher_hidden_states=torch.ones(2, 3))
    moved = scores.to(torch.device("meta"), stay=["teacher_hidden_states"])
    places = {name: value.device.type for name, value in moved._asdict().items() if value is not None}
    assert places == {"student_logps": "meta", "entropy": "meta", "teacher_hidden_states": "cpu"}
    assert {value.device.type for value in scores.to(torch.device("meta")) if value is not None} == {"meta"}
