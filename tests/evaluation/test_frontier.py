"""Curves of a measure over entropy: exact on lines, paired by prompt, and refused outside their range."""

from dataclasses import FrozenInstanceError
from itertools import permutations

import numpy as np
import pytest

from minillm_trl.evaluation.frontier import (
    FrontierCurve,
    covers,
    entropy_range,
    equal_entropy_difference,
    mean_equal_entropy_difference,
    mean_over_entropies,
    shared_entropies,
    value_at_entropy,
)
from minillm_trl.evaluation.statistics import MeanInterval, bootstrap_interval, paired_bootstrap

PROMPTS = 40


def random_curve(seed: int, decodings: int = 4) -> FrontierCurve:
    """A curve with entropies that grow with the decoding, and values that fall with entropy, both noisy by prompt."""
    generator = np.random.default_rng(seed)
    entropies = np.linspace(0.2, 1.4, decodings)[:, None] + generator.normal(0, 0.2, (decodings, PROMPTS))
    return FrontierCurve(entropies, 70 - 10 * entropies + generator.normal(0, 3, (decodings, PROMPTS)))


def spread_line(slope: float, intercept: float, levels: list[float]) -> FrontierCurve:
    """A line that every prompt's decodings lie on, so that every resample lies on it too."""
    offsets = np.linspace(-0.1, 0.1, PROMPTS)
    entropies = np.array(levels)[:, None] + offsets
    return FrontierCurve(entropies, intercept + slope * entropies)


class TestValues:
    def test_between_neighbours_of_any_order_the_value_is_linear(self):
        # means over the two prompts: (0.5, 60), (0, 70), (1.5, 52)
        curve = FrontierCurve([[0.4, 0.6], [0.0, 0.0], [1.0, 2.0]], [[50, 70], [60, 80], [51, 53]])
        at = [0.0, 0.25, 0.5, 0.75, 1.5]
        assert [value_at_entropy(curve, h) for h in at] == pytest.approx([70, 65, 60, 58, 52])
        assert entropy_range(curve) == (0.0, 1.5)

    def test_mean_over_a_range_is_the_integral(self):
        curve = FrontierCurve([[0.0], [0.5], [1.5]], [[70.0], [60.0], [52.0]])
        assert mean_over_entropies(curve, 0.5, 1.5) == pytest.approx(56)
        # half of the range at a mean of 65, half at 58 between 60 and 56
        assert mean_over_entropies(curve, 0.0, 1.0) == pytest.approx((65 + 58) / 2, rel=1e-5)

    @pytest.mark.parametrize("at", [-0.01, 1.51])
    def test_outside_of_the_range_there_is_no_value(self, at: float):
        curve = FrontierCurve([[0.0], [1.5]], [[70.0], [60.0]])
        assert not covers(curve, at)
        with pytest.raises(ValueError, match=f"Entropy {at:.3g} .* 0 to 1.5 .*--temperatures"):
            value_at_entropy(curve, at)
        with pytest.raises(ValueError, match=f"Entropy {at:.3g} "):
            mean_over_entropies(curve, *sorted([at, 1.0]))

    def test_range_must_not_be_empty(self):
        curve = FrontierCurve([[0.0], [1.5]], [[70.0], [60.0]])
        with pytest.raises(ValueError, match="empty: 1 to 1"):
            mean_over_entropies(curve, 1.0, 1.0)

    def test_end_that_was_averaged_in_another_order_is_within_the_range(self):
        curve = random_curve(0)
        for end, outwards in zip(entropy_range(curve), (-1e-15, 1e-15), strict=True):
            assert covers(curve, end + outwards)

    def test_single_decoding_is_no_curve(self):
        curve = FrontierCurve([[0.5]], [[70.0]])
        assert not covers(curve, 0.5)
        with pytest.raises(ValueError, match="at 1 temperatures"):
            value_at_entropy(curve, 0.5)

    @pytest.mark.parametrize(
        ("entropies", "values"),
        [
            *[([0.5], [70.0]), ([[0.5]], [[70.0, 60.0]]), ([[]], [[]]), ([[np.nan]], [[1.0]]), ([[1.0]], [[np.inf]])],
            *[([[0.5, 1.0]], [[np.nan, 1.0]]), ([[0.5, np.inf]], [[1.0, 1.0]]), ([[[0.5]]], [[[70.0]]])],
        ],
    )
    def test_shapes_and_numbers_are_checked(self, entropies, values):
        with pytest.raises(ValueError, match="FrontierCurve needs"):
            FrontierCurve(entropies, values)

    def test_mean_over_a_range_is_the_trapezoidal_rule_on_101_entropies(self):
        curve = FrontierCurve([[0.0], [0.3], [0.5], [1.5]], [[70.0], [61.0], [60.0], [52.0]])
        grid = np.linspace(0.1, 1.4, 101)
        expected = np.trapezoid(np.interp(grid, [0.0, 0.3, 0.5, 1.5], [70.0, 61.0, 60.0, 52.0]), grid) / 1.3
        assert mean_over_entropies(curve, 0.1, 1.4) == pytest.approx(expected, rel=1e-12)

    @pytest.mark.parametrize("entropies", [[0.2, 0.5, 0.5, 1.0], [0.2, 0.2, 0.2, 1.0], [0.2, 1.0, 1.0]])
    def test_decodings_of_equal_entropy_have_the_highest_of_their_values_in_any_order(self, entropies):
        points = [(entropy, 10.0 * number) for number, entropy in enumerate(entropies)]
        highest = dict(points)  # the last of each entropy
        curves = [FrontierCurve(*np.array(order).T[:, :, None]) for order in permutations(points)]
        for curve in curves:
            assert {entropy: value_at_entropy(curve, entropy) for entropy in highest} == highest
        (mean,) = {mean_over_entropies(curve, 0.2, 1.0) for curve in curves}
        assert np.isfinite(mean)

    def test_curve_cannot_be_changed(self):
        curve = FrontierCurve([[0.2], [1.0]], [[1.0], [2.0]])
        with pytest.raises(FrozenInstanceError):
            curve.values = curve.entropies

    def test_single_entropy_is_no_range(self):
        curve, same = FrontierCurve([[0.2], [1.0]], [[1.0], [2.0]]), FrontierCurve([[0.5], [0.5]], [[70.0], [60.0]])
        assert value_at_entropy(same, 0.5) == 70.0
        assert shared_entropies(same, curve) is None


