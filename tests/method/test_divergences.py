"""The divergences of the single step against sums written from the papers, their bounds and limits, and TRL's own."""

import math

import pytest
import torch
from trl.experimental.gkd import GKDTrainer
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from minillm_trl import divergences
from minillm_trl.divergences import DIVERGENCES, choose_divergence
from minillm_trl.models.divergence_gradients import divergence_in_place
from minillm_trl.models.fused_head import ScoreRequest, score_hidden_states
from minillm_trl.models.lm_head import LMHead

PARAMETERS = {"forward_kl_share": 0.3, "jsd_beta": 0.2, "skew_alpha": 0.15, "teacher_entropy_threshold": 1.0}
STUDENT, TEACHER, TOKEN = [0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4], 0


def slow(name: str, q: list[float], p: list[float], token: int) -> float:
    """Return a divergence by a loop over the vocabulary, from the formula of its paper."""

    def kl(a, b) -> float:
        return sum(x * math.log(x / y) for x, y in zip(a, b, strict=True) if x > 0)

    def mix(share, a, b) -> list[float]:
        return [share * x + (1 - share) * y for x, y in zip(a, b, strict=True)]

    share, beta, alpha, threshold = PARAMETERS.values()
    entropy = -sum(x * math.log(x) for x in p if x > 0)
    trust = min(1.0, p[token] / q[token])
    return {
        "reverse_kl": lambda: kl(q, p),
        "forward_kl": lambda: kl(p, q),
        "mixed_kl": lambda: (1 - share) * kl(q, p) + share * kl(p, q),
        "generalized_jsd": lambda: beta * kl(p, mix(beta, p, q)) + (1 - beta) * kl(q, mix(beta, p, q)),
        "skewed_forward_kl": lambda: kl(p, mix(alpha, p, q)),
        "skewed_reverse_kl": lambda: kl(q, mix(alpha, q, p)),
        "entropy_aware_kl": lambda: kl(q, p) + (kl(p, q) if entropy > threshold else 0.0),
        "trust_region_kl": lambda: trust * kl(q, p) + (1 - trust) * kl(p, q),
    }[name]()


def value(name: str, q: torch.Tensor, p: torch.Tensor, tokens: torch.Tensor, **parameters: float) -> torch.Tensor:
    extra = {"tokens": tokens} if name == "trust_region_kl" else {}
    return choose_divergence(name, **{**PARAMETERS, **parameters})(q, p, **extra)


def pair(shape=(4,), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(seed)
    q, p = (torch.log_softmax(2 * torch.randn(shape, dtype=torch.float64), -1) for _ in range(2))
    return q, p, torch.randint(shape[-1], shape[:-1])


@pytest.mark.parametrize("name", DIVERGENCES)
class TestEach:
    @pytest.mark.parametrize("seed", range(3))
    def test_value_is_the_sum_of_the_paper(self, name: str, seed: int):
        q, p, tokens = pair((3, 5, 7), seed)
        expected = [
            slow(name, a.exp().tolist(), b.exp().tolist(), token)
            for a, b, token in zip(q.flatten(0, 1), p.flatten(0, 1), tokens.flatten().tolist(), strict=True)
        ]
        torch.testing.assert_close(
            value(name, q, p, tokens).flatten(), torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0
        )

    def test_student_equal_to_its_teacher_has_neither_value_nor_gradient(self, name: str):
        logits = torch.randn(6, dtype=torch.float64, requires_grad=True)
        q = torch.log_softmax(logits, -1)
        found = value(name, q, q.detach(), torch.tensor(2))
        assert found.item() == pytest.approx(0.0, abs=1e-15)
        assert torch.autograd.grad(found, logits)[0].abs().max() < 1e-15

    def test_no_gradient_reaches_the_teacher(self, name: str):
        q, p, tokens = pair()
        assert not value(name, q, p.requires_grad_(), tokens).requires_grad

    def test_tokens_impossible_for_both_change_nothing(self, name: str):
        q, p, tokens = pair()
        padded = [torch.cat([x, torch.tensor([-math.inf], dtype=torch.float64)]).requires_grad_() for x in (q, p)]
        found = value(name, *padded, tokens)
        torch.testing.assert_close(found.detach(), value(name, q, p, tokens))
        assert torch.autograd.grad(found, padded[0])[0][:-1].isfinite().all()


@pytest.mark.parametrize("name", ["forward_kl", "generalized_jsd", "skewed_forward_kl", "skewed_reverse_kl"])
def test_closed_form_is_finite_where_the_teacher_excludes_a_token(name: str):
    """As a teacher that masks rows of its vocabulary does. The reverse KL and its sums are infinite there."""
    q, p, tokens = pair((5, 7))
    p = torch.log_softmax(p.index_fill(1, torch.tensor([2]), -math.inf), -1)
    logits = q.clone().requires_grad_()
    expected = value(name, torch.log_softmax(logits, -1), p, tokens)
    divergence = choose_divergence(name, **PARAMETERS)
    found, gradient = divergence_in_place(divergence, q.clone(), q.exp(), p.clone(), tokens)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), logits)[0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["mixed_kl", "entropy_aware_kl", "trust_region_kl"])
