"""Closed forms of each objective, by hand."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minillm_trl import objectives
from minillm_trl.masking import completion_mask, masked_mean, masked_moments, masked_sum, normalize_loss

MASK = torch.tensor([[True, True, True, True, False], [True, True, False, False, False]])
NAN = float("nan")


class TestRewardToGo:
    REWARDS = torch.tensor([[1.0, 2.0, 3.0, 4.0, 99.0], [5.0, 6.0, NAN, math.inf, 99.0]], dtype=torch.float64)

    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({"length_normalization": False}, [[9, 7, 4, 0, 0], [6, 0, 0, 0, 0]]),
            ({"length_normalization": False, "include_current": True}, [[10, 9, 7, 4, 0], [11, 6, 0, 0, 0]]),
            ({}, [[3, 3.5, 4, 0, 0], [6, 0, 0, 0, 0]]),
            ({"include_current": True}, [[2.5, 3, 3.5, 4, 0], [5.5, 6, 0, 0, 0]]),
            ({"gamma": 0.5, "length_normalization": False}, [[4.5, 5, 4, 0, 0], [6, 0, 0, 0, 0]]),
            ({"gamma": 0.5}, [[4.5 / 1.75, 5 / 1.5, 4, 0, 0], [6, 0, 0, 0, 0]]),
            ({"gamma": 0.5, "discounted_length": False}, [[4.5 / 3, 5 / 2, 4, 0, 0], [6, 0, 0, 0, 0]]),
            (
                {"gamma": 0.5, "discounted_length": False, "include_current": True},
                [[3.25 / 4, 4.5 / 3, 5 / 2, 4, 0], [8 / 2, 6, 0, 0, 0]],
            ),
            ({"gamma": 0.0}, [[2, 3, 4, 0, 0], [6, 0, 0, 0, 0]]),
            ({"gamma": 0.0, "include_current": True}, [[1, 2, 3, 4, 0], [5, 6, 0, 0, 0]]),
        ],
    )
    def test_value_equals_hand_computed_return(self, options: dict, expected: list):
        rewards = self.REWARDS.masked_fill(~MASK, 7.0)
        actual = objectives.reward_to_go(rewards, MASK, **options)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))

    def test_padding_never_reaches_the_return(self):
        actual = objectives.reward_to_go(self.REWARDS, MASK)
        torch.testing.assert_close(actual[1], torch.tensor([6.0, 0, 0, 0, 0], dtype=torch.float64))

    def test_discount_counts_from_the_current_token_on_long_completions(self):
        # gamma by absolute position underflows here, and its normaliser gives 0 / 0
        rewards = torch.ones(1, 512)
        actual = objectives.reward_to_go(rewards, torch.ones_like(rewards, dtype=torch.bool), gamma=0.5)
        torch.testing.assert_close(actual[:, :-1], torch.ones(1, 511))

    @pytest.mark.parametrize("options", [{}, {"length_normalization": False}, {"discounted_length": False}], ids=str)
    @pytest.mark.parametrize("include_current", [False, True])
    @pytest.mark.parametrize("gamma", [0.0, 0.3, 0.99, 1.0])
    @pytest.mark.parametrize("length", [0, 1, 2, 7, 64, 65])
    def test_value_equals_the_sum_written_out(self, length: int, gamma: float, include_current: bool, options: dict):
        generator = torch.Generator().manual_seed(length)
        rewards = torch.randn(3, length, generator=generator, dtype=torch.float64)
        mask = torch.rand(3, length, generator=generator) < 0.7  # with holes, as tools leave them
        first = 0 if include_current else 1
        expected = torch.zeros_like(rewards)
        for row, t in mask.nonzero().tolist():
            counted = [i for i in range(t + first, length) if mask[row, i]]
            weights = {i: gamma ** (i - t - first) for i in counted}
            total = math.fsum(weights[i] * rewards[row, i].item() for i in counted)
            if options.get("length_normalization", True):
                norm = math.fsum(weights.values()) if options.get("discounted_length", True) else len(counted)
                total = total / norm if norm else total
            expected[row, t] = total
        options = {"gamma": gamma, "include_current": include_current, **options}
        actual = objectives.reward_to_go(rewards, mask, **options)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        in_float32 = objectives.reward_to_go(rewards.float(), mask, **options)
        torch.testing.assert_close(in_float32, expected.float(), rtol=1e-5, atol=1e-5)

    def test_memory_grows_with_the_length_and_not_with_its_square(self):
        sizes = []

        class Recorder(TorchDispatchMode):
            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
                return result

        with Recorder():
            objectives.reward_to_go(torch.ones(2, 512), torch.ones(2, 512, dtype=torch.bool), gamma=0.9)
        assert 2 * 512 <= max(sizes) < 3 * 512

    def test_return_carries_no_gradient(self):
        rewards = torch.ones(1, 3, requires_grad=True)
        assert not objectives.reward_to_go(rewards, torch.ones(1, 3, dtype=torch.bool)).requires_grad

    def test_gamma_outside_the_unit_interval_is_refused(self):
        with pytest.raises(ValueError, match=r"gamma must lie in \[0, 1\], got 1.5"):
            objectives.reward_to_go(self.REWARDS, MASK, gamma=1.5)


class TestTokenRewards:
    def test_value_is_the_log_ratio_without_gradient(self):
        teacher = torch.tensor([[-1.0, -2.0]], requires_grad=True)
        student = torch.tensor([[-3.0, -0.5]], requires_grad=True)
        rewards = objectives.token_rewards(teacher, student, torch.tensor([[True, True]]))
        torch.testing.assert_close(rewards, torch.tensor([[2.0, -1.5]]))
        assert not rewards.requires_grad

    def test_impossible_token_costs_infinity_and_padding_nothing(self):
        teacher = torch.tensor([[-math.inf, -math.inf]])
        rewards = objectives.token_rewards(teacher, torch.tensor([[-1.0, -1.0]]), torch.tensor([[True, False]]))
        assert rewards.tolist() == [[-math.inf, 0.0]]

    def test_scale_divides_and_clip_bounds_what_was_scaled(self):
        teacher, student = torch.tensor([[1.0, -3.0, 9.0]]), torch.zeros(1, 3)
        rewards = objectives.token_rewards(teacher, student, torch.ones(1, 3, dtype=torch.bool), scale=0.5, clip=5.0)
        assert rewards.tolist() == [[2.0, -5.0, 5.0]]

    def test_clip_bounds_the_mean_over_the_tokens_of_a_span(self):
        teacher, lengths = torch.tensor([[8.0, -8.0, 8.0, -8.0]]), torch.tensor([[1, 2, 3, 4]])
        everywhere = torch.ones(1, 4, dtype=torch.bool)
        options = {"scale": 0.5, "clip": 5.0, "span_lengths": lengths}
        rewards = objectives.token_rewards(teacher, torch.zeros(1, 4), everywhere, **options)
        assert rewards.tolist() == [[5.0, -10.0, 15.0, -16.0]]

    @pytest.mark.parametrize("options", [{"scale": 0.0}, {"clip": 0.0}])
    def test_scale_and_clip_of_zero_are_refused(self, options: dict):
        one = torch.ones(1, 1)
        with pytest.raises(ValueError, match="scale and clip must be positive"):
            objectives.token_rewards(one, one, one.bool(), **options)


class TestImportanceWeights:
    STUDENT = torch.tensor([[0.5, 0.2, 0.8, 0.3]]).log()
    BEHAVIOR = torch.tensor([[0.4, 0.4, 0.5, 0.9]]).log()
    MASK = torch.tensor([[True, True, True, False]])  # w = 1.25, 0.5, 1.6

    @pytest.mark.parametrize(
        ("level", "long_term", "single_step"),
        [
            ("token", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
            ("decoupled", [1.25, 0.5, 1.6], [1.0, 1.0, 1.0]),
            ("prefix", [1.25, 0.625, 1.0], [1.0, 1.25, 0.625]),
            ("sequence", [1.0, 1.0, 1.0], [1.0, 1.0, 1.0]),
        ],
    )
    def test_values_are_the_products_of_the_table(self, level: str, long_term: list, single_step: list):
        actual = objectives.importance_weights(self.STUDENT, self.BEHAVIOR, self.MASK, level)
        for weights, expected in zip(actual, (long_term, single_step), strict=True):
            torch.testing.assert_close(weights[:, :3], torch.tensor([expected]))
            assert not weights.requires_grad

    def test_sequence_weight_leaves_padding_out(self):
        mask = torch.tensor([[True, True, False, False]])
        weights, _ = objectives.importance_weights(self.STUDENT, self.BEHAVIOR, mask, "sequence")
        torch.testing.assert_close(weights, torch.full((1, 4), 0.625))

    def test_cap_bounds_the_product(self):
        weights, single = objectives.importance_weights(self.STUDENT, self.BEHAVIOR, self.MASK, "prefix", cap=0.9)
        torch.testing.assert_close(weights[:, :3], torch.tensor([[0.9, 0.625, 0.9]]))
        torch.testing.assert_close(single[:, :3], torch.tensor([[0.9, 0.9, 0.625]]))

    def test_long_products_are_formed_in_double_precision(self):
        student = torch.tensor([[0.5] * 2000 + [-0.5] * 2000])  # e^1000 on the way
        weights, _ = objectives.importance_weights(
            student, torch.zeros_like(student), torch.ones_like(student).bool(), "sequence"
        )
        torch.testing.assert_close(weights, torch.ones_like(student))

    @pytest.mark.parametrize(("level", "cap"), [("exact", None), ("prefix", 0.0)])
    def test_unknown_level_and_cap_of_zero_are_refused(self, level: str, cap):
        with pytest.raises(ValueError, match="must be"):
            objectives.importance_weights(self.STUDENT, self.BEHAVIOR, self.MASK, level, cap)


class TestWhiten:
    VALUES = torch.tensor([[1.0, 2.0, NAN], [6.0, NAN, NAN]])
    MASK = torch.tensor([[True, True, False], [True, False, False]])

    def test_mean_and_variance_are_those_of_the_tokens(self):
        whitened = objectives.whiten(self.VALUES, self.MASK, masked_moments(self.VALUES, self.MASK))
        expected = (torch.tensor([1.0, 2.0, 6.0]) - 3.0) / math.sqrt((4 + 1 + 9) / 3)
        torch.testing.assert_close(whitened[self.MASK], expected)
        assert (whitened[~self.MASK] == 0).all()

    def test_surplus_count_stands_for_zeros(self):
        moments = masked_moments(self.VALUES, self.MASK)
        moments[0] = 10
        padded = torch.tensor([1.0, 2.0, 6.0] + [0.0] * 7)
        expected = (padded - padded.mean()) / padded.std(correction=0)
        torch.testing.assert_close(objectives.whiten(self.VALUES, self.MASK, moments)[self.MASK], expected[:3])

    def test_moments_of_processes_add_up(self):
        parts = [masked_moments(self.VALUES[i : i + 1], self.MASK[i : i + 1]) for i in range(2)]
        torch.testing.assert_close(sum(parts), masked_moments(self.VALUES, self.MASK))

    def test_value_of_a_single_token_becomes_zero(self):
        values, mask = torch.tensor([[3.0, NAN]]), torch.tensor([[True, False]])
        assert objectives.whiten(values, mask, masked_moments(values, mask)).tolist() == [[0.0, 0.0]]

    def test_equal_values_become_zero(self):
        values = torch.full((2, 3), 0.1)
        mask = torch.ones(2, 3, dtype=torch.bool)
        whitened = objectives.whiten(values, mask, masked_moments(values, mask))
        assert whitened.abs().max() < 1e-3

    def test_values_far_from_zero_keep_their_differences(self):
        values = torch.tensor([[4096.0, 4096.25, 4097.125]])
        mask = torch.ones(1, 3, dtype=torch.bool)
        expected = values.double() - values.double().mean()
        expected = (expected / expected.square().mean().sqrt()).float()
        whitened = objectives.whiten(values, mask, masked_moments(values, mask))
        torch.testing.assert_close(whitened, expected, rtol=1e-5, atol=0.0)


class TestBatchAdvantages:
    REWARDS = torch.tensor([[1.0, 10.0], [3.0, NAN], [NAN, NAN], [5.0, 30.0]])
    WEIGHTS = torch.tensor([1.0, 0.1])

    def test_rewards_are_weighed_added_and_compared_with_the_batch(self):
        advantages = objectives.batch_advantages(self.REWARDS, self.WEIGHTS, scale=False)
        totals = torch.tensor([2.0, 3.0, 8.0])
        torch.testing.assert_close(advantages[[0, 1, 3]], totals - totals.mean())
        assert advantages[2] == 0.0

    def test_scaling_divides_by_the_standard_deviation(self):
        advantages = objectives.batch_advantages(self.REWARDS, self.WEIGHTS)
        totals = torch.tensor([2.0, 3.0, 8.0])
        torch.testing.assert_close(advantages[[0, 1, 3]], (totals - totals.mean()) / (totals.std() + 1e-4))

    def test_each_function_may_be_normalised_first(self):
        rewards = torch.tensor([[1.0, 100.0], [2.0, 300.0], [6.0, 200.0]])
        each = (rewards - rewards.mean(0)) / (rewards.std(0) + 1e-4)
        total = (each * self.WEIGHTS).sum(1)
        expected = (total - total.mean()) / (total.std() + 1e-4)
        torch.testing.assert_close(objectives.batch_advantages(rewards, self.WEIGHTS, normalize_each=True), expected)

    def test_single_completion_has_no_advantage(self):
        assert objectives.batch_advantages(torch.tensor([[3.0]]), torch.ones(1)).tolist() == [0.0]


class TestReplaceByGroupMean:
    def test_leaves_the_mean_of_a_group_to_the_others(self):
        rewards = torch.tensor(
            [[1.0, 1.0], [math.inf, 2.0], [3.0, NAN], [4.0, -math.inf], [5.0, 6.0], [math.inf, 7.0]]
        )
        expected = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, NAN], [4.0, 6.5], [5.0, 6.0], [4.5, 7.0]])
        found = objectives.replace_by_group_mean(rewards, rewards.isinf(), 3)
        torch.testing.assert_close(found, expected, equal_nan=True)

    @pytest.mark.parametrize("size", [1, 2])
    def test_is_nan_where_no_other_is_left(self, size: int):
        rewards = torch.tensor([[math.inf], [-math.inf]])
        assert objectives.replace_by_group_mean(rewards, rewards.isinf(), size).isnan().all()


class TestMixtureLogps:
    def test_value_is_the_log_of_the_mixture(self):
        student, teacher = torch.tensor([0.5, 0.1]).log(), torch.tensor([0.25, 0.9]).log()
        actual = objectives.mixture_logps(student, teacher, 0.2).exp()
        torch.testing.assert_close(actual, torch.tensor([0.45, 0.26]))

    @pytest.mark.parametrize(("alpha", "expected"), [(0.0, -1.0), (1.0, -math.inf)])
    def test_ends_of_the_range_are_one_model_alone(self, alpha: float, expected: float):
        actual = objectives.mixture_logps(torch.tensor([-1.0]), torch.tensor([-math.inf]), alpha)
        assert actual.tolist() == [expected]

    @pytest.mark.parametrize("alpha", [-0.1, 1.1])
    def test_alpha_outside_the_unit_interval_is_refused(self, alpha: float):
        with pytest.raises(ValueError, match="alpha must lie in"):
            objectives.mixture_logps(torch.zeros(1), torch.zeros(1), alpha)


class TestClippedPolicyGradientLoss:
    def loss(self, ratios: list, advantages: list, mask: list | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        logps = torch.tensor([ratios]).log().requires_grad_()
        mask = torch.tensor([mask or [True] * len(ratios)])
        values = objectives.clipped_policy_gradient_loss(
            logps, torch.zeros_like(logps), torch.tensor([advantages]), mask, 0.2
        )
        return values[0], torch.autograd.grad(values.sum(), logps)[0][0]

    def test_inside_the_range_the_gradient_is_ratio_times_advantage(self):
        values, gradient = self.loss([1.0, 1.1, 0.9], [2.0, -3.0, 4.0])
        torch.testing.assert_close(values, torch.tensor([-2.0, 3.3, -3.6]))
        torch.testing.assert_close(gradient, values)

    def test_outside_the_range_only_the_pessimistic_side_moves(self):
        values, gradient = self.loss([1.5, 1.5, 0.5, 0.5], [1.0, -1.0, 1.0, -1.0])
        torch.testing.assert_close(values, torch.tensor([-1.2, 1.5, -0.5, 0.8]))
        torch.testing.assert_close(gradient, torch.tensor([0.0, 1.5, -0.5, 0.0]))

    def test_teacher_mixing_clips_at_the_first_pass(self):
        # q / mu reaches 1 / (1 - alpha) = 1.25 where the teacher gives a token nothing
        behavior = objectives.mixture_logps(torch.zeros(1, 1), torch.full((1, 1), -math.inf), 0.2)
        logps = torch.zeros(1, 1, requires_grad=True)
        loss = objectives.clipped_policy_gradient_loss(
            logps, behavior, torch.ones(1, 1), torch.ones(1, 1, dtype=torch.bool), 0.2
        )
        assert loss.item() == pytest.approx(-1.2)
        assert torch.autograd.grad(loss.sum(), logps)[0].item() == 0.0

    def test_padding_has_neither_value_nor_gradient(self):
        logps = torch.tensor([[0.0, NAN, math.inf]], requires_grad=True)
        mask = torch.tensor([[True, False, False]])
        values = objectives.clipped_policy_gradient_loss(
            logps, torch.tensor([[0.0, NAN, -math.inf]]), torch.tensor([[1.0, NAN, math.inf]]), mask, 0.2
        )
        assert values.tolist() == [[-1.0, 0.0, 0.0]]
        assert torch.autograd.grad(values.sum(), logps)[0].tolist() == [[-1.0, 0.0, 0.0]]

    def test_upper_half_of_the_range_may_be_another(self):
        logps = torch.tensor([[1.5, 1.5]]).log()
        old, advantages, mask = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
        loss = objectives.clipped_policy_gradient_loss(logps, old, advantages, mask, 0.2, epsilon_high=0.4)
        torch.testing.assert_close(loss, torch.tensor([[-1.4, 1.5]]))

    def test_delta_bounds_the_ratio_at_negative_advantages(self):
        logps = torch.tensor([[9.0, 9.0]]).log().requires_grad_()
        old, advantages, mask = torch.zeros(1, 2), torch.tensor([[1.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
        loss = objectives.clipped_policy_gradient_loss(logps, old, advantages, mask, 0.2, delta=3.0)
        torch.testing.assert_close(loss, torch.tensor([[-1.2, 3.0]]))
        assert torch.autograd.grad(loss.sum(), logps)[0].tolist() == [[0.0, 0.0]]

    def test_delta_inside_the_range_is_refused(self):
        one = torch.ones(1, 1)
        with pytest.raises(ValueError, match="delta must be above"):
            objectives.clipped_policy_gradient_loss(one, one, one, one.bool(), 0.2, delta=1.2)

    @pytest.mark.parametrize(("low", "high"), [(0.0, None), (0.0, 0.2), (0.2, 0.0)])
    def test_epsilon_of_zero_is_refused(self, low: float, high: float | None):
        one = torch.ones(1, 1)
        with pytest.raises(ValueError, match="epsilon must be positive"):
            objectives.clipped_policy_gradient_loss(one, one, one, one.bool(), low, high)


@pytest.mark.parametrize(
    ("function", "trained"),
    [
        pytest.param(lambda q, p, mask: objectives.token_rewards(q, p, mask), 0, id="rewards"),
        pytest.param(lambda rewards, _, mask: objectives.reward_to_go(rewards, mask), 0, id="returns"),
        *(
            pytest.param(
                lambda q, p, mask, alpha=alpha: objectives.mixture_logps(q, p, alpha), 0, id=f"mixture {alpha}"
            )
            for alpha in (0.0, 0.5, 1.0)
        ),
        pytest.param(lambda q, mu, mask: objectives.importance_weights(q, mu, mask, "prefix")[0], 0, id="weights"),
        pytest.param(lambda values, _, mask: objectives.whiten(values, mask, torch.ones(3)), 0, id="whitening"),
        pytest.param(lambda rewards, _, mask: objectives.batch_advantages(rewards, torch.ones(3)), 0, id="advantages"),
        pytest.param(
            lambda q, mu, mask: objectives.clipped_policy_gradient_loss(q, mu, torch.ones(2, 3), mask, 0.2),
            1,
            id="behavior policy",
        ),
        pytest.param(
            lambda q, advantages, mask: objectives.clipped_policy_gradient_loss(q, q.detach(), advantages, mask, 0.2),
            1,
            id="advantages of the clipped loss",
        ),
        pytest.param(lambda q, p, mask: objectives.reverse_kl(q, p), 1, id="reverse KL"),
        pytest.param(lambda q, p, mask: objectives.forward_kl(q, p), 1, id="forward KL"),
        pytest.param(lambda q, p, mask: objectives.reference_kl(q, p, mask), 1, id="reference KL"),
    ],
)
def test_gradient_reaches_the_student_alone(function, trained: int):
    """The first `trained` of the two inputs."""
    inputs = [torch.log_softmax(torch.arange(6.0).view(2, 3) * scale, -1).requires_grad_() for scale in (1, 2)]
    result = function(*inputs, torch.ones(2, 3, dtype=torch.bool)).sum()
    reached = [False, False]
    if result.requires_grad:
        gradients = torch.autograd.grad(result, inputs, allow_unused=True)
        reached = [gradient is not None for gradient in gradients]
    assert reached == [index < trained for index in range(2)]


class TestReverseKL:
    def test_value_equals_the_sum_by_hand(self):
        student, teacher = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        expected = 0.5 * math.log(0.5 / 0.9) + 0.5 * math.log(0.5 / 0.1)
        assert objectives.reverse_kl(student.log(), teacher.log()).item() == pytest.approx(expected)

    def test_tokens_without_student_mass_add_nothing(self):
        student = torch.tensor([0.0, -math.inf], requires_grad=True)
        value = objectives.reverse_kl(student, torch.tensor([0.5, 0.5]).log())
        assert value.item() == pytest.approx(math.log(2))
        assert torch.autograd.grad(value, student)[0].isfinite().all()

    def test_token_impossible_for_the_teacher_is_infinite(self):
        value = objectives.reverse_kl(torch.tensor([0.5, 0.5]).log(), torch.tensor([0.0, -math.inf]))
        assert value.item() == math.inf

    def test_no_gradient_reaches_the_teacher(self):
        teacher = torch.log_softmax(torch.zeros(3), 0).requires_grad_()
        assert not objectives.reverse_kl(torch.log_softmax(torch.ones(3), 0), teacher).requires_grad

    def test_gradient_is_zero_at_the_teacher(self):
        logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
        log_probs = torch.log_softmax(logits, 0)
        gradient = torch.autograd.grad(objectives.reverse_kl(log_probs, log_probs), logits)[0]
        assert gradient.abs().max() < 1e-15


class TestForwardKL:
    def test_value_equals_the_sum_by_hand(self):
        student, teacher = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
        expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
        assert objectives.forward_kl(student.log(), teacher.log()).item() == pytest.approx(expected)

    def test_gradient_is_that_of_the_cross_entropy_to_the_teacher(self):
        logits = torch.randn(5, dtype=torch.float64, requires_grad=True)
        teacher = torch.softmax(torch.randn(5, dtype=torch.float64), 0)
        log_probs = torch.log_softmax(logits, 0)
        actual = torch.autograd.grad(objectives.forward_kl(log_probs, teacher.log()), logits, retain_graph=True)[0]
        expected = torch.autograd.grad(-(teacher * log_probs).sum(), logits)[0]
        torch.testing.assert_close(actual, expected)

    def test_tokens_without_teacher_mass_add_nothing(self):
        student = torch.tensor([0.5, 0.5]).log().requires_grad_()
        value = objectives.forward_kl(student, torch.tensor([0.0, -math.inf]))
        assert value.item() == pytest.approx(math.log(2))
        assert torch.autograd.grad(value, student)[0].isfinite().all()


class TestReferenceKL:
    def test_expectation_under_the_student_is_the_kl(self):
        student, reference = (torch.softmax(torch.randn(7, dtype=torch.float64), 0) for _ in range(2))
        estimates = objectives.reference_kl(student.log(), reference.log(), torch.ones(7, dtype=torch.bool))
        assert (estimates >= 0).all()
        expected = (student * (student / reference).log()).sum()
        assert (student * estimates).sum().item() == pytest.approx(expected.item())

    def test_padding_has_neither_value_nor_gradient(self):
        logps = torch.tensor([[0.0, NAN]], requires_grad=True)
        value = objectives.reference_kl(logps, torch.tensor([[0.1, NAN]]), torch.tensor([[True, False]]))
        assert value[0, 1] == 0.0
        assert torch.autograd.grad(value.sum(), logps)[0].isfinite().all()


class TestLanguageModelingLoss:
    def test_share_of_the_divergence_is_the_ratio(self):
        logps, kl = torch.tensor([-2.0]), torch.tensor([1.0])
        assert objectives.language_modeling_loss(logps).item() == 2.0
        assert objectives.language_modeling_loss(logps, kl, 0.25).item() == 1.75

    @pytest.mark.parametrize(("ratio", "message"), [(1.5, "must lie in"), (0.5, "requires forward_kl")])
    def test_ratio_without_meaning_is_refused(self, ratio: float, message: str):
        with pytest.raises(ValueError, match=message):
            objectives.language_modeling_loss(torch.zeros(1), None, ratio)


class TestMasking:
    def test_completion_mask_includes_the_first_end_of_any_kind(self):
        ids = torch.tensor([[5, 2, 5, 2], [3, 5, 5, 5], [5, 5, 5, 5]])
        expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
        assert completion_mask(ids, [2, 3]).tolist() == expected

    def test_masked_reductions_ignore_what_stands_on_padding(self):
        values = torch.tensor([[1.0, 3.0, NAN], [math.inf, NAN, NAN], [5.0, math.inf, NAN]])
        mask = torch.tensor([[True, True, False], [False, False, False], [True, False, False]])
        assert masked_sum(values, mask).item() == 9.0
        assert masked_mean(values, mask).item() == 3.0
        assert masked_mean(values, mask, dim=1).tolist() == [2.0, 0.0, 5.0]

    def test_loss_is_divided_and_that_of_no_tokens_stays_zero(self):
        total = torch.tensor(6.0, requires_grad=True)
        assert normalize_loss(total, torch.tensor(4)).item() == 1.5
        assert normalize_loss(0.0 * total, torch.tensor(0)).item() == 0.0
