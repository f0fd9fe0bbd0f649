"""`generate_completions` against a slow loop that samples one prompt at a time without a cache."""

import itertools

import pytest
import torch
from chat_models import TEXT_END, TURN_END, TURN_START, build_chat_tokenizer
from conftest import build_model, build_tokenizer

from minillm_trl.rollouts.keyed_random import draw_seed, keyed_uniforms
from minillm_trl.rollouts.prompts import Completion, end_token_ids, generate_completions

TOKENIZER = build_tokenizer()
VOCAB = len(TOKENIZER)
PROMPTS = ["the mill is cheap", "a pub", "river", "the city centre and"]
LIMIT = 7


def make_model(vocab: int = VOCAB, seed: int = 0):
    """Return a model that ends about a third of its answers by the limit."""
    model = build_model("gpt2", vocab, seed, width=16, layers=1)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(3.0)
    return model


@torch.no_grad()
def slow_completion(
    model, prompt: list[int], key: tuple[int, ...] | None, ends: list[int], temperature: float = 1.0
) -> list[int]:
    """Each token by the inverse CDF over the tokenizer's vocabulary, or the most likely one without a key."""
    numbers = [None] * LIMIT if key is None else keyed_uniforms(LIMIT, *key)
    tokens: list[int] = []
    for number in numbers:
        logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, -1, :VOCAB].double()
        if number is None:
            tokens.append(int(logits.argmax()))
        else:
            sums = torch.softmax(logits / temperature, -1).cumsum(-1)
            tokens.append(int((sums <= number).sum()))
        if tokens[-1] in ends:
            break
    return tokens


def expected(model, keys, tokenizer=TOKENIZER, ends: tuple[int, ...] = (0,), temperature: float = 1.0):
    ids = [tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    found = [slow_completion(model, row, key, list(ends), temperature) for row, key in zip(ids, keys, strict=True)]
    texts = [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in found]
    return [Completion(text, tokens, tokens[-1] in ends) for text, tokens in zip(texts, found, strict=True)]


@pytest.mark.parametrize(
    ("options", "keys", "temperature"),
    [
        ({"seed": 5}, [(5, n) for n in range(4)], 1.0),
        ({"seed": 5, "sample": 2}, [(5, n, 2) for n in range(4)], 1.0),
        ({"seed": 5, "indices": [7, 3, 0, 9]}, [(5, n) for n in (7, 3, 0, 9)], 1.0),
        ({"seed": 6, "temperature": 0.5}, [(6, n) for n in range(4)], 0.5),
        ({"seed": 6, "temperature": 1.5, "batch_size": 3}, [(6, n) for n in range(4)], 1.5),
        ({"greedy": True, "batch_size": 1}, [None] * 4, 1.0),
    ],
    ids=str,
)
def test_completions_are_those_of_a_slow_loop(options: dict, keys: list, temperature: float):
    """Of a model with more rows than the tokenizer has tokens, which are never sampled, and in training mode."""
    model = make_model(VOCAB + 30)
    wanted = expected(model, keys, temperature=temperature)
    model.train()
    assert generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT, **options) == wanted
    assert not model.training


def test_some_completions_end_and_some_are_cut():
    found = generate_completions(make_model(), TOKENIZER, PROMPTS * 20, max_new_tokens=LIMIT, seed=1)
    assert {completion.finished for completion in found} == {True, False}
    for completion in found:
        assert completion.finished == (completion.token_ids[-1] == TOKENIZER.eos_token_id)
        assert completion.finished or len(completion.token_ids) == LIMIT
        assert "<eos>" not in completion.text


def test_without_a_seed_one_is_drawn_from_the_generator_of_torch():
    model = make_model()
    torch.manual_seed(3)
    seed = draw_seed()
    torch.manual_seed(3)
    first = generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT)
    second = generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT)
    assert first == generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT, seed=seed)
    assert second != first
    zero = generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT, seed=0)
    assert zero == expected(model, [(0, n) for n in range(4)])


def test_other_tokens_can_end_a_completion():
    model, end = make_model(), TOKENIZER.convert_tokens_to_ids("e")
    options = {"max_new_tokens": LIMIT, "seed": 2, "eos_tokens": ["e"]}
    found = generate_completions(model, TOKENIZER, PROMPTS, **options)
    assert found == expected(model, [(2, n) for n in range(4)], ends=(end,))
    assert end_token_ids(model, TOKENIZER, eos_tokens=["e"]) == [end]
    assert end_token_ids(model, TOKENIZER) == [TOKENIZER.eos_token_id]
    model.generation_config.eos_token_id = [end]
    assert end_token_ids(model, TOKENIZER) == [TOKENIZER.eos_token_id, end]
    assert generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT, seed=2) == expected(
        model, [(2, n) for n in range(4)], ends=(TOKENIZER.eos_token_id, end)
    )


