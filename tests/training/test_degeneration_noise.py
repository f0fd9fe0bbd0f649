"""The rules of degenerate text by hand: limits, noise, the first values of a run, and when a run was last well."""

import math
import random
from dataclasses import replace
from itertools import accumulate, cycle

import pytest

from minillm_trl.monitoring.degeneration import (
    EVALUATION,
    RULES,
    TRAINING,
    Rollouts,
    Rule,
    Window,
    diagnose,
    has_fallen_at_once,
    judge,
    noise,
)

RULE = {rule.metric: rule for rule in RULES}
ENTROPY, EOS, KL = (RULE[name] for name in ("entropy", "rollout/eos_rate", "objective/reverse_kl_per_token"))
DEVIATION = 1.4826 / math.sqrt(2)  # of values whose neighbours differ by 1
OF_FIVE = math.pi / 2 / 5  # variance of their median


def series_of(*steps: float) -> list[float]:
    """Values that differ from their predecessors by these steps, up and down in turn."""
    return list(accumulate(step * sign for step, sign in zip((0, *steps), cycle((1, -1)), strict=False)))


@pytest.mark.parametrize("falls", [True, False])
def test_value_at_its_limit_is_not_beyond_it(falls: bool):
    rule = Rule("kind", "metric", falls, 0.5, 1.0)
    assert rule.limit(3.0) == 2.5
    assert not rule.is_beyond(2.5, 2.5)
    assert rule.is_beyond(2.0, 2.5) is falls
    assert rule.is_beyond(3.0, 2.5) is not falls


def test_rule_has_no_offset_is_spared_by_nothing_and_is_no_share_by_default():
    rule = Rule("kind", "metric", True, 0.5)
    assert (rule.offset, rule.spared_by_rouge_l, rule.is_share) == (0.0, False, False)
    assert Rollouts() == (None, 1, 1)
    with pytest.raises(AttributeError):
        rule.scale = 1.0  # type: ignore[misc]


class TestNoise:
    @pytest.mark.parametrize("variance", [1.0, 9.0])
    def test_it_is_four_standard_errors_of_baseline_and_median(self, variance: float):
        values = series_of(*[1.0] * 20)
        expected = 4 * DEVIATION * math.sqrt(variance + OF_FIVE)
        assert noise(values, TRAINING, variance) == pytest.approx(expected)
        if variance == 1.0:
            assert noise(values, TRAINING) == noise(values, TRAINING, 1.0)

    def test_it_is_that_of_normal_numbers_and_does_not_grow_with_drift(self):
        generator = random.Random(0)
        values = [generator.gauss() for _ in range(5000)]
        window, expected = Window(baseline=1, recent=2, in_a_row=1), 4 * math.sqrt(math.pi / 4)
        for drift in (0.0, 0.1):
            drifted = [value + drift * i for i, value in enumerate(values)]
            assert noise(drifted, window, baseline_variance=0.0) == pytest.approx(expected, rel=0.05)

    def test_baseline_has_the_noise_of_the_first_twelve_values_and_the_median_that_of_all(self):
        # eleven steps, of which the last makes 1 the median, and a twelfth that would make it 1.5
        first = [1.0, 2.0] * 5 + [1.0]
        values = series_of(*first, *[2.0] * 20)
        expected = 4 * DEVIATION * math.sqrt(1 + 4 * OF_FIVE)
        assert noise(values, TRAINING) == pytest.approx(expected)

    def test_baseline_of_several_values_has_that_of_their_median(self):
        values = series_of(*[1.0] * 20)
        expected = 4 * DEVIATION * math.sqrt(math.pi / 2 / 3 + math.pi / 2 / 2)
        assert noise(values, Window(baseline=3, recent=2, in_a_row=1)) == pytest.approx(expected)

    def test_evaluations_have_none(self):
        assert noise(series_of(*[1.0] * 20), EVALUATION) == 0.0

    @pytest.mark.parametrize(("factor", "found"), [(0.99, True), (1.01, False)])
    def test_change_counts_from_the_noise_on(self, factor: float, found: bool):
        """A fall from 10 to 4 with a noise just below it, or above; the limit is 5."""
        step = 6 / (4 * DEVIATION * math.sqrt(1 + OF_FIVE)) * factor
        values = [10.0, *(4.0 + (step if i % 2 else 0.0) for i in range(21))]
        values += [4.0, 4.0 + step, 4.0, 4.0, 4.0 + step, 4.0]  # two medians of 4
        assert judge(values, ENTROPY).is_beyond is found
        assert not judge(values, ENTROPY, baseline_variance=2.0).is_beyond

    def test_fixed_limit_has_none(self):
        values = [0.5, *(0.2 + (0.09 if i % 2 else 0.0) for i in range(21))]
        weights = RULE["importance_weight/effective_sample_size"]
        assert judge(values, weights).is_beyond
        assert not judge(values, replace(weights, scale=0.6, offset=0.0)).is_beyond  # with the same limit, 0.3


