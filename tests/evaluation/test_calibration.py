"""Label words against loops over full logits, and the calibration error against numbers worked out by hand."""

import copy
import random

import numpy as np
import pytest
import torch
from conftest import build_model, build_tokenizer
from tokenizers.processors import TemplateProcessing

from minillm_trl.evaluation.calibration import CalibrationBin, calibration
from minillm_trl.evaluation.label_words import label_probabilities
from minillm_trl.evaluation.statistics import bootstrap_interval

TOKENIZER = build_tokenizer()
PROMPTS = ["the mill is", "food near the river:", "a", "the punter serves italian food and"]
ONE_TOKEN = [" the", " a", " near"]
SEVERAL_TOKENS = [" cheap", " the", " family", " friendly"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}the:{% endif %}"


def slow_probabilities(model, prompts, label_words):
    """Product of the probabilities of each word's tokens behind the prompt's, without padding, in float64."""
    model = copy.deepcopy(model).double()
    table = []
    for prompt_ids in prompts:
        row = []
        for word in label_words:
            word_ids = TOKENIZER(word)["input_ids"]
            with torch.no_grad():
                logits = model(torch.tensor([prompt_ids + word_ids])).logits[0]
            product = 1.0
            for position, token in enumerate(word_ids, start=len(prompt_ids) - 1):
                product *= torch.softmax(logits[position], dim=-1)[token].item()
            row.append(product)
        table.append([probability / sum(row) for probability in row])
    return np.array(table)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma2"])
@pytest.mark.parametrize("label_words", [ONE_TOKEN, SEVERAL_TOKENS])
def test_probabilities_of_label_words_are_the_products_of_their_tokens(family, label_words):
    model = build_model(family, len(TOKENIZER) + 20)
    actual = label_probabilities(model, TOKENIZER, PROMPTS, label_words)
    assert actual == pytest.approx(slow_probabilities(model, TOKENIZER(PROMPTS)["input_ids"], label_words), rel=1e-3)
    assert actual.sum(axis=1) == pytest.approx(1.0)


@pytest.mark.parametrize("label_words", [ONE_TOKEN, SEVERAL_TOKENS])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_probabilities_do_not_depend_on_batches_or_order(label_words, batch_size):
    model = build_model("gpt2", len(TOKENIZER))
    expected = label_probabilities(model, TOKENIZER, PROMPTS, label_words)
    backwards = label_probabilities(model, TOKENIZER, PROMPTS[::-1], label_words[::-1], batch_size=batch_size)
    assert backwards[::-1, ::-1] == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("conversational", [False, True])
def test_label_words_follow_the_special_tokens_of_a_text_or_the_template_of_a_conversation(conversational):
    tokenizer = build_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer.chat_template = TEMPLATE  # writes no special token
    prompts, encoded = PROMPTS, [[0, *ids] for ids in TOKENIZER(PROMPTS)["input_ids"]]
    if conversational:
        prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
        encoded = TOKENIZER([f"{text}\nthe:" for text in PROMPTS])["input_ids"]
    model = build_model("llama", len(tokenizer))
    actual = label_probabilities(model, tokenizer, prompts, SEVERAL_TOKENS)
    assert actual == pytest.approx(slow_probabilities(model, encoded, SEVERAL_TOKENS), rel=1e-3)


@pytest.mark.parametrize(("label_words", "rows"), [(ONE_TOKEN, 4), (SEVERAL_TOKENS, 16)])
def test_words_of_one_token_need_each_prompt_once(label_words, rows):
    model = build_model("gpt2", len(TOKENIZER))
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    label_probabilities(model, TOKENIZER, PROMPTS, label_words)
    assert sum(seen) == rows


