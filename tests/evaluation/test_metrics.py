"""Rouge-L, exact match, repetition, diversity and bootstrap intervals against numbers worked out by hand."""

import math
import operator
from itertools import product

import numpy as np
import pytest
from rouge_score.rouge_scorer import RougeScorer

from minillm_trl.evaluation.metrics import (
    MeanInterval,
    bootstrap_interval,
    distinct_ngrams,
    distinct_outputs,
    exact_match,
    holm_correction,
    paired_bootstrap,
    repeated_ngrams,
    rouge_l,
    self_bleu,
    sign_flip_test,
)

# (prediction, references, 100 * 2PR / (P + R) with P, R = LCS / words of prediction, of reference)
ROUGE_CASES = [
    ("the cat sat", ["the cat sat"], 100.0),
    ("the cat sat", ["the cat sat on the mat"], 200 / 3),  # LCS 3 of 3 and of 6 words
    ("the cat sat on the mat", ["the cat sat"], 200 / 3),
    ("the gunman kill police", ["police kill the gunman"], 50.0),  # LCS "the gunman": order counts
    ("a x b y c", ["a b c"], 75.0),  # LCS 3 of 5 and of 3: a subsequence, not a substring
    ("police kill the gunman", ["police killed the gunman"], 100.0),  # stems
    ("The Punter, CHEAP!", ["the punter cheap"], 100.0),  # case and punctuation do not count
    ("  the cat sat \n", ["the cat sat"], 100.0),
    ("a b c d", ["nothing alike", "a b"], 200 / 3),  # the better reference: LCS 2 of 4 and of 2
    ("a b c d", ["a b", "nothing alike"], 200 / 3),
    ("red", ["blue"], 0.0),
    ("", ["the cat"], 0.0),
    (" \n", ["the cat"], 0.0),
    ("...", ["the cat"], 0.0),
]


@pytest.mark.parametrize(("prediction", "references", "expected"), ROUGE_CASES)
def test_rouge_l_of_hand_computed_cases_is_exact(prediction, references, expected):
    assert rouge_l(prediction, references) == pytest.approx(expected, abs=1e-9)


def test_rouge_l_equals_the_reference_package():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    for prediction, references, _ in ROUGE_CASES:
        scores = [scorer.score(reference, prediction)["rougeL"].fmeasure for reference in references]
        assert rouge_l(prediction, references) == pytest.approx(100 * max(scores), abs=1e-12)


@pytest.mark.parametrize("measure", [rouge_l, exact_match])
def test_no_references_are_refused(measure):
    with pytest.raises(ValueError, match=f"{measure.__name__} needs at least one reference"):
        measure("the cat", [])


@pytest.mark.parametrize(
    ("prediction", "references", "expected"),
    [
        ("positive", ["positive"], 100.0),
        (" positive\n", ["negative", "positive "], 100.0),
        ("Positive", ["positive"], 0.0),
        ("positive.", ["positive"], 0.0),
        ("pos  itive", ["pos itive"], 0.0),  # white space inside counts
        ("positive", ["negative", "neutral"], 0.0),
        ("", ["positive"], 0.0),
        (" ", [""], 100.0),
    ],
)
def test_exact_match_strips_and_normalises_nothing_else(prediction, references, expected):
    assert exact_match(prediction, references) == expected


# 100 * brevity penalty * (p_1 p_2 p_3 p_4)^(1/4) of each output against the others, averaged
SELF_BLEU_CASES = [
    (["a b c d e"] * 3, 100.0),
    (["a b c d e", "a b c d f"], 100 * 0.2**0.25),  # 4/5 3/4 2/3 1/2 both ways
    (["a b c d", "a b c d e f g h"], 50 * (math.exp(-1) + (1 / 2 * 3 / 7 * 1 / 3 * 1 / 5) ** 0.25)),  # 4 of 8 words
    (["a b c d", "d c b a"], 100 * (0.1 / 3 * 0.1 / 2 * 0.1 / 1) ** 0.25),  # no match above unigrams: 0.1 of 3, 2, 1
    (["a b", "a b"], 100.0),  # orders 1 and 2
    (["a b", "a c"], 100 * (1 / 2 * 0.1 / 1) ** 0.5),
    (["yes", "yes", "no"], 200 / 3),
    (["a b c d", "e f g h"], 0.0),
    (["A b c d", "a b c d"], 100 * (3 / 4 * 2 / 3 * 1 / 2 * 0.1) ** 0.25),  # case counts
    (["a b\nc d ", "a b c d"], 100.0),  # white space does not
    (["", " "], 100.0),
    (["", "a"], 0.0),
    (["", "a", ""], 200 / 3),
]


