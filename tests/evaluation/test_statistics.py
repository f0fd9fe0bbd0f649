"""Bootstrap intervals, the sign-flip test and Holm's correction against values computed by hand or by enumeration."""

import operator
import tracemalloc
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest

from minillm_trl.evaluation.significance import Difference, paired_differences
from minillm_trl.evaluation.statistics import (
    MeanInterval,
    bootstrap_column_means,
    bootstrap_interval,
    bootstrap_means,
    bootstrap_ratio,
    holm_correction,
    paired_bootstrap,
    sign_flip_test,
)


def test_bootstrap_interval_of_constant_values_has_no_width():
    interval = bootstrap_interval([53.5] * 30)
    assert interval == MeanInterval(53.5, 53.5, 53.5, 30, 0.0)


@pytest.mark.parametrize(("confidence", "low", "high"), [(0.95, 0.0, 1.0), (0.4, 0.5, 0.5)])
def test_bootstrap_interval_of_two_values_has_the_exact_quantiles(confidence, low, high):
    # the mean of two draws from {0, 1} is 0, 1/2, 1 with probability 1/4, 1/2, 1/4
    assert bootstrap_interval([0.0, 1.0], confidence=confidence) == MeanInterval(0.5, low, high, 2, pytest.approx(0.5))


def test_bootstrap_interval_of_many_values_is_the_normal_one():
    values = np.random.default_rng(3).normal(50, 20, 2000)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean())
    assert interval.mean - interval.low == pytest.approx(half, rel=0.05)
    assert interval.high - interval.mean == pytest.approx(half, rel=0.05)


def test_bootstrap_interval_covers_the_true_mean_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    intervals = [bootstrap_interval(generator.normal(0, 1, 40), resamples=400, seed=i) for i in range(400)]
    coverage = np.mean([low <= 0 <= high for _, low, high, *_ in intervals])
    assert 0.90 <= coverage <= 0.97


def test_bootstrap_interval_depends_on_the_seed_alone():
    values = np.random.default_rng(1).normal(size=50)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values.tolist(), seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)


@pytest.mark.parametrize("shape", [(30,), (30, 2)])
def test_means_are_those_of_the_rows_that_the_seed_draws(shape):
    values = np.random.default_rng(6).normal(size=shape)
    rows = np.random.default_rng(7).integers(30, size=(10_000, 30))  # more than a block holds
    assert bootstrap_means(values, 10_000, 7) == pytest.approx(values[rows].mean(axis=1))


@pytest.mark.parametrize("options", [{}, {"confidence": 0.4, "resamples": 300, "seed": 5}])
def test_intervals_are_quantiles_of_the_rows_that_the_seed_draws(options):
    generator = np.random.default_rng(8)
    values, baseline = generator.uniform(1, 9, 20), generator.uniform(5, 9, 20)
    settings = {"confidence": 0.95, "resamples": 10_000, "seed": 0, **options}
    rows = np.random.default_rng(settings["seed"]).integers(20, size=(settings["resamples"], 20))
    levels = (1 - settings["confidence"]) / 2, (1 + settings["confidence"]) / 2
    for found, resampled in (
        (bootstrap_interval(values, **options), values[rows].mean(axis=1)),
        (paired_bootstrap(values, baseline, **options), (values - baseline)[rows].mean(axis=1)),
        (bootstrap_ratio(values, baseline, **options), 100 * values[rows].sum(axis=1) / baseline[rows].sum(axis=1)),
    ):
        assert (found.low, found.high) == pytest.approx(tuple(np.quantile(resampled, levels)))


def test_numbers_of_any_kind_are_computed_in_float64():
    generator = np.random.default_rng(9)
    values, baseline = (generator.uniform(1, 9, 50).astype(np.float32) for _ in range(2))
    wide = values.astype(np.float64), baseline.astype(np.float64)
    assert bootstrap_interval(values) == bootstrap_interval(wide[0])
    for test in (paired_bootstrap, bootstrap_ratio, sign_flip_test):
        assert test(values, baseline) == test(*wide)
    right, other = [True, True, False, True], [False, True, False, False]
    assert paired_bootstrap(right, other) == paired_bootstrap([1.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0])
    assert sign_flip_test(np.array(right), np.array(other)) == 2 / 4


def test_prompts_may_be_more_than_a_block_holds():
    values = np.arange(2**20 + 1) % 3
    constant = np.full(2**18 + 1, 2.0)
    assert bootstrap_interval(constant, resamples=2)[:3] == (2.0, 2.0, 2.0)
    assert bootstrap_column_means(values[:, None], 2, 0) == pytest.approx(1.0, abs=0.01)
    assert sign_flip_test(constant, 0 * constant, resamples=2) == 1 / 3


