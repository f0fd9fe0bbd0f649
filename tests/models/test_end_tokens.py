"""What ends a completion: whose tokens count, and what student and tokenizer carry."""

import pytest
from chat_models import CHATML, TEXT_END, TURN_END, TURN_START, build_chat_model, build_chat_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig

from minillm_trl.models.end_tokens import (
    carry,
    check_eos,
    declared_ends,
    find_end_tokens,
    find_turn_end,
    read_generation_config,
    set_eos,
    special_ids,
)

ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
TWICE = CHATML.replace("{% if", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if")  # as Phi-3.5 has it
WITHOUT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
WORD = "{% for m in messages %}{{ m.content }}<|eot|>\n{% endfor %}"  # a text and no token
STRICT = "{{ raise_exception('no') }}"
THINKING = CHATML.replace("<|im_end|>\n'", "' + ('<|im_end|>' if thinks else '<|endoftext|>') + '\n'")


def config(*ends: int) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(ends))


class TestTurnEnd:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [(CHATML, 2), (ZEPHYR, 2), (TWICE, 2), (WITHOUT, None), (WORD, None), (STRICT, None), (None, None)],
    )
    def test_is_the_first_special_token_after_the_answer(self, template, expected):
        assert find_turn_end(build_chat_tokenizer(template=template)) == expected

    def test_depends_on_what_the_template_is_given(self):
        tokenizer = build_chat_tokenizer(template=THINKING)
        assert find_turn_end(tokenizer, {"thinks": True}) == 2
        assert find_turn_end(tokenizer, {"thinks": False}) == 0

    def test_added_white_space_is_no_special_token(self):
        tokenizer = build_chat_tokenizer(template=CHATML.replace("<|im_end|>", "   <|im_end|>"))
        tokenizer.add_tokens(["   ", "<think>"])
        assert len(tokenizer) - 1 in special_ids(tokenizer)
        assert len(tokenizer) - 2 not in special_ids(tokenizer)
        assert find_turn_end(tokenizer) == 2


class TestEnds:
    def find(self, eos=TEXT_END, student=(0,), template=CHATML, conversational=True, **options):
        tokenizer = build_chat_tokenizer(eos, template)
        if "teacher" in options:
            options["teacher"] = config(*options["teacher"])
        student = None if student is None else config(*student)
        return find_end_tokens(tokenizer, conversational=conversational, student=student, **options)

    def test_chat_model_is_left_as_it_is(self):
        ends = self.find(TURN_END, (2,))
        assert (ends.ids, ends.eos, ends.doubts) == ([2], 2, [])

    def test_chat_model_that_keeps_another_eos_is_left_as_it_is(self):  # Gemma
        ends = self.find(TEXT_END, (0, 2))
        assert (ends.ids, ends.eos) == ([0, 2], 0)

    def test_conversations_end_with_what_the_template_writes(self):
        ends = self.find(TEXT_END, (0,))
        assert (ends.ids, ends.eos) == ([0, 2], 2)
        assert ends.sources[2] == ["the chat template"]

    def test_texts_do_not(self):
        ends = self.find(TEXT_END, (0,), conversational=False)
        assert (ends.ids, ends.eos) == ([0], 0)

    @pytest.mark.parametrize("conversational", [False, True])
    def test_what_the_teacher_ends_with_counts_too(self, conversational):
        ends = self.find(TEXT_END, (0,), template=None, conversational=conversational, teacher=(2, 0))
        assert (ends.ids, ends.eos) == ([0, 2], 0)
        assert ends.sources[2] == ["the teacher's generation config"]

    def test_so_does_its_tokenizer(self):
        ends = self.find(TEXT_END, (0,), conversational=False, teacher_tokenizer=build_chat_tokenizer(TURN_END))
        assert ends.ids == [0, 2]

    def test_ordinary_token_of_the_teacher_is_doubted_and_does_not_count(self):
        ends = self.find(TEXT_END, (0,), template=None, teacher=(0, 70))
        assert ends.ids == [0]
        assert "id 70" in ends.doubts[0]
        assert "eos_tokens" in ends.doubts[0]

    def test_ordinary_token_of_the_student_is_doubted_and_counts_as_before(self):
        ends = self.find(TEXT_END, (0, 70), template=None)
        assert ends.ids == [0, 70]
        assert "id 70" in ends.doubts[0]

    def test_id_beyond_the_tokenizer_counts_as_before(self):
        ends = self.find(TURN_END, (2, 999), template=None)
        assert (ends.ids, ends.doubts) == ([2, 999], [])

    def test_eos_tokens_are_all_that_counts(self):
        ends = self.find(TEXT_END, (0,), teacher=(2,), eos_tokens=[TURN_START])
        assert (ends.ids, ends.eos) == ([1], 1)
        assert TURN_END in ends.doubts[0]  # what conversations end with

    def test_eos_of_the_tokenizer_stays_if_it_is_among_them(self):
        ends = self.find(TEXT_END, (0,), eos_tokens=[TURN_END, TEXT_END])
        assert (ends.ids, ends.eos, ends.doubts) == ([0, 2], 0, [])

    def test_word_that_is_no_token_is_refused(self):
        with pytest.raises(ValueError, match=r"eos_tokens: '<\|eot\|>' is not a token"):
            self.find(eos_tokens=["<|eot|>"])

    @pytest.mark.parametrize("bad", ["x", 1.5, True, 2**31, -(2**31)])
    def test_generation_config_with_something_else_is_refused(self, bad):
        with pytest.raises(ValueError, match="eos_token_id"):
            declared_ends(GenerationConfig(eos_token_id=[0, bad]))
        assert declared_ends(config(0, 2**31 - 1)) == [0, 2**31 - 1]


