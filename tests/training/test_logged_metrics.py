"""Metrics of the loss and of completions against sums over tokens by hand, in any split into micro-batches."""

import math
from typing import Any

import pytest
import torch

from minillm_trl.loss import ClippedTokens, LossTerms
from minillm_trl.training.logged_metrics import (
    Totals,
    baseline_totals,
    completion_sums,
    completion_totals,
    degeneration_indicators,
    gradient_totals,
    loss_totals,
    make_totals,
    metric_means,
    reward_metrics,
    rouge_l_to_references,
    teacher_totals,
    token_totals,
)

LARGE = 2.0**24  # float32 cannot add 1 to it
MASK = torch.tensor([[True, True, False], [True, False, False], [True, True, True], [False, False, False]])
PER_TOKEN = ("long_term", "single_step", "reverse_kl", "reference_kl")


def terms_of(shape: torch.Size, seed: int = 0, **others: Any) -> LossTerms:
    """Random terms with a gradient, in float32."""
    torch.manual_seed(seed)
    names = ("loss", *PER_TOKEN, "weights")
    values = {name: torch.rand(shape).requires_grad_() for name in names}
    clipped = ClippedTokens(*(torch.rand(shape) < 0.5 for _ in range(2)))
    return LossTerms(**{**values, "clipped": clipped, **others})


def part(terms: LossTerms, rows: slice) -> LossTerms:
    """The terms of some rows."""
    clipped = ClippedTokens(*(masks[rows] for masks in terms.clipped))
    return LossTerms(*(None if values is None else values[rows] for values in terms[:-1]), clipped)


def means(*parts: Totals) -> dict[str, float]:
    assert not any(each.values.requires_grad for each in parts)  # a graph would stay in memory until the next log
    assert {each.values.dtype for each in parts} == {torch.float64}
    return metric_means(parts[0].names, torch.stack([each.values for each in parts]))


