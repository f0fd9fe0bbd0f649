"""Divergences and losses of given completions, token by token, against plain loops over full logits in float64."""

import copy
import itertools
import math

import pytest
import torch
from conftest import FAMILIES, build_model

from minillm_trl.evaluation.divergence import (
    completion_losses,
    score_completions,
    score_requests,
    token_divergences,
)
from minillm_trl.models import fused_head
from minillm_trl.models.lm_head import LMHead, check_embedded

PROMPTS = [[5], [6, 7, 8], [9, 9], [4, 3, 2, 10, 11]]
COMPLETIONS = [[9, 10, 0], [11], [], [12, 13, 14, 15, 0]]
VOCABULARY = 40
# first and second model and their numbers of vocabulary rows, of which they share the first 40
PAIRS = [
    ("gpt2", 40, "gpt2", 40),
    ("gpt2", 40, "llama", 56),
    ("opt", 64, "gemma2", 40),
]


def full_log_probs(model, prompt, completion, rows, temperature=1.0):
    """`(T, rows)`, float64, from the logits of one sequence without padding."""
    with torch.no_grad():
        logits = copy.deepcopy(model).double()(torch.tensor([prompt + completion])).logits[0, :, :rows]
    return torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1].tolist()


def pair(case):
    first, first_rows, second, second_rows = case
    return build_model(first, first_rows), build_model(second, second_rows, seed=1)


def approx(expected, **options):
    return [pytest.approx(values, **options) for values in expected]


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_divergence_of_each_token_is_the_sum_over_the_shared_vocabulary(case, temperature):
    first, second = pair(case)
    expected = []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        log_f, log_s = (
            full_log_probs(model, prompt, completion, VOCABULARY, temperature) for model in (first, second)
        )
        expected.append(
            [
                sum(math.exp(a) * (a - b) for a, b in zip(f_t, s_t, strict=True))
                for f_t, s_t in zip(log_f, log_s, strict=True)
            ]
        )
    options = {"vocab_size": VOCABULARY, "temperature": temperature}
    assert token_divergences(first, second, PROMPTS, COMPLETIONS, **options) == approx(expected, rel=1e-4)


def test_each_model_has_its_own_temperature():
    first, second = pair(PAIRS[1])
    options = {"vocab_size": VOCABULARY, "temperature": 0.5, "second_temperature": 1.4}
    found = score_completions(first, second, PROMPTS, COMPLETIONS, **options)
    entropies, divergences = [], []
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
        log_f = full_log_probs(first, prompt, completion, VOCABULARY, 0.5)
        log_s = full_log_probs(second, prompt, completion, VOCABULARY, 1.4)
        entropies.append([-sum(math.exp(a) * a for a in row) for row in log_f])
        divergences.append(
            [
                sum(math.exp(a) * (a - b) for a, b in zip(f_t, s_t, strict=True))
                for f_t, s_t in zip(log_f, log_s, strict=True)
            ]
        )
    assert found.entropy == approx(entropies, rel=1e-4)
    assert found.divergence == approx(divergences, rel=1e-4)


def test_entropy_needs_no_second_model():
    first, second = pair(PAIRS[1])
    alone = score_completions(first, None, PROMPTS, COMPLETIONS, vocab_size=VOCABULARY)
    both = score_completions(first, second, PROMPTS, COMPLETIONS, vocab_size=VOCABULARY)
    assert alone.divergence is None
    assert alone.entropy == approx(both.entropy)
    assert score_completions(first, second, [], [], vocab_size=VOCABULARY) == ([], [])


def test_temperature_is_1_by_default_and_the_second_model_s_that_of_the_first():
    first, second = pair(PAIRS[1])
    for temperature in ({}, {"temperature": 0.5}):
        both = {"temperature": 1.0, **temperature}
        both["second_temperature"] = both["temperature"]
        for scores in (score_completions, token_divergences):
            found = scores(first, second, PROMPTS, COMPLETIONS, vocab_size=VOCABULARY, **temperature)
            assert found == scores(first, second, PROMPTS, COMPLETIONS, vocab_size=VOCABULARY, **both)
    assert completion_losses(first, PROMPTS, COMPLETIONS) == completion_losses(
        first, PROMPTS, COMPLETIONS, temperature=1.0
    )