class TestStart:
    @pytest.mark.parametrize(("completions", "found"), [(37, False), (38, True)])
    def test_shares_differ_by_more_than_four_standard_errors(self, completions: int, found: bool):
        """Of 0.8 and twice 0.4: 0.4 against 4 sqrt(8/15 * 7/15 * 3/2 / n), which is 0.4 at n = 37.3."""
        shares = [0.8, 0.4, 0.4]
        assert has_fallen_at_once(shares, EOS, TRAINING, completions) is found
        assert judge(shares, EOS, TRAINING, completions).is_beyond is found

    @pytest.mark.parametrize(("completions", "found"), [(23, False), (25, True)])
    def test_baseline_of_several_shares_has_their_error(self, completions: int, found: bool):
        """Of twice 0.8 and twice 0.4: 0.4 against 4 sqrt(0.6 * 0.4 / n), which is 0.4 at n = 24."""
        assert has_fallen_at_once([0.8, 0.8, 0.4, 0.4], EOS, Window(2, 5, 2), completions) is found

    @pytest.mark.parametrize(
        ("shares", "found"),
        [
            ([0.8, 0.1], False),  # a single value
            ([0.8, 0.7, 0.1], False),  # one of them is not beyond 0.6
            ([0.8, 0.7, 0.1, 0.1], True),  # the last two are
            ([0.8, 0.1, 0.1, 0.7], False),
        ],
    )
    def test_last_two_values_are_beyond_the_limit(self, shares: list[float], found: bool):
        assert judge(shares, EOS, TRAINING, 1000).is_beyond is found

    def test_only_shares_are_judged_before_there_are_medians(self):
        values = [0.8, *[0.1] * 5]
        for length in range(1, 6):
            for rule in (EOS, replace(EOS, is_share=False)):
                for completions in (None, 1000):
                    early = rule.is_share and completions is not None and length > 2
                    assert judge(values[:length], rule, TRAINING, completions).is_beyond is early
        assert judge(values, replace(EOS, is_share=False)).is_beyond  # two medians of five values

    @pytest.mark.parametrize(
        ("metric", "steps", "found"),
        [
            ("entropy", [1, 41, 81], 40 / 2),  # a log of 40 updates, each of two passes over a rollout
            ("completions/mean_length", [1, 41, 81], 40 / 3),  # three updates use a rollout
            ("rollout/eos_rate", [1, 41, 81], 40 / 3),
            ("entropy", [1, 11, 21, 61], 25 / 2),  # the median interval, without the first one
            ("entropy", [0, 40, 80], 40 / 2),
            ("entropy", [2, 42, 82], 1.0),
            ("entropy", [1, 41], 1.0),
            ("completions/mean_length", [1, 3, 5], 1.0),
        ],
    )
    def test_first_value_is_of_one_update_or_rollout(self, monkeypatch, metric: str, steps: list[int], found: float):
        seen = []

        def remember(values, rule, window, completions=None, baseline_variance=None):
            seen.append((window, completions, baseline_variance))
            return judge(values, rule, window)

        monkeypatch.setattr("minillm_trl.monitoring.degeneration.judge", remember)
        diagnose([{"step": step, metric: 1.0} for step in steps], rollouts=Rollouts(7, updates=3, passes=2))
        assert seen == [(TRAINING, 7, found)]