class TestLoss:
    def of(self, terms: LossTerms, mask: torch.Tensor, rows: list[int], **others: torch.Tensor) -> dict[str, float]:
        """The metrics of rows in two micro-batches, with some rows that count."""
        per_token = {"entropy": torch.ones(mask.shape), "advantages": torch.ones(mask.shape), **others}
        halves = (slice(0, 2), slice(2, None))
        return means(
            *(
                loss_totals(
                    part(terms, half),
                    mask=mask[half],
                    rows=number,
                    **{name: values[half] for name, values in per_token.items()},
                )
                for half, number in zip(halves, rows, strict=True)
            )
        )

    def test_values_are_means_over_all_tokens(self):
        terms = terms_of(MASK.shape)
        with torch.no_grad():
            for values in terms[:-1]:  # what stands outside the mask does not count
                values[~MASK] = 1e9
        entropy, advantages = torch.rand(2, *MASK.shape, dtype=torch.float64)
        found = self.of(terms, MASK, [2, 1], entropy=entropy, advantages=advantages)
        mixing, drift = terms.clipped
        weights = terms.weights[MASK]
        expected = {
            "objective/long_term": terms.long_term[MASK].mean(),
            "objective/single_step": terms.single_step[MASK].mean(),
            "objective/reverse_kl_per_token": terms.reverse_kl[MASK].mean(),
            "objective/reverse_kl": terms.reverse_kl[MASK].sum() / 3,  # by completion
            "objective/advantage": advantages[MASK].mean(),
            "entropy": entropy[MASK].mean(),
            "kl": terms.reference_kl[MASK].mean(),
            "clip_ratio/mixing": mixing.sum() / 6,  # the loss clips no other tokens
            "clip_ratio/drift": drift.sum() / 6,
            "importance_weight/mean": weights.mean(),
            "importance_weight/max": weights.max(),
            "importance_weight/effective_sample_size": weights.mean() ** 2 / weights.square().mean(),
        }
        assert found == pytest.approx({name: value.item() for name, value in expected.items()}, rel=1e-6)

    def test_terms_that_a_run_does_not_have_are_left_out(self):
        found = self.of(terms_of(MASK.shape, single_step=None, reference_kl=None), MASK, [2, 1])
        assert "kl" not in found
        assert "objective/single_step" not in found

    def test_sums_of_many_tokens_are_exact(self):
        values = torch.tensor([[LARGE, 1.0]], requires_grad=True)
        mask = torch.ones(1, 2, dtype=torch.bool)
        terms = terms_of(mask.shape, **dict.fromkeys((*PER_TOKEN, "weights"), values))
        found = means(loss_totals(terms, values, values, mask, 1))
        names = ("objective/long_term", "objective/single_step", "objective/advantage", "entropy", "kl")
        for name in (*names, "objective/reverse_kl_per_token", "importance_weight/mean"):
            assert found[name] == (LARGE + 1) / 2
        assert found["objective/reverse_kl"] == LARGE + 1
        assert means(token_totals({"loss": values}, mask)) == {"loss": (LARGE + 1) / 2}
        of_teachers = means(teacher_totals(terms, mask, torch.tensor([0]), None, ["a"]))
        assert set(of_teachers.values()) == {LARGE + 1, (LARGE + 1) / 2}
        sums = completion_sums(values, mask, torch.tensor([True]))
        assert sums.tolist() == [LARGE + 1]
        assert not sums.requires_grad
        rows = torch.tensor([True, True])
        of_rows = means(completion_totals(values[0].long(), rows, {"rouge_l": [LARGE, 1.0]}, rows))
        assert of_rows["rouge_l"] == of_rows["completions/mean_length"] == (LARGE + 1) / 2
        assert means(make_totals({"count": (int(LARGE) + 1, 2)}, mask.device)) == {"count": (LARGE + 1) / 2}

    def test_without_weights_every_sample_is_effective(self):
        terms = terms_of(MASK.shape, weights=torch.zeros(MASK.shape))
        assert self.of(terms, MASK, [2, 1])["importance_weight/effective_sample_size"] == 1.0


class TestTeachers:
    INDEX = torch.tensor([0, 1, 0, 1])

    @pytest.mark.parametrize("counts", [None, torch.tensor([True, True, False, True])])
    def test_values_are_means_over_the_rows_of_each_teacher(self, counts: torch.Tensor | None):
        terms = terms_of(MASK.shape)
        halves = (slice(0, 3), slice(3, 4))
        found = means(
            *(
                teacher_totals(
                    part(terms, half), MASK[half], self.INDEX[half], None if counts is None else counts[half], "ab"
                )
                for half in halves
            )
        )
        for number, name in enumerate("ab"):
            own = number == self.INDEX
            rows = own if counts is None else own & counts
            tokens = MASK & own[:, None]
            expected = {
                f"objective/reverse_kl/{name}": terms.reverse_kl[tokens].sum() / rows.sum(),
                f"objective/reverse_kl_per_token/{name}": terms.reverse_kl[tokens].mean(),
                f"objective/single_step/{name}": terms.single_step[tokens].mean(),
            }
            for metric, value in expected.items():
                assert found.pop(metric) == pytest.approx(value.item(), rel=1e-6)
        assert found == {}

    def test_teacher_without_rows_has_no_metrics(self):
        found = means(teacher_totals(terms_of(MASK.shape), MASK, 0 * self.INDEX, None, "ab"))
        assert sorted(found) == [
            f"objective/{name}/a" for name in ("reverse_kl", "reverse_kl_per_token", "single_step")
        ]


def test_indicators_of_degeneration_are_of_each_completion():
    found = degeneration_indicators([[5, 1, 0], [0, 7], [], [9], [4] * 6, [4] * 4 + [2, 3]], [0, 9])
    assert found == {
        "rollout/eos_rate": [1.0, 0.0, 0.0, 1.0, 0.0, 0.0],
        "rollout/repeated_4grams": [0.0, 0.0, 0.0, 0.0, pytest.approx(2 / 3), 0.0],
    }