@pytest.mark.parametrize("test", [paired_bootstrap, bootstrap_ratio, sign_flip_test])
def test_memory_does_not_grow_with_prompts_times_resamples(test):
    values = np.random.default_rng(0).uniform(1, 2, 10_000)
    tracemalloc.start()
    test(values, values[::-1], resamples=1000)  # 80 MB for a number of each
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 20e6


def test_column_means_of_many_prompts_need_little_memory():
    tracemalloc.start()
    bootstrap_column_means(np.ones((20_000, 2)), 500, 0)  # 80 MB for a number of each
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50e6


def test_column_means_are_those_of_the_rows_that_the_seed_draws():
    values = np.random.default_rng(6).normal(size=(30, 5))
    expected = np.random.default_rng(7).integers(30, size=(200, 30))
    assert bootstrap_column_means(values, 200, 7) == pytest.approx(values[expected].mean(axis=1))
    many = bootstrap_column_means(values, 40_000, 7)  # in several blocks
    assert many.shape == (40_000, 5)
    assert many[:200] == pytest.approx(values[expected].mean(axis=1))
    assert many.std(axis=0) == pytest.approx(values.std(axis=0) / 30**0.5, rel=0.03)


def test_standard_error_is_that_of_the_mean():
    values = [1.0, 2.0, 3.0, 6.0]  # squared deviations 4, 1, 0, 9: variance 14 / 3
    assert bootstrap_interval(values).standard_error == pytest.approx((14 / 3 / 4) ** 0.5)
    assert bootstrap_interval([1.0]).standard_error is None


def test_bootstrap_interval_without_values_is_refused():
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_paired_bootstrap_removes_what_prompts_share():
    baseline = np.random.default_rng(2).normal(50, 20, 200)
    interval = paired_bootstrap(baseline + 1.0, baseline)
    assert interval == pytest.approx((1.0, 1.0, 1.0, 200, 0.0), abs=1e-9)
    assert bootstrap_interval(baseline).high - bootstrap_interval(baseline).low > 4


def test_paired_bootstrap_subtracts_the_baseline():
    assert paired_bootstrap([1.0, 2.0], [3.0, 2.0], confidence=0.95) == MeanInterval(
        -1.0, -2.0, 0.0, 2, pytest.approx(1.0)
    )


def test_paired_bootstrap_of_different_prompts_is_refused():
    with pytest.raises(ValueError, match="2 values and 3"):
        paired_bootstrap([1.0, 2.0], [1.0, 2.0, 3.0])
    for values, baseline in (([1.0], []), ([], [1.0]), ([1.0, 2.0], [1.0]), ([], [])):
        with pytest.raises(ValueError, match=f"got {len(values)} values and {len(baseline)}"):
            bootstrap_ratio(values, baseline)


@pytest.mark.parametrize("lowest", [0.0, -1.0])
def test_ratio_to_a_baseline_that_is_not_positive_everywhere_is_refused(lowest):
    with pytest.raises(ValueError, match=f"positive baseline, got {lowest}"):
        bootstrap_ratio([1.0, 1.0], [2.0, lowest])


def test_ratio_of_a_single_prompt_has_no_standard_error():
    assert bootstrap_ratio([1.0], [0.5], resamples=10) == MeanInterval(200.0, 200.0, 200.0, 1, None)