def test_sums_of_both_are_infinite_where_the_teacher_excludes_a_token(name: str, dtype: torch.dtype):
    """So that the guard skips the step, as for the reverse KL. The first row excludes nothing."""
    q, p, _ = (x.to(dtype) for x in pair((4, 7)))
    excluded = torch.zeros(4, 7, dtype=torch.bool).index_fill(1, torch.tensor([2, 5]), True)
    excluded[0] = False
    p = torch.log_softmax(p.masked_fill(excluded, -math.inf), -1)
    tokens = torch.tensor([2, 0, 1, 3])  # none that the teacher excludes
    logits = q.clone().requires_grad_()
    expected = value(name, torch.log_softmax(logits, -1), p, tokens)
    assert expected[0].isfinite()
    assert (expected[1:] == math.inf).all()
    found, gradient = divergence_in_place(choose_divergence(name, **PARAMETERS), q.clone(), q.exp(), p.clone(), tokens)
    torch.testing.assert_close(found, expected.detach())
    torch.testing.assert_close(gradient[0], torch.autograd.grad(expected[0], logits)[0][0])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_trust_region_is_the_forward_kl_where_the_teacher_excludes_the_sampled_token(dtype: torch.dtype):
    q, p, _ = (x.to(dtype) for x in pair((5, 7)))
    p = torch.log_softmax(p.index_fill(1, torch.tensor([2, 4]), -math.inf), -1)
    tokens = torch.full((5,), 2)
    gradients = []
    for name in ("forward_kl", "trust_region_kl"):
        logits = q.clone().requires_grad_()
        expected = value(name, torch.log_softmax(logits, -1), p, tokens)
        gradients.append(torch.autograd.grad(expected.sum(), logits)[0])
    torch.testing.assert_close(*gradients)
    found, gradient = divergence_in_place(divergences.trust_region_kl, q.clone(), q.exp(), p.clone(), tokens)
    torch.testing.assert_close(found, value("forward_kl", q, p, tokens))
    torch.testing.assert_close(gradient, gradients[0])


class TestLimits:
    @pytest.mark.parametrize(
        ("name", "parameters", "other"),
        [
            ("mixed_kl", {"forward_kl_share": 0.0}, "reverse_kl"),
            ("mixed_kl", {"forward_kl_share": 1.0}, "forward_kl"),
            ("generalized_jsd", {"jsd_beta": 0.0}, "forward_kl"),
            ("generalized_jsd", {"jsd_beta": 1.0}, "reverse_kl"),
            ("skewed_forward_kl", {"skew_alpha": 0.0}, "forward_kl"),
            ("skewed_reverse_kl", {"skew_alpha": 0.0}, "reverse_kl"),
            ("entropy_aware_kl", {"teacher_entropy_threshold": 9.0}, "reverse_kl"),
        ],
    )
    def test_end_of_a_parameter_is_a_plain_kl(self, name: str, parameters: dict, other: str):
        q, p, tokens = pair((5, 6))
        excluding = torch.log_softmax(p.index_fill(1, torch.tensor([2]), -math.inf), -1)
        for teacher in (p, excluding):
            torch.testing.assert_close(value(name, q, teacher, tokens, **parameters), value(other, q, teacher, tokens))
        both = [
            divergence_in_place(choose_divergence(key, **{**PARAMETERS, **own}), q.clone(), q.exp(), p.clone(), tokens)
            for key, own in ((name, parameters), (other, {}))
        ]
        for found, expected in zip(*both, strict=True):
            torch.testing.assert_close(found, expected)

    def test_threshold_of_zero_adds_the_forward_kl_everywhere(self):
        q, p, tokens = pair((5, 6))
        found = value("entropy_aware_kl", q, p, tokens, teacher_entropy_threshold=0.0)
        torch.testing.assert_close(found, value("reverse_kl", q, p, tokens) + value("forward_kl", q, p, tokens))

    @pytest.mark.parametrize(("beta", "scale", "other"), [(1e-7, 1e7, "forward_kl"), (1 - 1e-7, 1e7, "reverse_kl")])
    def test_jsd_over_its_share_tends_to_the_plain_kl(self, beta: float, scale: float, other: str):
        q, p, tokens = pair((5, 6))
        found = scale * value("generalized_jsd", q, p, tokens, jsd_beta=beta)
        torch.testing.assert_close(found, value(other, q, p, tokens), rtol=1e-4, atol=0)

    def test_bounded_divergences_stay_finite_without_common_tokens(self):
        q, p = torch.tensor([0.0, -math.inf]), torch.tensor([-math.inf, 0.0])
        token = torch.tensor(0)
        assert value("generalized_jsd", q, p, token, jsd_beta=0.5).item() == pytest.approx(math.log(2))
        for name in ("skewed_forward_kl", "skewed_reverse_kl"):
            assert value(name, q, p, token).item() == pytest.approx(-math.log(PARAMETERS["skew_alpha"]))
        assert value("reverse_kl", q, p, token).item() == math.inf

    def test_forward_kl_is_added_only_above_the_threshold(self):
        q = torch.log_softmax(torch.tensor([[1.0, 0.0, 0.0], [1.0, 0.0, 0.0]]), -1)
        p = torch.tensor([[0.98, 0.01, 0.01], [0.4, 0.3, 0.3]]).log()
        extra = value(
            "entropy_aware_kl", q, p, torch.zeros(2), teacher_entropy_threshold=0.8
        ) - divergences.reverse_kl(q, p)
        torch.testing.assert_close(extra, torch.stack([torch.tensor(0.0), divergences.forward_kl(q, p)[1]]))

    def test_trust_is_complete_where_the_teacher_likes_the_token_better(self):
        q, p = torch.tensor(STUDENT).log(), torch.tensor(TEACHER).log()
        trust = divergences.teacher_trust(q.expand(4, 4), p.expand(4, 4), torch.arange(4))
        torch.testing.assert_close(trust, torch.tensor([0.2, 2 / 3, 1.0, 1.0]))

    def test_trust_region_is_the_mean_over_the_papers_coin(self):
        """Of M ~ Bernoulli(w): M KL(q || p) + (1 - M) KL(p || q), with the same gradient at each token."""
        logits = torch.tensor(STUDENT, dtype=torch.float64).log().requires_grad_()
        q, p = torch.log_softmax(logits, -1), torch.tensor(TEACHER, dtype=torch.float64).log()
        trust = TEACHER[TOKEN] / STUDENT[TOKEN]
        both = [
            torch.autograd.grad(function(q, p), logits, retain_graph=True)[0]
            for function in (divergences.reverse_kl, divergences.forward_kl)
        ]
        found = torch.autograd.grad(divergences.trust_region_kl(q, p, torch.tensor(TOKEN)), logits)[0]
        torch.testing.assert_close(found, trust * both[0] + (1 - trust) * both[1])


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("mixed_kl", {"forward_kl_share": 1.5}),
        ("generalized_jsd", {"jsd_beta": -0.1}),
        ("skewed_forward_kl", {"skew_alpha": 1.0}),
        ("skewed_reverse_kl", {"skew_alpha": -0.1}),
        ("entropy_aware_kl", {"teacher_entropy_threshold": -1.0}),
    ],
)
def test_parameter_without_meaning_is_refused_by_name(name: str, parameters: dict):
    with pytest.raises(ValueError, match=next(iter(parameters))):
        value(name, *pair(), **parameters)