def test_row_without_an_answer_has_no_rouge_l():
    rows = [{}, {"references": [], "completion": ""}, {"references": None, "completion": "a pub"}]
    scores = rouge_l_to_references(["a pub"] * 3, rows)
    assert [math.isnan(score) for score in scores] == [True, True, False]
    assert scores[2] == 100.0


def of_completions(lengths: list[int], counts: list[bool], score: float) -> Totals:
    """The totals of completions that have all ended and have this Rouge-L."""
    mask = torch.tensor(counts)
    return completion_totals(torch.tensor(lengths), mask, {"rouge_l": [score] * len(counts)}, mask)


@pytest.mark.parametrize("length", [0, 9])
def test_values_of_a_single_completion_and_of_none(length: int):
    names = [
        f"completions/{which}_{what}" for which in ("mean", "min", "max") for what in ("length", "terminated_length")
    ]
    none = of_completions([7, 3], [False, False], 50.0)
    assert means(none) == {**dict.fromkeys(names, 0.0), "completions/clipped_ratio": 0.0}
    one = of_completions([8, length], [False, True], 20.0)
    assert means(none, one) == {**dict.fromkeys(names, length), "completions/clipped_ratio": 0.0, "rouge_l": 20.0}
    other = of_completions([20], [True], 40.0)
    assert means(none, one, other)["completions/min_length"] == length
    assert means(none, one, other)["completions/max_length"] == 20


def test_gradients_of_halves_with_one_token():
    """Of gradients 3 and 1 (long term) and 5 and -1 (single step): signals 3 and -5, squared differences 4 and 36."""
    gradients = torch.tensor([[[3.0], [2.0]], [[5.0], [-2.0]]])
    totals = gradient_totals(gradients.requires_grad_(), torch.tensor([1, 2]))
    assert means(totals) == pytest.approx(
        {
            "objective/long_term_signal": 3.0,
            "objective/long_term_variance": 4 * 2 / 9,
            "objective/single_step_signal": -5.0,
            "objective/single_step_variance": 36 * 2 / 9,
        }
    )


def test_moments_are_exact_in_float64():
    gradients = torch.tensor([2.0**12, 1.0]).expand(2, 2, 2)
    signal = means(gradient_totals(gradients, torch.tensor([1, 1])))["objective/long_term_signal"]
    assert signal == LARGE + 1
    mask = torch.ones(1, 2, dtype=torch.bool)
    totals = baseline_totals(*(torch.tensor([[2.0**12, 1.0]]) for _ in range(2)), mask)
    assert totals.values[:, 0].tolist() == [2.0**12 + 1, LARGE + 1] * 2
    rewards = torch.tensor([[LARGE], [1.0]])
    assert reward_metrics(rewards, torch.ones(1), ["a"], 1)["rewards/a/mean"] == (LARGE + 1) / 2


def test_baseline_may_explain_a_small_variance_in_part():
    """Of the returns 0 and 1, with variance 1/4, the baseline leaves 0 and 1/2, with variance 1/16."""
    mask = torch.ones(1, 2, dtype=torch.bool)
    totals = baseline_totals(torch.tensor([[0.0, 1.0]]), torch.tensor([[0.0, 0.5]]), mask)
    assert means(totals) == {"objective/baseline_explained_variance": 0.75}


def test_rewards_of_few_completions_have_a_deviation_from_two_on():
    nan = math.nan
    rewards = torch.tensor([[1.0, 5.0], [3.0, nan]])
    found = reward_metrics(rewards, torch.tensor([1.0, 0.0]), ["a", "b"], num_generations=2)
    assert found["rewards/a/std"] == pytest.approx(math.sqrt(2))
    assert found["rewards/b/mean"] == 5.0
    assert math.isnan(found["rewards/b/std"])
    assert found["reward"] == 2.0
