"""The formulas at their edges: ties, equal values, few rows, half precision, and the ends of each parameter."""

import math

import pytest
import torch

from minillm_trl import divergences, objectives
from minillm_trl.divergences import choose_divergence, entropy_aware_kl, reverse_kl
from minillm_trl.loss import clipped_tokens, loss_terms
from minillm_trl.masking import masked_moments
from minillm_trl.models.divergence_gradients import divergence_in_place
from minillm_trl.models.fused_head import TokenScores
from minillm_trl.positions import prefix_discrepancy_weights, top_entropy_weights


def weights_at(level: str):
    return lambda logps, mask: torch.stack(objectives.importance_weights(logps, 0.0 * logps, mask, level))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "function",
    [
        lambda values, mask: objectives.reward_to_go(values, mask, length_normalization=False),
        lambda values, mask: objectives.reward_to_go(values, mask, gamma=0.9, include_current=True),
        lambda values, mask: objectives.reward_to_go(values, mask, future_rewards=values.flip(0)),
        lambda values, mask: objectives.leave_one_out_baseline(values, mask, torch.tensor([1, 0, 1])),
        lambda values, mask: objectives.whiten(values, mask, masked_moments(values, mask)),
        lambda values, mask: objectives.token_rewards(values, values.flip(0), mask, 0.5, 1.0, 1 + mask.long()),
        lambda values, mask: prefix_discrepancy_weights(values, mask, 0.5),
        *(weights_at(level) for level in ("decoupled", "prefix", "sequence")),
    ],
    ids=[
        "sum",
        "discounted",
        "future",
        "baseline",
        "whitened",
        "clipped",
        "discrepancy",
        "token",
        "prefix",
        "sequence",
    ],
)
def test_sums_over_long_completions_are_rounded_once(function, dtype: torch.dtype):
    generator = torch.Generator().manual_seed(0)
    values = (0.125 * torch.randn(3, 700, generator=generator)).to(dtype)
    mask = torch.rand(3, 700, generator=generator) < 0.9
    expected = function(values.double(), mask).to(dtype)
    found = function(values, mask)
    assert found.dtype == dtype
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


class TestRewards:
    def test_spans_without_a_clip_are_not_clipped(self):
        teacher, mask = torch.tensor([[-2e4, 3.0]]), torch.ones(1, 2, dtype=torch.bool)
        lengths = torch.ones(1, 2, dtype=torch.long)
        found = objectives.token_rewards(teacher, torch.zeros(1, 2), mask, 0.5, span_lengths=lengths)
        assert found.tolist() == [[-4e4, 6.0]]

    def test_expected_reward_is_minus_the_reverse_kl_and_not_scaled_by_default(self):
        q, p = torch.tensor([0.25, 0.75, 0.0]).log(), torch.tensor([0.5, 0.5, 0.0]).log()
        assert objectives.expected_rewards(p, q).item() == pytest.approx(-reverse_kl(q, p).item())
        assert objectives.expected_rewards(p, q, scale=0.5).item() == pytest.approx(-2 * reverse_kl(q, p).item())


class TestAdvantages:
    @pytest.mark.parametrize("normalize_each", [False, True])
    def test_two_completions_differ_by_their_sample_deviation(self, normalize_each: bool):
        """That of 1 and 3 is the root of 2. The third has no reward."""
        rewards = torch.tensor([[1.0], [3.0], [math.nan]], dtype=torch.float64)
        found = objectives.batch_advantages(rewards, torch.ones(1), normalize_each=normalize_each)
        expected = torch.tensor([-1.0, 1.0, 0.0], dtype=torch.float64) / math.sqrt(2)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=0)

    def test_functions_that_are_normalised_first_are_always_scaled(self):
        """As in GRPO, whatever `scale_rewards` says."""
        rewards, weights = torch.tensor([[1.0, 9.0], [2.0, 3.0], [6.0, 4.0]]), torch.tensor([1.0, 0.3])
        found, expected = (objectives.batch_advantages(rewards, weights, scale, True) for scale in (False, True))
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("value", [1e6 / 3, -1e7 / 7, 0.1])
    @pytest.mark.parametrize("count", [3, 7, 50])
    def test_equal_values_far_from_zero_stay_equal_and_finite(self, value: float, count: int):
        """The variance is a difference of large numbers, which rounding can make negative."""
        values, mask = torch.full((1, count), value, dtype=torch.float64), torch.ones(1, count, dtype=torch.bool)
        assert objectives.whiten(values, mask, masked_moments(values, mask)).abs().max() < 1e-2