class TestVerdict:
    def test_medians_are_of_the_last_five_values(self):
        values = [4.0, 9.0, 2.0, 8.0, 1.0, 7.0, 3.0]
        found = [judge(values[:end], ENTROPY).value for end in range(1, 8)]
        assert found == [4.0, 6.5, 4.0, 6.0, 4.0, 7.0, 3.0]
        verdict = judge(values, ENTROPY)
        assert (verdict.baseline, verdict.limit) == (4.0, 2.0)
        assert judge(values, ENTROPY, Window(3, 5, 2)).baseline == 4.0
        assert judge(values, ENTROPY, Window(2, 5, 2)).baseline == 6.5

    @pytest.mark.parametrize(
        ("values", "is_well", "well_until"),
        [
            ([1.0], True, -1),  # the middle of five values is not there yet
            ([1.0, 1.0], True, -1),
            ([1.0] * 3, True, 0),
            ([1.0] * 5, True, 2),
            ([1.0] * 3 + [0.75] * 9, True, 9),  # half way to the limit
            ([1.0] * 3 + [0.74] * 9, False, 2),
            ([1.0] * 3 + [0.1] * 9, False, 2),
        ],
    )
    def test_series_is_well_up_to_half_of_the_way(self, values: list[float], is_well: bool, well_until: int):
        verdict = judge(values, ENTROPY)
        assert (verdict.is_well, verdict.well_until) == (is_well, well_until)

    def test_what_rises_is_well_below_half_of_the_way(self):
        assert judge([1.0] + [1.25] * 9, KL).is_well  # the limit is 1.6
        assert judge([1.0] + [1.3] * 9, KL).is_well
        assert not judge([1.0] + [1.31] * 9, KL).is_well

    def test_evaluations_that_were_never_well_or_never_change(self):
        weights = RULE["importance_weight/effective_sample_size"]
        assert judge([0.2, 0.27, 0.2], weights, EVALUATION).well_until == -1
        assert judge([0.2, 0.4, 0.2], weights, EVALUATION).well_until == 1
        assert not judge([-1.0, -1.0], KL, EVALUATION).is_beyond  # although the limit is -1.4

    def test_share_that_has_fallen_at_once_is_not_well(self):
        verdict = judge([0.8, 0.8, 0.8, 0.1, 0.1], EOS, TRAINING, 1000)
        assert verdict.value == 0.8
        assert (verdict.is_beyond, verdict.is_well) == (True, False)

    def test_two_medians_in_a_row_are_beyond(self):
        values = [1.0] * 5 + [0.1] * 3
        assert not judge(values, ENTROPY).is_beyond  # the first one
        assert judge([*values, 0.1], ENTROPY).is_beyond
        assert not judge([*values, 0.1, 1.0, 1.0, 1.0], ENTROPY).is_beyond


def log(**series: list[float | None]) -> list[dict[str, float]]:
    """A log at the steps 10, 20, ...; double underscores stand for slashes."""
    names = [name.replace("__", "/") for name in series]
    rows = zip(*series.values(), strict=True)
    return [{"step": 10 * number, **dict(zip(names, row, strict=True))} for number, row in enumerate(rows, start=1)]


class TestDiagnosis:
    def test_run_is_well_until_the_first_of_its_metrics_is_not(self):
        entropy, kl = [1.0] * 12, [1.0] * 7 + [5.0] * 5
        found = diagnose(log(entropy=entropy))
        assert found == ([], True, 100)
        found = diagnose(log(entropy=entropy, objective__reverse_kl_per_token=kl))
        assert (found.is_well, found.well_until) == (False, 70)  # the median is good up to the ninth log
        (kind,) = found.found
        assert kind == ("rising_kl", "objective/reverse_kl_per_token", 5.0, 1.0, 1.6)
        # one metric has fewer values, or so few that the middle of five is not there
        assert diagnose(log(entropy=entropy, rollout__eos_rate=[None] * 10 + [1.0] * 2)).well_until == 100
        assert diagnose(log(entropy=entropy, rollout__eos_rate=[None] * 6 + [1.0] * 6)).well_until == 100
        assert diagnose(log(entropy=entropy, rollout__eos_rate=[1.0] * 6 + [None] * 6)).well_until == 40

    def test_nothing_is_known_at_the_start(self):
        assert diagnose([{"step": 1, "loss": 2.0}]) == ([], True, 0)
        assert diagnose(log(entropy=[1.0, 1.0])) == ([], True, 0)
        assert diagnose(log(entropy=[1.0, 1.0, 1.0])) == ([], True, 10)
        assert diagnose(log(entropy=[1.0] + [0.1] * 8)).well_until == 0

    def test_evaluations_tell_of_faults_alone(self):
        """They are too few to say when the run was last well, unless it is not."""
        assert diagnose(log(entropy=[1.0] * 5, eval_entropy=[1.0] * 5)) == ([], True, 30)
        assert diagnose(log(eval_entropy=[1.0] * 5)) == ([], True, 0)
        found = diagnose(log(entropy=[1.0] * 5, eval_entropy=[1.0, 1.0, 0.6, 0.6, 0.6]))
        assert found == ([], False, 20)

    def test_metric_that_was_logged_before_is_not_found_again(self):
        history = log(entropy=[1.0] * 3 + [0.1] * 9)
        assert len(diagnose(history).found) == 1
        assert diagnose([*history, {"step": 130, "loss": 1.0}]).found == []

    def test_numbers_that_are_not_finite_and_lengths_of_nothing_are_no_values(self):
        nan = math.nan
        assert diagnose(log(entropy=[nan, 1.0, math.inf, 1.0, -math.inf, 1.0])) == ([], True, 20)
        assert diagnose(log(entropy=[nan, nan])) == ([], True, 0)
        lengths = [0.0, 1.0, 1.0, 1.0, 0.0, 1.0]
        assert diagnose(log(completions__mean_length=lengths)) == ([], True, 30)
        assert diagnose(log(rollout__repeated_4grams=[0.0] * 5)) == ([], True, 30)

    @pytest.mark.parametrize(
        ("key", "found"),
        [
            ("entropy", True),
            ("eval_entropy", True),
            ("eval_dolly_entropy", True),
            ("eval_a_b_entropy", True),
            ("dolly_entropy", False),
            ("eval_kd/entropy", False),
            ("eval_cross/my_entropy", False),
        ],
    )
    def test_metric_is_named_as_in_training_or_in_an_evaluation(self, key: str, found: bool):
        history = [{"step": number, key: 1.0 if number < 4 else 0.1} for number in range(1, 13)]
        assert bool(diagnose(history).found) is found


