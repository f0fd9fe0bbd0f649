"""Token ids of texts, conversations and pairs."""

import pytest
from chat_models import CHATML, TEXT_END, TURN_END, TURN_START, answer, build_chat_tokenizer, question
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from minillm_trl.models.encoding import (
    added_tokens,
    encode_after_prompt,
    encode_pair,
    encode_prompts,
    encode_texts,
    stop_appending,
)

PLAIN = build_chat_tokenizer(TEXT_END)


def appending(with_bos: bool = False):
    """A tokenizer that appends its EOS (id 2) and, if asked for, puts a BOS (id 1) first."""
    tokenizer = build_chat_tokenizer(TURN_END)
    tokenizer.bos_token = TURN_START
    if with_bos:
        tokenizer.add_bos_token = True
    tokenizer.add_eos_token = True
    assert tokenizer("the")["input_ids"][-1] == 2
    return tokenizer


@pytest.mark.parametrize("with_bos", [False, True])
class TestAppendedEos:
    def test_is_left_out_of_texts_and_prompts(self, with_bos):
        tokenizer = appending(with_bos)
        expected = [[1][: int(with_bos)] + PLAIN(text)["input_ids"] for text in ("the mill", "a")]
        assert added_tokens(tokenizer) == ([1] if with_bos else [], [2])
        assert encode_texts(tokenizer, ["the mill", "a"]) == expected
        assert encode_prompts(tokenizer, ["the mill", "a"]) == expected

    def test_pair_has_one_at_its_end_and_none_within(self, with_bos):
        context, learnt = encode_pair(appending(with_bos), "the", " mill")
        assert context == [1][: int(with_bos)] + PLAIN("the")["input_ids"]
        assert learnt == [*PLAIN(" mill")["input_ids"], 2]
        assert encode_pair(appending(with_bos), "the", " mill<|im_end|>") == (context, learnt)

    def test_can_be_switched_off_for_good(self, with_bos, tmp_path):
        tokenizer = appending(with_bos)
        assert stop_appending(tokenizer) == [2]
        assert stop_appending(tokenizer) == []
        tokenizer.save_pretrained(tmp_path)
        for loaded in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
            assert loaded("the mill")["input_ids"] == [1][: int(with_bos)] + PLAIN("the mill")["input_ids"]
            assert loaded.eos_token_id == 2


def test_a_text_that_holds_the_bos_gets_no_second_one():
    tokenizer = build_chat_tokenizer(TURN_END)
    tokenizer.bos_token = TURN_START
    tokenizer.add_bos_token = True
    assert tokenizer("<|im_start|>the")["input_ids"][:2] == [1, 1]
    assert encode_texts(tokenizer, ["<|im_start|>the", "the"]) == [[1, *PLAIN("the")["input_ids"]]] * 2
    assert encode_pair(tokenizer, "<|im_start|>the", " mill") == encode_pair(tokenizer, "the", " mill")


def test_tokenizer_that_adds_nothing_is_left_as_it_is():
    assert added_tokens(PLAIN) == ([], [])
    before = PLAIN.backend_tokenizer.to_str()
    assert stop_appending(PLAIN) == []
    assert PLAIN.backend_tokenizer.to_str() == before
    assert encode_texts(PLAIN, ["<|im_end|>the<|im_end|>", ""]) == [[2, *PLAIN("the")["input_ids"], 2], []]
    assert encode_texts(PLAIN, []) == []


class TestAfterPrompt:
    def test_completion_has_the_tokens_that_it_has_after_its_prompt(self):
        """Not those of a text of its own, which starts with a space here, as with SentencePiece."""
        tokenizer = build_chat_tokenizer(TURN_END)
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
        prompt, completion = tokenizer("the\n")["input_ids"], PLAIN("mill")["input_ids"]
        assert tokenizer("mill")["input_ids"] != completion
        assert encode_after_prompt(tokenizer, "the\n", "mill") == (len(prompt), [*prompt, *completion, 2])

    def test_prompt_keeps_its_tokens_where_one_would_span_the_border(self):
        prompt = PLAIN("near ")["input_ids"]
        assert PLAIN("near the")["input_ids"][: len(prompt)] != prompt
        expected = [*prompt, *PLAIN("the")["input_ids"], 0]
        assert encode_after_prompt(PLAIN, "near ", "the") == (len(prompt), expected)


class TestPair:
    def test_texts_are_joined_as_they_stand(self):
        context, learnt = encode_pair(PLAIN, "the punter:", " near the river")
        assert context == PLAIN("the punter:")["input_ids"]
        assert learnt == [*PLAIN(" near the river")["input_ids"], 0]

    def test_completion_begins_where_the_tokens_diverge(self):
        context, learnt = encode_pair(PLAIN, "a th", "e mill")
        whole = PLAIN("a the mill")["input_ids"]
        assert context + learnt == [*whole, 0]
        assert len(context) < len(PLAIN("a th")["input_ids"])

    def test_conversation_ends_as_the_template_writes_it(self):
        context, learnt = encode_pair(PLAIN, question("the mill"), answer("a pub"))
        assert PLAIN.decode(context) == "<|im_start|>user\nthe mill<|im_end|>\n<|im_start|>assistant\n"
        assert PLAIN.decode(learnt) == "a pub<|im_end|>\n"

    def test_template_is_given_its_arguments(self):
        tokenizer = build_chat_tokenizer(template="{{ note }}" + CHATML)
        for note in ("the ", "river "):
            context, _ = encode_pair(tokenizer, question("a"), answer("b"), {"note": note})
            (prompt,) = encode_prompts(tokenizer, [question("a")], {"note": note})
            assert note in tokenizer.decode(context)
            assert note in tokenizer.decode(prompt)