def all_signs(differences: list[float]) -> float:
    """The test by its definition, in exact arithmetic for integers."""
    sums = [abs(sum(map(operator.mul, signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(value >= abs(sum(differences)) for value in sums) / len(sums)


@pytest.mark.parametrize(
    ("differences", "expected"),
    [
        ([1.0, 2.0, 3.0], 2 / 8),  # only +++ and --- reach 6
        ([3.0, -1.0, 2.0], 4 / 8),  # 4 is reached by +-+, +++ and their opposites
        ([-3.0, 1.0, -2.0], 4 / 8),  # two-sided
        ([5.0], 1.0),
        ([0.0, 0.0, 0.0, 0.0], 1.0),
        ([0.1, 0.2, 0.3, -0.3], 12 / 16),  # 0.3 is reached in several ways, with other rounding
    ],
)
def test_sign_flip_test_of_few_prompts_is_the_exact_share_of_signs(differences, expected):
    assert sign_flip_test(differences, [0.0] * len(differences)) == expected
    assert sign_flip_test([7 + difference for difference in differences], [7.0] * len(differences)) == expected


@pytest.mark.parametrize("prompts", [9, 60])  # all signs, random ones
@pytest.mark.parametrize("scale", [1e-12, 0.1, 1e12])  # 0.1 adds rounding to the sums
def test_sign_flip_test_does_not_depend_on_the_unit(prompts, scale):
    differences = np.random.default_rng(5).integers(-3, 5, prompts)
    expected = sign_flip_test(differences, 0 * differences)
    assert 0.001 < expected < 1
    assert sign_flip_test(scale * differences, 0 * differences) == expected


def test_all_signs_are_tried_where_there_are_no_more_than_resamples():
    assert sign_flip_test([1.0, 2.0, 3.0], [0.0] * 3, resamples=8) == 2 / 8
    assert sign_flip_test([1.0] * 13, [0.0] * 13) == 2 / 2**13  # by default up to 10,000
    assert sign_flip_test([1.0] * 14, [0.0] * 14) * 10_001 == pytest.approx(2, abs=1.01)


def test_sign_flip_test_depends_on_the_seed_alone():
    generator = np.random.default_rng(4)
    pair = generator.normal(size=40), generator.normal(size=40)
    assert sign_flip_test(*pair) == sign_flip_test(*pair, resamples=10_000, seed=0) != sign_flip_test(*pair, seed=1)


@pytest.mark.parametrize("prompts", [14, 16, 17, 72, 81])
def test_every_prompt_of_many_may_flip_its_sign(prompts):
    for pair in ((0, 1), (0, prompts - 1), (prompts - 2, prompts - 1)):
        differences = np.zeros(prompts)
        differences[list(pair)] = 1.0
        assert sign_flip_test(differences, 0 * differences) == pytest.approx(0.5, abs=0.02)
    assert sign_flip_test(0 * differences, 0 * differences) == 1.0


def test_sign_flip_test_of_many_prompts_estimates_the_exact_share():
    differences = [4.0, -1.0, 3.0, 2.0, -2.0, 5.0, 1.0, -4.0, 2.0, 3.0, 1.0]
    estimate = sign_flip_test(differences, [0.0] * 11, resamples=2000)  # fewer than 2 ** 11
    assert sign_flip_test(differences, [0.0] * 11) == all_signs(differences)
    assert estimate == pytest.approx(all_signs(differences), abs=0.03)


def test_sign_flip_test_rejects_a_true_null_hypothesis_as_often_as_it_claims():
    generator = np.random.default_rng(0)
    pairs = [(generator.exponential(10, 30), generator.exponential(10, 30)) for _ in range(1000)]
    p_values = np.array([sign_flip_test(*pair, resamples=500, seed=i) for i, pair in enumerate(pairs)])
    for level in (0.05, 0.2, 0.5):
        # within 3.3 standard errors
        assert np.mean(p_values <= level) == pytest.approx(level, abs=3.3 * (level * (1 - level) / 1000) ** 0.5)


def test_sign_flip_test_finds_a_small_difference_between_unlike_prompts():
    baseline = np.random.default_rng(2).normal(50, 20, 200)
    difference = np.random.default_rng(3).normal(1, 2, 200)
    assert sign_flip_test(baseline + difference, baseline) == 1 / 10_001  # none of the random signs
    assert sign_flip_test(baseline, baseline + difference, resamples=99) == 1 / 100


def test_sign_flip_test_of_different_prompts_or_none_is_refused():
    with pytest.raises(ValueError, match="2 values and 3"):
        sign_flip_test([1.0, 2.0], [1.0, 2.0, 3.0])
    with pytest.raises(ValueError, match="0 values and 0"):
        sign_flip_test([], [])


@pytest.mark.parametrize(
    ("p_values", "expected"),
    [
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),  # 3 * 0.01; 2 * 0.03; 0.04 but not below the one before
        ([0.5, 0.4], [0.8, 0.8]),
        ([0.9, 0.8], [1.0, 1.0]),
        ([0.02], [0.02]),
        ([], []),
    ],
)
def test_holm_correction_of_hand_computed_cases_is_exact(p_values, expected):
    assert holm_correction(p_values) == pytest.approx(expected)


def test_differences_are_taken_in_measures_that_both_models_have_for_every_prompt():
    generator = np.random.default_rng(0)
    rows = {name: [dict(zip("xyz", generator.normal(size=3), strict=True)) for _ in range(12)] for name in "abc"}
    del rows["a"][3]["x"]  # a measure of some prompts alone
    del rows["c"][0]["y"]
    results = {name: SimpleNamespace(summary=["x", "y", "z"], per_prompt=own) for name, own in rows.items()}
    found = paired_differences(results, "a")
    assert {measure: set(models) for measure, models in found.items()} == {"y": {"b"}, "z": {"b", "c"}}
    values = {name: [row["z"] for row in own] for name, own in rows.items()}
    p_values = [sign_flip_test(values[name], values["a"]) for name in "bc"]
    for name, p, p_holm in zip("bc", p_values, holm_correction(p_values), strict=True):
        assert found["z"][name] == (paired_bootstrap(values[name], values["a"]), p, p_holm)
    for p_holm, is_significant in ((0.05, True), (0.051, False)):
        assert Difference(found["z"]["b"].interval, 0.01, p_holm).is_significant == is_significant