def slow_curve(entropies: np.ndarray, values: np.ndarray, at: float) -> float:
    """The line through the neighbours; beyond an end, through the two last ones."""
    order = np.argsort(entropies)
    x, y = entropies[order], values[order]
    left = max(i for i in range(len(x) - 1) if i == 0 or x[i] <= at)
    return y[left] + (at - x[left]) / (x[left + 1] - x[left]) * (y[left + 1] - y[left])


def slow_difference(model: FrontierCurve, baseline: FrontierCurve, grid: np.ndarray, **options) -> MeanInterval:
    """A loop over resamples of the prompts."""
    settings = {"confidence": 0.95, "resamples": 10_000, "seed": 0, **options}

    def difference(prompts: np.ndarray) -> float:
        curves = [
            [slow_curve(one.entropies[:, prompts].mean(1), one.values[:, prompts].mean(1), at) for at in grid]
            for one in (model, baseline)
        ]
        values = np.array(curves[0]) - curves[1]
        return values[0] if len(grid) == 1 else np.trapezoid(values, grid) / (grid[-1] - grid[0])

    drawn = np.random.default_rng(settings["seed"]).integers(PROMPTS, size=(settings["resamples"], PROMPTS))
    found = np.array([difference(prompts) for prompts in drawn])
    levels = (1 - settings["confidence"]) / 2, (1 + settings["confidence"]) / 2
    return MeanInterval(difference(np.arange(PROMPTS)), *np.quantile(found, levels), PROMPTS, found.std(ddof=1))


def test_numbers_of_any_kind_are_computed_in_float64():
    curve = random_curve(1)
    narrow = [numbers.astype(np.float32) for numbers in (curve.entropies, curve.values)]
    wide = [numbers.astype(np.float64) for numbers in narrow]
    assert value_at_entropy(FrontierCurve(*narrow), 0.7) == value_at_entropy(FrontierCurve(*wide), 0.7)