class TestTokenizerWithoutEos:
    def find(self, **options):
        tokenizer = build_chat_tokenizer(None, options.pop("template", CHATML))
        return tokenizer, find_end_tokens(tokenizer, **options)

    def test_conversations_say_which(self):
        tokenizer, ends = self.find(conversational=True, student=config(0, 2))
        check_eos(tokenizer, ends)
        assert (ends.ids, ends.eos) == ([0, 2], 2)

    def test_generation_config_with_one_says_which(self):
        assert self.find(conversational=False, student=config(0))[1].eos == 0

    @pytest.mark.parametrize("student", [config(0, 2), config(70), None])
    def test_otherwise_it_is_refused_with_the_remedy(self, student):
        tokenizer, ends = self.find(conversational=False, student=student)
        with pytest.raises(ValueError, match=r"has no eos_token.*eos_tokens="):
            check_eos(tokenizer, ends)


class TestCarrying:
    def test_saved_model_and_tokenizer_end_with_all_of_them(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        model = build_chat_model(tokenizer, 0)
        ends = find_end_tokens(tokenizer, conversational=True, student=model.generation_config)
        set_eos(tokenizer, ends)
        carry(ends, model)
        model.save_pretrained(tmp_path)
        assert tokenizer.eos_token == TURN_END
        assert tokenizer.pad_token == TEXT_END
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.generation_config.eos_token_id == [2, 0]
        assert loaded.config.eos_token_id == 2
        assert read_generation_config(str(tmp_path)).eos_token_id == [2, 0]

    def test_what_agrees_is_not_touched(self):
        tokenizer = build_chat_tokenizer(TURN_END)
        model = build_chat_model(tokenizer, [2, 0])
        model.config.eos_token_id = [0, 2]
        carry(find_end_tokens(tokenizer, conversational=True, student=model.generation_config), model)
        assert (model.generation_config.eos_token_id, model.config.eos_token_id) == ([2, 0], [0, 2])

    def test_generation_config_is_read_from_the_config_where_there_is_no_file(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        model = build_chat_model(tokenizer, 2)
        model.config.save_pretrained(tmp_path)
        assert read_generation_config(str(tmp_path)).eos_token_id == 2
        assert read_generation_config(str(tmp_path / "nowhere")) is None
        assert read_generation_config(model) is model.generation_config
