"""Closed forms of each objective, by hand."""

import math

import pytest
import torch

from minillm_trl import objectives
from minillm_trl.masking import completion_mask, masked_mean, masked_sum, reduce_loss

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

    def test_epsilon_of_zero_is_refused(self):
        one = torch.ones(1, 1)
        with pytest.raises(ValueError, match="epsilon must be positive"):
            objectives.clipped_policy_gradient_loss(one, one, one, one.bool(), 0.0)


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


class TestMasking:
    def test_completion_mask_includes_the_first_end_of_any_kind(self):
        ids = torch.tensor([[5, 2, 5, 2], [3, 5, 5, 5], [5, 5, 5, 5]])
        expected = [[True, True, False, False], [True, False, False, False], [True] * 4]
        assert completion_mask(ids, [2, 3]).tolist() == expected

    def test_masked_reductions_ignore_what_stands_on_padding(self):
        values = torch.tensor([[1.0, 3.0, NAN], [math.inf, NAN, NAN]])
        mask = torch.tensor([[True, True, False], [False, False, False]])
        assert masked_sum(values, mask).item() == 4.0
        assert masked_mean(values, mask).item() == 2.0
        assert masked_mean(values, mask, dim=1).tolist() == [2.0, 0.0]

    def test_reduce_loss_of_no_tokens_is_zero_with_zero_gradient(self):
        loss = torch.full((2, 3), NAN, requires_grad=True)
        value = reduce_loss(loss, torch.zeros(2, 3, dtype=torch.bool), torch.tensor(0))
        assert value.item() == 0.0
        assert torch.autograd.grad(value, loss)[0].tolist() == [[0.0] * 3] * 2
