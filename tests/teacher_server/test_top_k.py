"""The single step from a teacher's top-k log-probs: values and gradients by definition, and the bound."""

import itertools
import math
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from minillm_trl.divergences import forward_kl, generalized_jsd, reverse_kl, skewed_reverse_kl
from minillm_trl.errors import UserError
from minillm_trl.models.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.objectives import expected_rewards
from minillm_trl.rollouts.scores import HeadStates, RolloutScorer, TeacherStates
from minillm_trl.teacher_server.identity import ServerIdentity
from minillm_trl.teacher_server.remote_teacher import ServedTeacher
from minillm_trl.teacher_server.top_k import (
    TopK,
    TopKHead,
    complete,
    largest_log_probs,
    listed_log_probs,
    most_likely_tokens,
)

VOCAB, TOKENS = 11, 6


@pytest.fixture
def pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (2 * torch.randn(TOKENS, VOCAB, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher, torch.randint(VOCAB, (TOKENS,), generator=generator)


def bucket_kl(student_logits, teacher_logits, targets, k, temperature=1.0, divergence=reverse_kl, whose="teacher"):
    """Merge all unlisted tokens into one outcome, token by token, and compare the merged distributions."""
    q = torch.softmax(student_logits / temperature, dim=-1)
    p = torch.softmax(teacher_logits / temperature, dim=-1)
    totals = []
    for row in range(len(targets)):
        likely = (p if whose == "teacher" else q)[row].topk(k).indices.tolist()
        listed = sorted({*likely, int(targets[row])})
        others = [token for token in range(q.shape[1]) if token not in listed]
        merged = [torch.cat([each[row, listed], each[row, others].sum()[None]]) for each in (q, p)]
        totals.append(divergence(*(each[: len(listed) + bool(others)].log() for each in merged)))
    return torch.stack(totals)


DIVERGENCES = {
    "reverse": reverse_kl,
    "forward": forward_kl,
    "jsd": partial(generalized_jsd, jsd_beta=0.3),
    "skewed": partial(skewed_reverse_kl, skew_alpha=0.2),
}


@pytest.mark.parametrize("divergence", DIVERGENCES.values(), ids=DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("k", [1, 3, VOCAB - 1, VOCAB])
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_single_step_is_the_divergence_with_the_rest_as_one_token(pair, whose, k, temperature, divergence):
    student, teacher, targets = pair
    student = student.requires_grad_()
    expected = bucket_kl(student, teacher, targets, k, temperature, divergence, whose)
    (gradient,) = torch.autograd.grad(expected.sum(), student)
    if whose == "teacher":
        top = largest_log_probs(teacher, targets, k, temperature)
    else:
        top = listed_log_probs(teacher, most_likely_tokens(student.detach(), k), targets, temperature)
    completed = complete(top, student, temperature)
    found = divergence(torch.log_softmax(student / temperature, -1), torch.log_softmax(completed / temperature, -1))
    (found_gradient,) = torch.autograd.grad(found.sum(), student)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found_gradient, gradient)


@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_it_is_a_lower_bound_that_grows_to_the_kl(pair, whose):
    student, teacher, targets = pair
    full = reverse_kl(torch.log_softmax(student, -1), torch.log_softmax(teacher, -1))
    values = [bucket_kl(student, teacher, targets, k, whose=whose) for k in range(1, VOCAB + 1)]
    for smaller, larger in itertools.pairwise(values):
        assert (smaller <= larger + 1e-12).all()
    assert (values[0] < full - 1e-3).any()
    torch.testing.assert_close(values[-1], full)


def test_packing_keeps_ids_and_log_probs(pair):
    _, teacher, targets = pair
    top = largest_log_probs(teacher.float(), targets, 4, 1.0)
    assert all(map(torch.equal, TopK.unpack(top.pack()), top))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_packed_batches_are_float32_of_any_shape(dtype):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (2, 3, 4), generator=generator)
    logps, rest = (torch.randn(*shape, generator=generator).to(dtype) for shape in ((2, 3, 4), (2, 3)))
    packed = TopK(ids, logps, rest).pack()
    assert (packed.dtype, packed.shape) == (torch.float32, (2, 3, 9))
    assert all(map(torch.equal, TopK.unpack(packed), (ids, logps.float(), rest.float())))


@pytest.mark.parametrize(("size", "fits"), [(2**24, True), (2**24 + 1, False)])
def test_vocabulary_is_limited_to_the_ids_that_float32_holds(size: int, fits: bool):
    head = torch.nn.Linear(1, size, bias=False, device="meta")
    student = SimpleNamespace(get_output_embeddings=lambda: head)
    teacher = ServedTeacher(None, ServerIdentity("it", vocab_size=size), 5, 1.0, "teacher")
    with nullcontext() if fits else pytest.raises(UserError, match=f"limited to {2**24} tokens"):
        assert teacher.shared_vocab_size(student, range(9)) == size
    largest = TopK(torch.tensor([[2**24 - 1]]), torch.zeros(1, 1), torch.zeros(1))
    assert TopK.unpack(largest.pack()).ids.item() == 2**24 - 1


def test_tokens_that_the_student_excludes_get_none_of_the_rest(pair):
    """The student has no shape outside the list, so nothing can have the probability of the rest."""
    student, teacher, targets = pair
    top = largest_log_probs(teacher, targets, 3, 0.7)
    unlisted = torch.ones_like(student, dtype=torch.bool).scatter(1, top.ids, False)
    completed = complete(top, student.masked_fill(unlisted, -math.inf), 0.7)
    expected = (teacher / 0.7).log_softmax(-1).masked_fill(unlisted, -math.inf)
    torch.testing.assert_close(completed / 0.7, expected)


def test_completed_teacher_is_a_constant(pair):
    student, teacher, targets = pair
    assert not complete(largest_log_probs(teacher, targets, 3, 1.0), student.requires_grad_(), 1.0).requires_grad


def test_teacher_without_probability_outside_the_list_gives_infinite_kl(pair):
    student, teacher, _ = pair
    teacher = teacher.scatter(1, teacher.topk(VOCAB - 3, largest=False).indices, -math.inf)
    top = largest_log_probs(teacher, teacher.argmax(dim=1), 3, 1.0)
    assert (top.rest == -math.inf).all()
    completed = complete(top, student, 1.0)
    assert reverse_kl(student.log_softmax(-1), completed.log_softmax(-1)).isinf().all()


def make_heads(pair):
    """Return hidden states that are the logits themselves, and the identity as head."""
    student, teacher, targets = pair
    head = LMHead(torch.eye(VOCAB, dtype=torch.float64), None)
    return head, student[None], teacher[None], targets[None]


@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize("has_loss", [True, False])
def test_fused_head_takes_the_teacher_from_its_top_k(pair, has_loss, temperature):
    head, student, _, targets = make_heads(pair)
    student = student.clone().requires_grad_()
    packed = largest_log_probs(pair[1], targets[0], 3, temperature).pack()[None].double()
    request = ScoreRequest(
        torch.cat([targets[:, :1], targets], dim=1),
        torch.ones(1, TOKENS + 1, dtype=torch.long),
        torch.ones(1, TOKENS, dtype=torch.bool),
        temperature,
        packed,
        loss=(lambda scores, rows: scores.divergence * (rows + 1)) if has_loss else None,
    )
    scores = score_hidden_states(student, head, request, VOCAB, TopKHead(temperature))
    expected = bucket_kl(student[0], pair[1], targets[0], 3, temperature)
    torch.testing.assert_close(scores.divergence[0], expected, rtol=1e-6, atol=1e-6, check_dtype=False)
    weights = torch.arange(1.0, TOKENS + 1)
    total = scores.loss if has_loss else (scores.divergence[0] * weights).sum()
    (found,) = torch.autograd.grad(total, student)
    (gradient,) = torch.autograd.grad((expected * weights).sum(), student)
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6, check_dtype=False)


def test_scores_of_a_rollout_are_exact_for_its_tokens_and_expected_rewards_are_those_of_the_list(pair):
    head, student, teacher, targets = make_heads(pair)
    mask = torch.ones_like(targets, dtype=torch.bool)
    packed = largest_log_probs(teacher[0], targets[0], 3, 1.0).pack()[None]
    scorer = RolloutScorer(1.0, 1.0, VOCAB, expected_rewards)
    scores = scorer.score(targets, mask, HeadStates(student, head), TeacherStates(packed, TopKHead(1.0)))
    exact = teacher[0].log_softmax(-1).gather(1, targets[0][:, None])[:, 0]
    torch.testing.assert_close(scores.teacher_kd_logps[0], exact, rtol=1e-6, atol=1e-6, check_dtype=False)
    torch.testing.assert_close(
        -scores.expected_rewards[0], bucket_kl(*pair, 3), rtol=1e-6, atol=1e-6, check_dtype=False
    )
    alone = scorer.score(targets, mask, teacher=TeacherStates(packed, TopKHead(1.0)))
    torch.testing.assert_close(alone.teacher_kd_logps[0], exact, rtol=1e-6, atol=1e-6, check_dtype=False)