class TestDifference:
    @pytest.mark.parametrize("options", [{"resamples": 30}, {"confidence": 0.5, "resamples": 20, "seed": 3}])
    def test_intervals_are_those_of_a_loop_over_resamples(self, options):
        model, baseline = random_curve(3), random_curve(4, decodings=3)
        found = equal_entropy_difference(model, baseline, 0.7, **options)
        assert found == pytest.approx(slow_difference(model, baseline, np.array([0.7]), **options))
        low, high = shared_entropies(model, baseline)
        found = mean_equal_entropy_difference(model, baseline, **options)
        assert found == pytest.approx(slow_difference(model, baseline, np.linspace(low, high, 101), **options))

    def test_defaults_are_those_of_the_other_intervals(self):
        model, baseline = random_curve(3), random_curve(4)
        options = {"confidence": 0.95, "resamples": 10_000, "seed": 0}
        assert equal_entropy_difference(model, baseline, 0.7) == equal_entropy_difference(
            model, baseline, 0.7, **options
        )
        assert mean_equal_entropy_difference(model, baseline) == mean_equal_entropy_difference(
            model, baseline, **options
        )

    def test_two_lines_differ_by_their_distance_in_every_resample(self):
        model, baseline = spread_line(-20, 80, [0.2, 0.5, 1.0]), spread_line(-10, 70, [0.3, 1.2])
        # 80 - 20 h - (70 - 10 h) = 10 - 10 h
        interval = equal_entropy_difference(model, baseline, 0.6, resamples=500)
        assert interval == MeanInterval(*[pytest.approx(4)] * 3, PROMPTS, pytest.approx(0, abs=1e-9))
        # the mean over 0.3 to 1.0, where h is 0.65 on average
        interval = mean_equal_entropy_difference(model, baseline, resamples=500)
        assert interval == MeanInterval(*[pytest.approx(3.5)] * 3, PROMPTS, pytest.approx(0, abs=1e-9))
        assert shared_entropies(model, baseline) == pytest.approx((0.3, 1.0))

    @pytest.mark.parametrize("prompts", [1, 2])
    def test_standard_error_needs_two_prompts(self, prompts: int):
        model, baseline = (
            FrontierCurve(curve.entropies[:, :prompts], curve.values[:, :prompts])
            for curve in (random_curve(3), random_curve(4))
        )
        low, high = shared_entropies(model, baseline)
        for found in (
            equal_entropy_difference(model, baseline, (low + high) / 2, resamples=50),
            mean_equal_entropy_difference(model, baseline, resamples=50),
        ):
            assert found.n == prompts
            assert found.standard_error is None if prompts == 1 else found.standard_error > 0

    def test_equal_models_differ_by_exactly_nothing(self):
        curve, same = random_curve(1), random_curve(1)
        zero = MeanInterval(0.0, 0.0, 0.0, PROMPTS, 0.0)
        assert equal_entropy_difference(curve, same, 0.7) == zero
        assert mean_equal_entropy_difference(curve, same) == zero

    def test_at_shared_decodings_it_is_the_paired_bootstrap(self):
        """With entropies that do not vary, an equal entropy is an equal temperature."""
        generator = np.random.default_rng(2)
        entropies = np.repeat([[0.2], [1.0]], PROMPTS, axis=1)
        model = FrontierCurve(entropies, generator.normal(50, 5, (2, PROMPTS)))
        baseline = FrontierCurve(entropies, model.values + generator.normal(1, 1, (2, PROMPTS)))
        found = equal_entropy_difference(model, baseline, 1.0)
        expected = paired_bootstrap(model.values[1], baseline.values[1])
        assert found[:3] == pytest.approx(expected[:3], abs=0.05)
        assert found.standard_error == pytest.approx(expected.standard_error, rel=0.03)
        half = found.high - found.low
        assert half < 0.5 * np.ptp(bootstrap_interval(model.values[1])[1:3])  # what both share cancels

    def test_entropies_are_resampled_with_the_values(self):
        """The same values by prompt, but one model's entropy varies over prompts: its curve moves sideways."""
        steady = np.repeat([[0.2], [1.0]], PROMPTS, axis=1)
        noise = np.linspace(-0.15, 0.15, PROMPTS)
        values = np.repeat([[70.0], [54.0]], PROMPTS, axis=1)  # slope -20
        model, baseline = FrontierCurve(steady + noise, values), FrontierCurve(steady, values)
        interval = equal_entropy_difference(model, baseline, 0.6)
        # a shift of the entropies by e moves the curve up by 20 e
        assert interval.mean == pytest.approx(0)
        assert interval.standard_error == pytest.approx(20 * noise.std() / PROMPTS**0.5, rel=0.03)
        assert interval.high == pytest.approx(1.96 * interval.standard_error, rel=0.06)

    def test_resample_is_one_draw_of_prompts_for_all_decodings(self):
        """Values that cancel between a model's two decodings: their mean, half-way, is the same for every prompt."""
        noise = np.linspace(-5, 5, PROMPTS)
        entropies = np.repeat([[0.2], [1.0]], PROMPTS, axis=1)
        model = FrontierCurve(entropies, [70 + noise, 60 - noise])
        baseline = FrontierCurve(entropies, np.full((2, PROMPTS), 60.0))
        assert equal_entropy_difference(model, baseline, 0.6)[:3] == pytest.approx((5, 5, 5))
        assert np.ptp(equal_entropy_difference(model, baseline, 1.0)[1:3]) > 1

    def test_end_of_a_range_moves_between_resamples_without_being_cut(self):
        """At the baseline's own highest entropy, half of the resamples end before it."""
        baseline = spread_line(-10, 70, [0.3, 1.0])
        model = spread_line(-10, 73, [0.2, 1.2])
        high = entropy_range(baseline)[1]
        assert equal_entropy_difference(model, baseline, high)[:3] == pytest.approx((3, 3, 3))

    def test_interval_covers_the_truth_as_often_as_it_claims(self):
        generator, hits, trials = np.random.default_rng(5), 0, 300
        for trial in range(trials):
            hard = generator.normal(0, 1, PROMPTS)  # a prompt that is hard for both
            curves = []
            for lift in (2.0, 0.0):
                entropies = np.array([[0.2], [0.6], [1.0]]) + generator.normal(0, 0.1, (3, PROMPTS))
                values = 70 + lift - 20 * np.array([[0.2], [0.6], [1.0]]) + 5 * hard
                curves.append(FrontierCurve(entropies, values + generator.normal(0, 2, (3, PROMPTS))))
            _, low, high, *_ = equal_entropy_difference(*curves, 0.5, resamples=300, seed=trial)
            hits += low <= 2 <= high
        assert 0.90 <= hits / trials <= 0.98

    def test_it_depends_on_the_seed_and_the_confidence(self):
        model, baseline = random_curve(3), random_curve(4, decodings=5)
        one = equal_entropy_difference(model, baseline, 0.7, resamples=400)
        assert one == equal_entropy_difference(model, baseline, 0.7, resamples=400)
        assert one != equal_entropy_difference(model, baseline, 0.7, resamples=400, seed=1)
        narrow = equal_entropy_difference(model, baseline, 0.7, resamples=400, confidence=0.5)
        assert one.low < narrow.low < narrow.mean == one.mean < narrow.high < one.high

    def test_entropy_that_one_does_not_reach_is_refused_naming_it(self):
        model, baseline = spread_line(-10, 70, [0.2, 0.5]), spread_line(-10, 70, [0.4, 1.0])
        with pytest.raises(ValueError, match=r"Entropy 0.8 is outside the range of the model, 0.2 to 0.5"):
            equal_entropy_difference(model, baseline, 0.8)
        with pytest.raises(ValueError, match=r"Entropy 0.3 is outside the range of the baseline, 0.4 to 1"):
            equal_entropy_difference(model, baseline, 0.3)
        apart = spread_line(-10, 70, [0.6, 1.0])
        assert shared_entropies(model, apart) is None
        with pytest.raises(ValueError, match=r"0.2 to 0.5 and 0.6 to 1 nats"):
            mean_equal_entropy_difference(model, apart)

    def test_other_prompts_are_refused(self):
        other = FrontierCurve([[0.2], [1.0]], [[70.0], [60.0]])
        with pytest.raises(ValueError, match="the curves have 40 and 1"):
            equal_entropy_difference(random_curve(0), other, 0.7)

    def test_single_prompt_has_no_standard_error(self):
        model = FrontierCurve([[0.2], [1.0]], [[70.0], [60.0]])
        baseline = FrontierCurve([[0.0], [1.2]], [[60.0], [60.0]])
        interval = equal_entropy_difference(model, baseline, 0.6, resamples=10)
        assert interval == MeanInterval(*[pytest.approx(5)] * 3, 1, None)
