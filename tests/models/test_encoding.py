"""Token ids of texts, conversations and pairs."""

from types import SimpleNamespace

import pytest
from chat_models import CHATML, TEXT_END, TURN_END, TURN_START, answer, build_chat_tokenizer, question
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from minillm_trl.errors import UserError
from minillm_trl.models.encoding import (
    added_tokens,
    encode_after_prompt,
    encode_pair,
    encode_prompts,
    encode_texts,
    holds_conversations,
    stop_appending,
    without_extra_tokens,
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
            assert not loaded.add_eos_token
            words = PLAIN("the")["input_ids"] + PLAIN("mill")["input_ids"]
            assert loaded("the", "mill")["input_ids"] == [1][: int(with_bos)] + words

    def test_completion_apart_from_its_prompt_gets_no_tokens_of_a_text(self, with_bos):
        """Where a token would span the border."""
        start = [1][: int(with_bos)] + PLAIN("near ")["input_ids"]
        expected = [*start, *PLAIN("the")["input_ids"], 2]
        assert encode_after_prompt(appending(with_bos), "near ", "the") == (len(start), expected)


@pytest.mark.parametrize(("known", "expected"), [(each, ([1], [2])) for each in "a0."] + [("x", ([], []))])
def test_vocabulary_need_not_have_every_character(known: str, expected: tuple):
    tokenizer = Tokenizer(models.BPE(vocab={"<pad>": 0, "<s>": 1, "</s>": 2, known: 3}, merges=[]))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    assert added_tokens(PreTrainedTokenizerFast(tokenizer_object=tokenizer)) == expected


def test_only_what_a_tokenizer_added_is_dropped():
    rows = [[1, 5, 2], [1, 5], [1], [], [1, 1, 2], [1, 1, 5]]
    expected = [[1, 5], [1, 5], [1], [], [1], [1, 5]]
    assert without_extra_tokens(rows, [1], [2]) == expected
    assert without_extra_tokens(rows, [], []) == rows
    assert without_extra_tokens([[1, 3, 1, 3, 5], [1, 3, 1, 5, 2, 4]], (1, 3), (2, 4)) == [[1, 3, 5], [1, 3, 1, 5]]


def test_slow_tokenizer_that_appends_is_refused():
    def encode(text: str, add_special_tokens: bool = True) -> dict:
        return {"input_ids": [7, 2] if add_special_tokens else [7]}

    class Slow(SimpleNamespace):
        is_fast, name_or_path, add_eos_token = False, "slow", True
        __call__, decode = staticmethod(encode), staticmethod(str)

    with pytest.raises(UserError, match=r"'slow' appends '\[2\]' to every text.*add_eos_token=False"):
        stop_appending(Slow())


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

    def test_end_that_is_written_is_not_written_twice(self):
        expected = encode_after_prompt(PLAIN, "the", " mill")
        assert encode_after_prompt(PLAIN, "the", f" mill{TEXT_END}") == expected

    def test_conversation_is_that_of_its_prompt(self):
        (prompt,) = encode_prompts(PLAIN, [question("the mill")])
        expected = [*prompt, *PLAIN("a pub<|im_end|>\n")["input_ids"]]
        assert encode_after_prompt(PLAIN, question("the mill"), answer("a pub")) == (len(prompt), expected)

    def test_template_that_changes_the_prompt_is_refused(self):
        tokenizer = build_chat_tokenizer(template="{{ messages|length }}" + CHATML)
        with pytest.raises(UserError, match=r"^rows.jsonl: the chat template renders a prompt differently.*the mill"):
            encode_after_prompt(tokenizer, question("the mill"), answer("a pub"), source="rows.jsonl")


class TestPrompts:
    def test_texts_and_conversations_keep_their_order(self):
        chat = PLAIN("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        found = encode_prompts(PLAIN, ["the", question("a"), "mill", question("a")])
        assert found == [PLAIN("the")["input_ids"], chat, PLAIN("mill")["input_ids"], chat]

    def test_conversation_without_a_template_is_refused_by_its_number(self):
        with pytest.raises(UserError, match="Prompt 1 is a conversation, but the tokenizer has no chat template"):
            encode_prompts(build_chat_tokenizer(template=None), ["the", question("a")])

    def test_prompt_without_tokens_is_refused_by_its_number(self):
        with pytest.raises(UserError, match=r"Prompt 1 \(''\) has no tokens"):
            encode_prompts(PLAIN, ["the", ""])

    @pytest.mark.parametrize(
        ("row", "expected"),
        [
            ({"prompt": question("a")}, True),
            ({"messages": question("a")}, True),
            ({"conversations": question("a"), "prompt": "a"}, True),
            ({"prompt": "a", "completion": "b"}, False),
            ({"text": "a"}, False),
        ],
    )
    def test_first_row_tells_whether_rows_are_conversations(self, row: dict, expected: bool):
        rows = Dataset.from_list([row])
        assert holds_conversations(rows) is holds_conversations(rows.to_iterable_dataset()) is expected
        assert not holds_conversations(rows.select([]))


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

    def test_tokenizer_without_an_end_adds_none(self):
        assert encode_pair(build_chat_tokenizer(None), "the", " mill") == (
            PLAIN("the")["input_ids"],
            PLAIN(" mill")["input_ids"],
        )

    @pytest.mark.parametrize("prompt", ["", "x"])
    def test_first_token_is_never_learnt(self, prompt: str):
        """Not without a prompt, and not where the prompt's only token becomes another one."""
        tokenizer = build_chat_tokenizer(TEXT_END)
        tokenizer.add_tokens(["xthe"])
        first, *rest = [*tokenizer(f"{prompt}the mill")["input_ids"], 0]
        assert encode_pair(tokenizer, prompt, "the mill") == ([first], rest)

    @pytest.mark.parametrize(("prompt", "completion"), [("a", answer("b")), (question("a"), "b")])
    def test_text_with_a_conversation_is_refused(self, prompt, completion):
        for encode in (encode_pair, encode_after_prompt):
            with pytest.raises(TypeError, match="give two texts or two conversations"):
                encode(PLAIN, prompt, completion)

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