@pytest.mark.parametrize(
    ("prompt", "label_words", "message"),
    [
        # the space of the prompt becomes part of the word's first token
        ("the mill: ", ["cheap", "food"], "Prompt 0 .* label word 'cheap'"),
        ("the mill:", [" cheap", ""], "label word '' .* prompt 0"),
        ("the mill:", [" cheap", " the", " cheap"], r"label word ' cheap' .* of ' cheap'"),
        ("the mill:", [" a.", " a"], r"tokens \[291\] of the label word ' a' .* of ' a\.'"),
        ("the mill:", [" cheap"], r"at least two label words, got \[' cheap'\]"),
        ("the mill:", " cheap", "at least two label words, got ' cheap'"),
        ("", [" cheap", " the"], "Prompt 0 .* has no tokens"),
    ],
)
def test_label_words_that_cannot_be_told_apart_are_refused(prompt, label_words, message):
    with pytest.raises(ValueError, match=message):
        label_probabilities(build_model("gpt2", len(TOKENIZER)), TOKENIZER, [prompt], label_words)


def test_no_prompts_are_refused():
    with pytest.raises(ValueError, match="no prompts to classify"):
        label_probabilities(build_model("gpt2", len(TOKENIZER)), TOKENIZER, [], ONE_TOKEN)


# (confidences, correct, number of bins, ECE)
CASES = [
    ([1.0, 1.0], [True, True], 10, 0.0),
    ([1.0, 1.0], [False, False], 10, 1.0),  # sure and wrong
    ([0.8] * 5, [True] * 4 + [False], 10, 0.0),  # right in four of five
    ([0.8] * 5, [True] * 5, 10, 0.2),
    ([0.55, 0.95], [False, True], 10, 0.3),  # (0.55 + 0.05) / 2
    ([0.55, 0.95], [False, True], 1, 0.25),  # one bin: mean confidence 0.75, accuracy 0.5
    ([0.65, 0.7, 0.75, 0.8], [True, True, False, False], 10, 0.55),  # 2/4 |1 - 0.675| + 2/4 |0 - 0.775|
    ([0.3], [True], 3, 0.7),
]


@pytest.mark.parametrize(("confidences", "correct", "bins", "expected"), CASES)
def test_calibration_error_of_hand_computed_cases(confidences, correct, bins, expected):
    found = calibration(confidences, correct, bins, resamples=10)
    assert found.ece == pytest.approx(expected, abs=1e-12)
    assert found.accuracy.mean == pytest.approx(sum(correct) / len(correct))


@pytest.mark.parametrize("bins", [1, 2, 3, 7, 10, 15, 20, 100])
def test_a_bin_holds_its_upper_border_and_not_its_lower_one(bins):
    for number in range(1, bins + 1):
        border = number / bins
        at = calibration([border], [True], bins, resamples=1)
        assert [bin_.count for bin_ in at.bins].index(1) == number - 1
        if number < bins:
            above = calibration([np.nextafter(border, 1)], [True], bins, resamples=1)
            assert [bin_.count for bin_ in above.bins].index(1) == number


def test_bins_have_borders_counts_and_means():
    found = calibration([0.2, 0.25, 0.5, 0.6, 1.0], [True, False, False, True, True], 4, resamples=10)
    assert found.bins == [
        CalibrationBin(0.0, 0.25, 2, pytest.approx(0.225), 0.5),
        CalibrationBin(0.25, 0.5, 1, 0.5, 0.0),
        CalibrationBin(0.5, 0.75, 1, 0.6, 1.0),
        CalibrationBin(0.75, 1.0, 1, 1.0, 1.0),
    ]
    assert calibration([0.9], [True], 2, resamples=1).bins[0] == CalibrationBin(0.0, 0.5, 0, None, None)


def predictions(count, excess, seed):
    """Confidences over (0.5, 1), right with that probability less `excess`."""
    generator = np.random.default_rng(seed)
    confidences = generator.uniform(0.5, 1.0, count)
    return confidences.tolist(), (generator.random(count) < confidences - excess).tolist()