class TestTRL:
    """TRL's GKD and distillation losses on one batch, to rounding."""

    @pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 0.9, 1.0])
    @pytest.mark.parametrize("temperature", [1.0, 1.7])
    def test_gkd_loss_and_gradient(self, beta: float, temperature: float):
        torch.manual_seed(0)
        logits = torch.randn(3, 5, 11, dtype=torch.float64, requires_grad=True)
        teacher = torch.randn(3, 5, 11, dtype=torch.float64)
        mask = torch.rand(3, 5) < 0.7
        labels = torch.where(mask, 1, -100)
        expected = GKDTrainer.generalized_jsd_loss(
            logits, teacher, labels, beta, temperature, num_items_in_batch=int(mask.sum())
        )
        q, p = (torch.log_softmax(x / temperature, -1) for x in (logits, teacher))
        found = value("generalized_jsd", q, p, None, jsd_beta=beta)[mask].mean()
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
        torch.testing.assert_close(
            torch.autograd.grad(found, logits)[0], torch.autograd.grad(expected, logits)[0], rtol=1e-9, atol=1e-15
        )

    @pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
    def test_distillation_loss_from_hidden_states(self, beta: float):
        torch.manual_seed(0)
        vocab, temperature = 37, 1.3
        hidden, teacher_hidden = torch.randn(2, 6, 8, requires_grad=True), torch.randn(2, 6, 12)
        weight, teacher_weight = torch.randn(vocab, 8, requires_grad=True), torch.randn(vocab, 12)
        mask, ids = torch.rand(2, 6) < 0.7, torch.randint(vocab, (2, 6))
        expected, entropy, tokens = _chunked_divergence_loss(
            hidden, teacher_hidden, weight, teacher_weight, mask.int(), beta, temperature=temperature
        )
        gradients = torch.autograd.grad(expected, [hidden, weight])
        divergence = choose_divergence("generalized_jsd", jsd_beta=beta)
        request = ScoreRequest(ids, mask, mask, temperature, teacher_hidden, None, divergence)
        scores = score_hidden_states(
            hidden,
            LMHead(weight, None),
            request._replace(loss=lambda scores, _: scores.divergence),
            vocab,
            LMHead(teacher_weight, None),
        )
        found = torch.autograd.grad(scores.loss / mask.sum(), [hidden, weight])
        torch.testing.assert_close(scores.loss / tokens, expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(scores.entropy.sum(), entropy, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found, gradients, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