def test_blocked_ngrams_are_not_repeated():
    model, options = make_model(), {"max_new_tokens": 24, "greedy": True}
    plain, blocked = (
        generate_completions(model, TOKENIZER, PROMPTS, **options, no_repeat_ngram_size=size) for size in (0, 2)
    )
    assert plain != blocked
    for prompt, completion in zip(PROMPTS, blocked, strict=True):
        ids = TOKENIZER(prompt)["input_ids"] + completion.token_ids
        before = len(ids) - len(completion.token_ids)
        pairs = list(itertools.pairwise(ids))
        assert all(pair not in pairs[:n] for n, pair in enumerate(pairs) if n + 1 >= before)


@pytest.mark.parametrize("batch_size", [2, 3, 64])
def test_batches_are_reported_with_their_size(batch_size: int):
    rows: list[int] = []
    options = {"max_new_tokens": 3, "seed": 1, "batch_size": batch_size, "on_batch": rows.append}
    generate_completions(make_model(), TOKENIZER, [*PROMPTS, "pub"], **options)
    assert rows == {2: [2, 2, 1], 3: [3, 2], 64: [5]}[batch_size]


def test_conversations_go_through_the_template_and_end_with_a_turn():
    """Texts do not end with a turn, whose token the model likes."""
    tokenizer = build_chat_tokenizer(TEXT_END)
    tokenizer.chat_template = (
        "{{ extra }}{% for m in messages %}{{ m['content'] + (closing or '<|im_end|>') }}{% endfor %}"
        "{% if add_generation_prompt %}> {% endif %}"
    )
    model = build_model("gpt2", len(tokenizer), 3, width=16, layers=1)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    end, turn_end = (tokenizer.convert_tokens_to_ids(name) for name in (TEXT_END, TURN_END))
    likely = torch.zeros(len(tokenizer)).index_fill(0, torch.tensor([turn_end]), 5.0)
    model.lm_head.register_forward_hook(lambda module, args, output: output + likely)
    assert end_token_ids(model, tokenizer, True) == [end, turn_end]
    assert end_token_ids(model, tokenizer) == [end]
    other = tokenizer.convert_tokens_to_ids(TURN_START)
    assert end_token_ids(model, tokenizer, True, chat_template_kwargs={"closing": TURN_START}) == [end, other]
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    options = {"max_new_tokens": LIMIT, "seed": 4}
    for kwargs in (None, {"extra": "a pub "}):
        found = generate_completions(model, tokenizer, chats, **options, chat_template_kwargs=kwargs)
        assert any(completion.token_ids[-1] == turn_end for completion in found)
        texts = [(kwargs or {"extra": ""})["extra"] + prompt + "<|im_end|>> " for prompt in PROMPTS]
        for row, (text, completion) in enumerate(zip(texts, found, strict=True)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert completion.token_ids == slow_completion(model, ids, (4, row), [end, turn_end])
            assert completion.finished == (completion.token_ids[-1] in (end, turn_end))
        plain = generate_completions(model, tokenizer, texts, **options)
        assert any(turn_end in completion.token_ids[:-1] for completion in plain)
    mixed = generate_completions(model, tokenizer, [texts[0], *chats[1:]], **options, chat_template_kwargs=kwargs)
    assert mixed[1:] == found[1:]


def test_tokenizer_without_a_padding_token_pads_with_its_end():
    tokenizer = build_tokenizer()
    tokenizer.pad_token = None
    model = make_model()
    found = generate_completions(model, tokenizer, PROMPTS, max_new_tokens=LIMIT, seed=5)
    assert found == generate_completions(model, TOKENIZER, PROMPTS, max_new_tokens=LIMIT, seed=5)


def test_token_without_an_embedding_is_refused():
    small = build_model("gpt2", VOCAB - 1, width=16, layers=1)
    tokenizer = build_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(VOCAB - 1)
    with pytest.raises(ValueError, match=rf"gives the token {VOCAB - 1} .* {VOCAB - 1} embeddings"):
        generate_completions(small, tokenizer, ["a"], max_new_tokens=2, seed=1)
    with pytest.raises(ValueError, match=r"Prompt 1 .* has no tokens"):
        generate_completions(small, TOKENIZER, ["a", ""], max_new_tokens=2, seed=1)