@pytest.mark.parametrize("bins", [1, 10, 15])
def test_calibration_error_equals_a_slow_one_in_any_order(bins):
    confidences, correct = predictions(200, 0.1, seed=0)
    expected = 0.0
    for number in range(bins):
        inside = [i for i, value in enumerate(confidences) if number / bins < value <= (number + 1) / bins]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidences[i] for i in inside) / len(inside)
            expected += len(inside) / 200 * abs(accuracy - mean)
    assert calibration(confidences, correct, bins, resamples=10).ece == pytest.approx(expected, abs=1e-12)
    rows = list(range(200))
    random.Random(0).shuffle(rows)
    shuffled = calibration([confidences[i] for i in rows], [correct[i] for i in rows], bins, resamples=10)
    assert shuffled.ece == pytest.approx(expected, abs=1e-12)


def test_numbers_of_any_kind_are_computed_in_float64():
    confidences, correct = (np.array(values, dtype=np.float32) for values in predictions(50, 0.1, seed=1))
    wide = calibration(confidences.astype(np.float64), correct.astype(bool), 3, resamples=10)
    assert calibration(confidences, correct, 3, resamples=10) == wide


def test_interval_of_confident_and_wrong_predictions_has_no_width():
    assert calibration([1.0] * 20, [False] * 20)[:3] == (1.0, 1.0, 1.0)


def test_intervals_of_many_predictions_are_the_normal_ones():
    confidences, correct = [0.8] * 400, [True] * 240 + [False] * 160
    found = calibration(confidences, correct, resamples=4000, seed=3)
    deviation = (0.6 * 0.4 / 400) ** 0.5
    assert found.low == pytest.approx(0.2 - 1.96 * deviation, abs=0.003)
    assert found.high == pytest.approx(0.2 + 1.96 * deviation, abs=0.003)
    assert found.accuracy == bootstrap_interval(correct, resamples=4000, seed=3)
    assert found.accuracy != calibration(confidences, correct, resamples=4000, seed=4).accuracy


@pytest.mark.parametrize("options", [{}, {"resamples": 300, "seed": 5}])
def test_interval_is_the_basic_one_of_the_rows_that_the_seed_draws(options):
    confidences, correct = map(np.array, predictions(25, 0.3, seed=2))
    rows = np.random.default_rng(options.get("seed", 0)).integers(25, size=(options.get("resamples", 10_000), 25))
    bin_of = np.ceil(confidences * 10)
    errors = sum(
        np.abs(((correct[rows] - confidences[rows]) * (bin_of[rows] == number)).mean(axis=1))
        for number in range(1, 11)
    )
    found = calibration(confidences, correct, **options)
    lower, upper = np.quantile(errors, [0.025, 0.975])
    assert (found.low, found.high) == pytest.approx((max(0, 2 * found.ece - upper), max(0, 2 * found.ece - lower)))
    assert found.accuracy == bootstrap_interval(correct, **options)
    assert len(found.bins) == 10


@pytest.mark.parametrize(("excess", "coverage"), [(0.0, 0.65), (0.2, 0.88)])
def test_interval_covers_the_true_error_also_where_that_is_zero(excess, coverage):
    """The quantiles of the resampled error never cover the 0 of calibrated predictions."""
    found = [calibration(*predictions(300, excess, seed), resamples=200, seed=seed) for seed in range(150)]
    assert np.mean([result.low <= excess <= result.high for result in found]) > coverage
    assert all(0 <= result.low <= result.high for result in found)


@pytest.mark.parametrize(
    ("confidences", "correct", "bins", "message"),
    [
        ([], [], 10, "got 0 confidences and 0 results"),
        ([0.5, 0.6], [True], 10, "got 2 confidences and 1 results"),
        ([0.5, 0.0], [True, True], 10, r"Confidence 1 is 0\.0, which is not in \(0, 1\]"),
        ([0.5, 93.0], [True, True], 10, r"Confidence 1 is 93\.0"),
        ([np.nextafter(1, 2)], [True], 10, r"Confidence 0 is 1\.0000000000000002"),
        ([float("nan")], [True], 10, "Confidence 0 is nan"),
        ([0.5], [True], 0, "bins >= 1, got 0"),
    ],
)
def test_impossible_predictions_are_refused(confidences, correct, bins, message):
    with pytest.raises(ValueError, match=message):
        calibration(confidences, correct, bins)