def test_sum_along_a_completion_averages_to_the_divergence_of_whole_completions():
    """Every completion of two tokens of a vocabulary of five, each with its probability under the first model."""
    rows, prompt = 5, [7, 8]
    first, second = pair(PAIRS[1])
    completions = [list(tokens) for tokens in itertools.product(range(rows), repeat=2)]
    sums = [
        sum(values)
        for values in token_divergences(first, second, [prompt] * len(completions), completions, vocab_size=rows)
    ]
    expected = actual = 0.0
    for completion, total in zip(completions, sums, strict=True):
        log_f, log_s = (
            sum(
                row[token]
                for row, token in zip(full_log_probs(model, prompt, completion, rows), completion, strict=True)
            )
            for model in (first, second)
        )
        expected += math.exp(log_f) * (log_f - log_s)
        actual += math.exp(log_f) * total
    assert actual == pytest.approx(expected, rel=1e-4)


def test_a_model_has_no_divergence_from_itself():
    model = build_model("gpt2", 40)
    assert token_divergences(model, model, PROMPTS, COMPLETIONS, vocab_size=40) == [[0.0] * 3, [0.0], [], [0.0] * 5]


@pytest.mark.parametrize("family", FAMILIES)
def test_mean_loss_is_that_of_transformers(family):
    model = build_model(family, 56)
    losses = completion_losses(model, PROMPTS, COMPLETIONS)
    for prompt, completion, found in zip(PROMPTS, COMPLETIONS, losses, strict=True):
        assert len(found) == len(completion)
        if completion:
            labels = torch.tensor([[-100] * len(prompt) + completion])
            with torch.no_grad():
                expected = model(torch.tensor([prompt + completion]), labels=labels).loss.item()
            assert sum(found) / len(found) == pytest.approx(expected, rel=1e-4)