class TestRougeL:
    LENGTHS = [60.0] * 5 + [30.0] * 15  # well until step 50, of which the middle of the median is known

    def found(self, *rouge_l: list[float | None], is_evaluated: bool = True) -> list[str]:
        names = ("eval_rouge_l", "eval_dolly_rouge_l")
        series = dict(zip(names, rouge_l, strict=False))
        history = log(completions__mean_terminated_length=self.LENGTHS, **series)
        return [found.kind for found in diagnose(history, is_evaluated).found]

    def evaluated(self, first: float, last: float, at: int) -> list[float | None]:
        series: list[float | None] = [None] * 20
        series[0], series[at // 10 - 1] = first, last
        return series

    def test_it_holds_from_nine_tenths_of_its_best_on(self):
        assert self.found(self.evaluated(40.0, 36.0, at=200)) == []
        assert self.found(self.evaluated(40.0, 35.9, at=200)) == ["length_collapse"]

    def test_it_spares_lengths_that_grow_and_says_nothing_of_when_they_were_well(self):
        history = log(
            completions__mean_length=[30.0] * 5 + [60.0] * 15,
            eval_rouge_l=self.evaluated(40.0, 40.0, at=200),
            entropy=[1.0] * 20,
        )
        assert diagnose(history) == ([], True, 180)
        assert [found.kind for found in diagnose(history[:19], is_evaluated=False).found] == ["length_inflation"]

    def test_it_counts_if_measured_after_the_lengths_were_well(self):
        well_until = diagnose(log(completions__mean_terminated_length=self.LENGTHS)).well_until
        assert well_until == 50
        assert self.found(self.evaluated(40.0, 35.0, at=60), is_evaluated=True) == ["length_collapse"]
        assert self.found(self.evaluated(40.0, 35.0, at=50), is_evaluated=True) == []  # the next one will tell
        assert self.found(self.evaluated(40.0, 41.0, at=50), is_evaluated=False) == ["length_collapse"]

    def test_all_of_several_have_to_hold(self):
        good, bad = self.evaluated(40.0, 41.0, at=200), self.evaluated(40.0, 20.0, at=200)
        assert self.found(good, good) == []
        assert self.found(good, bad) == self.found(bad, good) == ["length_collapse"]
        assert self.found(good, self.evaluated(40.0, 41.0, at=50)) == []  # one of them is still to come
        assert self.found(good, self.evaluated(40.0, 41.0, at=50), is_evaluated=False) == ["length_collapse"]

    def test_it_spares_no_other_metric(self):
        history = log(entropy=[1.0] * 3 + [0.1] * 9, eval_rouge_l=[40.0] * 12)
        assert [found.kind for found in diagnose(history).found] == ["entropy_collapse"]

    def test_its_evaluation_may_find_what_was_logged_before(self):
        history = log(
            completions__mean_terminated_length=[*self.LENGTHS, None], eval_rouge_l=[40.0] + [None] * 19 + [20.0]
        )
        kinds = [found.kind for found in diagnose(history).found]
        assert kinds == ["length_collapse"]