class TestDivergences:
    def test_certain_teacher_adds_no_forward_kl_at_a_threshold_of_zero(self):
        """Its other probability is below float32's smallest number, so that the reverse KL is finite."""
        q, p = torch.log_softmax(torch.tensor([[1.0, 0.0], [200.0, 0.0]]), -1)
        assert reverse_kl(q, p).isfinite()
        assert entropy_aware_kl(q, p, 0.0).item() == reverse_kl(q, p).item()
        divergence = choose_divergence("entropy_aware_kl", teacher_entropy_threshold=0.0)
        found, _ = divergence_in_place(divergence, q[None], q.exp()[None], p[None].clone(), torch.tensor([0]))
        torch.testing.assert_close(found[0], reverse_kl(q, p))

    @pytest.mark.parametrize(
        ("name", "ends"), [("mixed_kl", (0.0, 1.0)), ("generalized_jsd", (1.0, 0.0))], ids=["mixed", "jsd"]
    )
    def test_term_without_weight_may_be_infinite(self, name: str, ends: tuple[float, float]):
        """Where the student excludes a token, the forward KL is infinite; where the teacher does, the reverse KL."""
        narrow, wide = torch.tensor([0.0, -math.inf]), torch.tensor([0.25, 0.75]).log()
        parameter = {"mixed_kl": "forward_kl_share", "generalized_jsd": "jsd_beta"}[name]
        for share, q, p in ((ends[0], narrow, wide), (ends[1], wide, narrow)):
            found = choose_divergence(name, **{parameter: share})(q, p)
            assert found.item() == pytest.approx(-math.log(0.25))

    @pytest.mark.parametrize(
        ("name", "parameter", "refused"),
        [
            ("mixed_kl", "forward_kl_share", (-0.1, 1.1, math.nan)),
            ("generalized_jsd", "jsd_beta", (-0.1, 1.1, math.nan)),
            ("skewed_forward_kl", "skew_alpha", (-0.1, 1.0, math.nan)),
            ("skewed_reverse_kl", "skew_alpha", (-0.1, 1.0, math.nan)),
            ("entropy_aware_kl", "teacher_entropy_threshold", (-0.1, math.nan)),
        ],
    )
    def test_parameters_are_refused_on_either_side_of_their_range(self, name: str, parameter: str, refused: tuple):
        q = torch.log_softmax(torch.tensor([1.0, 0.0]), -1)
        for value in refused:
            with pytest.raises(ValueError, match=parameter):
                choose_divergence(name, **{parameter: value})(q, q)

    def test_defaults_are_those_that_the_pages_name(self):
        q, p = (torch.log_softmax(torch.tensor(values), -1) for values in ([2.0, 0.0, 1.0], [0.0, 1.0, 2.0]))
        for function, parameter in (
            *((divergences.mixed_kl, 0.5), (divergences.generalized_jsd, 0.5), (divergences.skewed_forward_kl, 0.1)),
            *((divergences.skewed_reverse_kl, 0.1), (divergences.entropy_aware_kl, 0.8)),
        ):
            assert function(q, p) == function(q, p, parameter)
            in_place, _ = divergence_in_place(function, q[None], q.exp()[None], p[None].clone(), torch.tensor([0]))
            torch.testing.assert_close(in_place[0], function(q, p))
        entropy = torch.special.entr(p.exp()).sum().item()
        assert 0.8 < entropy < 1.6


