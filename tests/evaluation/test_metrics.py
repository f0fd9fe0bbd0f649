"""Rouge-L, exact match, repetition and diversity against values computed by hand."""

import math

import pytest
from rouge_score.rouge_scorer import RougeScorer

from minillm_trl.evaluation.metrics import (
    distinct_ngrams,
    distinct_outputs,
    exact_match,
    repeated_ngrams,
    rouge_l,
    self_bleu,
)

# (prediction, references, 100 * 2PR / (P + R) with P, R = LCS / words of prediction, of reference)
ROUGE_CASES = [
    ("police kill the gunman", ["police killed the gunman"], 100.0),  # stems
    ("the cat sat", ["the cat sat"], 100.0),
    ("the cat sat", ["the cat sat on the mat"], 200 / 3),  # LCS 3 of 3 and of 6 words
    ("the cat sat on the mat", ["the cat sat"], 200 / 3),
    ("the gunman kill police", ["police kill the gunman"], 50.0),  # LCS "the gunman": order counts
    ("a x b y c", ["a b c"], 75.0),  # LCS 3 of 5 and of 3: a subsequence, not a substring
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
    ("outputs", "expected"),
    [(["a", "b", "c"], 1.0), (["a", "a", "b"], 2 / 3), (["a", "a", "a"], 1 / 3), (["a"], 1.0), (["a", " a\n"], 0.5)],
)
def test_distinct_outputs_is_the_share_of_different_texts(outputs, expected):
    assert distinct_outputs(outputs) == pytest.approx(expected)


def test_distinct_outputs_without_outputs_is_refused():
    with pytest.raises(ValueError, match="at least one output"):
        distinct_outputs([])


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


def test_distinct_ngrams_by_default_counts_4grams():
    assert distinct_ngrams(["a b c d a b c d"]) == distinct_ngrams(["a b c d a b c d"], 4) == 0.8


def test_distinct_ngrams_of_no_length_are_refused():
    with pytest.raises(ValueError, match="n >= 1"):
        distinct_ngrams(["a"], 0)