@pytest.mark.parametrize(("outputs", "expected"), SELF_BLEU_CASES)
def test_self_bleu_of_hand_computed_cases_is_exact(outputs, expected):
    assert self_bleu(outputs) == pytest.approx(expected, abs=1e-9)
    assert self_bleu(outputs[::-1]) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("outputs", [[], ["a b c d"]])
def test_self_bleu_without_another_output_is_refused(outputs):
    with pytest.raises(ValueError, match=f"at least two outputs, got {len(outputs)}"):
        self_bleu(outputs)


@pytest.mark.parametrize(
    ("token_ids", "n", "expected"),
    [
        ([1, 2, 1, 2, 1], 2, 0.5),  # 12 21 12 21: two of four stood before
        ([7] * 8, 4, 0.8),  # one distinct of five
        ([1, 2, 3, 4, 1, 2, 3, 4], 4, 0.2),  # 1234 stands twice among five
        ([1, 2, 3, 4, 5, 6], 4, 0.0),
        ([1, 2, 3, 4], 4, 0.0),
        ([1, 1, 1], 4, 0.0),  # no 4-grams at all
        ([], 4, 0.0),
        ([5, 5, 6], 1, 1 / 3),
    ],
)
def test_repeated_ngrams_of_hand_computed_cases_is_exact(token_ids, n, expected):
    assert repeated_ngrams(token_ids, n) == pytest.approx(expected, abs=1e-12)


def test_repeated_ngrams_by_default_counts_4grams():
    assert repeated_ngrams([7] * 8) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("outputs", "expected"), [(["a", "b", "c"], 1.0), (["a", "a", "b"], 2 / 3), (["a", "a", "a"], 1 / 3), (["a"], 1.0)]
)
def test_distinct_outputs_is_the_share_of_different_texts(outputs, expected):
    assert distinct_outputs(outputs) == pytest.approx(expected)


def test_distinct_outputs_without_outputs_is_refused():
    with pytest.raises(ValueError, match="at least one output"):
        distinct_outputs([])


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


@pytest.mark.parametrize("measure", [rouge_l, exact_match])
def test_one_text_for_references_is_refused(measure):
    with pytest.raises(ValueError, match=f"{measure.__name__} needs a list of references, got the text 'the cat'"):
        measure("the cat", "the cat")


def test_repeated_ngrams_of_length_zero_is_refused():
    with pytest.raises(ValueError, match="n >= 1, got 0"):
        repeated_ngrams([1, 2], 0)


@pytest.mark.parametrize(
    ("texts", "n", "expected"),
    [
        (["a b c", "a b d"], 2, 3 / 4),  # ab, bc, ab, bd
        (["a a a a"], 1, 1 / 4),
        (["a b", "c"], 3, 0.0),  # no trigram
        (["a b c d", "e f g h"], 4, 1.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_ngrams_is_the_share_of_different_ones_among_all_texts(texts, n, expected):
    assert distinct_ngrams(texts, n) == pytest.approx(expected)


def test_distinct_ngrams_of_no_length_are_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        distinct_ngrams(["a"], 0)


def all_signs(differences: list[float]) -> float:
    """The test by its definition, in exact arithmetic for integers."""
    sums = [abs(sum(map(operator.mul, signs, differences))) for signs in product((1, -1), repeat=len(differences))]
    return sum(each >= abs(sum(differences)) for each in sums) / len(sums)


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
    assert sign_flip_test([7 + each for each in differences], [7.0] * len(differences)) == expected


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