class TestClip:
    def test_loss_clips_at_0_2_and_has_no_reference_model_by_default(self):
        logps = torch.tensor([[1.3, 0.7]]).log()
        rollout = dict.fromkeys(("old_per_token_logps", "student_logps", "ref_per_token_logps"), torch.zeros(1, 2))
        rollout |= {"advantages": torch.tensor([[1.0, -1.0]]), "long_term_weights": torch.ones(1, 2)}
        scores = TokenScores(logps, torch.zeros(1, 2), torch.zeros(1, 2))
        terms = loss_terms(
            rollout | {"single_step_weights": torch.zeros(1, 2)}, scores, torch.ones(1, 2, dtype=torch.bool)
        )
        torch.testing.assert_close(terms.loss, torch.tensor([[-1.2, 0.8]]))
        assert (terms.reference_kl > 0).all()

    def test_clipped_tokens_are_those_whose_long_term_has_no_gradient(self):
        """Three of the ratios lie on a bound, where PPO's clip has a slope."""
        logps = torch.tensor([0.1, 0.3, 0.7, 1.0, 1.2, 1.6, 2.0, 2.5, 8.0], dtype=torch.float64).log().repeat(2, 1)
        low, high, bound = logps.exp()[0, [2, 5, 7]].tolist()
        old, mask = torch.zeros_like(logps), torch.ones(2, 9, dtype=torch.bool)
        advantages = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 9)
        clip = {"epsilon": 1.0 - low, "epsilon_high": high - 1.0, "delta": bound}
        loss = objectives.clipped_policy_gradient_loss(logps.requires_grad_(), old, advantages, mask, **clip)
        expected = torch.autograd.grad(loss.sum(), logps)[0] == 0
        found = clipped_tokens(logps.detach(), old, old, advantages, mask, **clip)
        assert torch.equal(found.by_drift, expected)
        assert expected.sum(dim=1).tolist() == [3, 3]

    def test_estimate_of_the_reverse_kl_stands_in_where_no_distributions_are_compared(self):
        """As for a teacher with another tokenizer."""
        zeros, estimate = torch.zeros(1, 2), torch.tensor([[0.7, -0.2]])
        rollout = dict.fromkeys(("advantages", "old_per_token_logps", "student_logps"), zeros)
        rollout |= {"long_term_weights": zeros, "single_step_weights": zeros, "sampled_reverse_kl": estimate}
        terms = loss_terms(
            rollout,
            TokenScores(zeros, zeros, None),
            torch.ones(1, 2, dtype=torch.bool),
            single_step_decomposition=False,
        )
        assert torch.equal(terms.reverse_kl, estimate)
        assert terms.single_step is None


class TestPositions:
    def test_discrepancy_without_amplification_changes_no_weight(self):
        rewards = torch.tensor([[1.0, -2.0]])
        assert prefix_discrepancy_weights(rewards, torch.ones(1, 2, dtype=torch.bool), 0.0).tolist() == [[1.0, 1.0]]

    def test_weight_is_one_between_the_turns_of_a_completion(self):
        mask = torch.tensor([[True, False, True]])
        weights = prefix_discrepancy_weights(torch.tensor([[1.0, 5.0, 3.0]]), mask, 0.5)
        torch.testing.assert_close(weights, torch.tensor([[1.5, 1.0, 1.375]]))

    def test_weights_stay_in_their_range_whatever_the_rounding(self):
        rewards = torch.randn(300, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        rewards[:, 30:] = 0.0
        weights = prefix_discrepancy_weights(rewards, torch.ones(300, 40, dtype=torch.bool), 100.0)
        assert (weights[:, 30:] - 1.0).abs().max() < 1e-12
        assert weights.min() >= 1.0

    @pytest.mark.parametrize(
        "function",
        [lambda x, m: prefix_discrepancy_weights(x, m, 0.5), lambda x, m: top_entropy_weights(x, m, 0.5)],
    )
    def test_weights_have_no_gradient(self, function):
        values = torch.rand(2, 3, requires_grad=True)
        assert not function(values, torch.ones(2, 3, dtype=torch.bool)).requires_grad