def test_loss_of_each_token_is_its_negative_log_prob():
    model = build_model("gpt2", 40)
    expected = [
        [-row[token] for row, token in zip(full_log_probs(model, prompt, completion, 40), completion, strict=True)]
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    assert completion_losses(model, PROMPTS, COMPLETIONS) == approx(expected, rel=1e-4)


def measured(prompts, completions, batch_size):
    first, second = pair(PAIRS[1])
    divergences = token_divergences(first, second, prompts, completions, vocab_size=40, batch_size=batch_size)
    return divergences, completion_losses(first, prompts, completions, batch_size=batch_size)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_values_do_not_depend_on_batches_or_order(batch_size):
    backwards = measured(PROMPTS[::-1], COMPLETIONS[::-1], batch_size)
    for one, other in zip(measured(PROMPTS, COMPLETIONS, 64), backwards, strict=True):
        assert one == approx(other[::-1], rel=1e-4)


def test_a_forward_pass_has_at_most_the_rows_of_a_batch_and_no_gradients():
    first, second = pair(PAIRS[1])
    rows, with_gradients = [], []

    def note(module, arguments, keywords):
        rows.append(len(keywords["input_ids"]))
        with_gradients.append(torch.is_grad_enabled())

    for model in (first, second):
        model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    token_divergences(first, second, PROMPTS, COMPLETIONS, vocab_size=40, batch_size=3)
    completion_losses(first, PROMPTS, COMPLETIONS, batch_size=3)
    assert sorted(rows) == [1, 1, 1, 3, 3, 3]
    assert not any(with_gradients)


def test_logits_exist_for_a_chunk_of_tokens_at_a_time(monkeypatch):
    expected = measured(PROMPTS, COMPLETIONS, 64)
    sizes = []
    logits = LMHead.logits

    def recorded(self, hidden_states, vocab_size):
        sizes.append(len(hidden_states))
        return logits(self, hidden_states, vocab_size)

    monkeypatch.setattr(LMHead, "logits", recorded)
    monkeypatch.setattr(fused_head, "CHUNK_ELEMENTS", 2 * VOCABULARY)
    for one, other in zip(measured(PROMPTS, COMPLETIONS, 64), expected, strict=True):
        assert one == approx(other, rel=1e-4)
    assert max(sizes) == 2
    assert sum(sizes) == 3 * sum(map(len, COMPLETIONS))  # both models for the divergence, one for the loss


def test_long_rows_come_first_and_batches_are_padded_on_both_sides():
    found = list(score_requests(PROMPTS, COMPLETIONS, 3, torch.device("cpu")))
    assert [rows for rows, _ in found] == [[3, 0, 1], [2]]  # 10, 4, 4 and 2 tokens
    (_, first), (_, second) = found
    padding = [0] * 4
    assert first.input_ids.tolist() == [
        [4, 3, 2, 10, 11, 12, 13, 14, 15, 0],
        [*padding, 5, 9, 10, 0, 0, 0],
        [0, 0, 6, 7, 8, 11, *padding],
    ]
    mask = [[True] * 10, [False] * 4 + [True] * 4 + [False] * 2, [False] * 2 + [True] * 4 + [False] * 4]
    assert first.attention_mask.tolist() == mask
    assert first.completion_mask.tolist() == [row[5:] for row in mask]
    assert second.input_ids.tolist() == [[9, 9, 0]]  # room for a token although there is none
    assert second.attention_mask.tolist() == [[True, True, False]]
    assert second.completion_mask.tolist() == [[False]]
    assert {request.attention_mask.dtype for _, request in found} == {torch.bool}


@pytest.mark.parametrize("scores", [token_divergences, completion_losses, score_completions])
def test_rows_of_a_forward_pass_by_default(scores):
    first, second = pair(PAIRS[0])
    rows = []
    first.base_model.register_forward_pre_hook(
        lambda module, arguments, keywords: rows.append(len(keywords["input_ids"])), with_kwargs=True
    )
    others = () if scores is completion_losses else (second,)
    scores(first, *others, [[5]] * 65, [[7]] * 65, vocab_size=40)
    assert rows == [64, 1]


@pytest.mark.parametrize(("temperature", "vocab_size"), [(0.5, None), (1.0, 40), (2.0, 40)])
def test_loss_has_the_temperature_and_the_vocabulary_that_are_asked_for(temperature, vocab_size):
    model = build_model("gpt2", 56)
    expected = [
        [-row[token] for row, token in zip(full_log_probs(*case, vocab_size, temperature), case[2], strict=True)]
        for case in zip([model] * 4, PROMPTS, COMPLETIONS, strict=True)
    ]
    found = completion_losses(model, PROMPTS, COMPLETIONS, vocab_size=vocab_size, temperature=temperature)
    assert found == approx(expected, rel=1e-4)


def test_no_completions_have_no_values():
    assert measured([], [], 8) == ([], [])


def test_prompt_without_tokens_is_refused():
    with pytest.raises(ValueError, match="Prompt 1 has no tokens"):
        completion_losses(build_model("gpt2", 40), [[3, 4], []], [[1], [2]])


def test_token_without_an_embedding_is_named():
    with pytest.raises(ValueError, match=r"gives the token 40 in a prompt, a reference .* has 40 embeddings only"):
        completion_losses(build_model("gpt2", 40), [[3, 4], [5]], [[], [40]])
    check_embedded(build_model("gpt2", 40), [[39], []])  # an empty reference


def test_prompts_without_their_completions_are_refused():
    with pytest.raises(ValueError, match="one completion: got 2 prompts and 1 completions"):
        measured([[3], [4]], [[1]], 8)
