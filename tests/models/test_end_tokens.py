"""What ends a completion: whose tokens count, and what student and tokenizer carry."""

import re
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from chat_models import CHATML, TEXT_END, TURN_END, TURN_START, build_chat_model, build_chat_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, LlamaConfig

from minillm_trl.errors import UserError
from minillm_trl.models.end_tokens import (
    EndTokens,
    adopt_generation_config,
    carry,
    check_eos,
    check_eos_tokens,
    declared_ends,
    find_end_tokens,
    find_turn_end,
    read_generation_config,
    set_eos,
    special_ids,
    token_name,
)

ZEPHYR = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}\n{% endfor %}"
TWICE = CHATML.replace("{% if", "{% if not add_generation_prompt %}<|endoftext|>{% endif %}{% if")  # as Phi-3.5 has it
WITHOUT = "{% for m in messages %}{{ m.content }}\n{% endfor %}"
WORD = "{% for m in messages %}{{ m.content }}<|eot|>\n{% endfor %}"  # a text and no token
STRICT = "{{ raise_exception('no') }}"
SILENT = "{% for m in messages %}{{ m.role }}<|im_end|>{% endfor %}"  # leaves the answer out
THINKING = CHATML.replace("<|im_end|>\n'", "' + ('<|im_end|>' if thinks else '<|endoftext|>') + '\n'")


def config(*ends: int) -> GenerationConfig:
    return GenerationConfig(eos_token_id=list(ends))


class TestTurnEnd:
    @pytest.mark.parametrize(
        ("template", "expected"),
        [
            (CHATML, 2),
            (ZEPHYR, 2),
            (TWICE, 2),
            (WITHOUT, None),
            (WORD, None),
            (SILENT, None),
            (STRICT, None),
            (None, None),
        ],
    )
    def test_is_the_first_special_token_after_the_answer(self, template, expected):
        assert find_turn_end(build_chat_tokenizer(template=template)) == expected

    def test_depends_on_what_the_template_is_given(self):
        tokenizer = build_chat_tokenizer(template=THINKING)
        assert find_turn_end(tokenizer, {"thinks": True}) == 2
        assert find_turn_end(tokenizer, {"thinks": False}) == 0

    def test_is_no_token_that_the_tokenizer_adds_to_texts(self):
        tokenizer = build_chat_tokenizer(TEXT_END)
        tokenizer.bos_token = TURN_START
        tokenizer.add_bos_token = True
        assert tokenizer("the")["input_ids"][0] == 1
        assert find_turn_end(tokenizer) == 2

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

    def test_everyone_is_asked_and_named_once(self):
        teacher = build_chat_tokenizer(TURN_START)
        ends = self.find(TEXT_END, (0, 2), teacher=(2, 1), teacher_tokenizer=teacher)
        assert ends == EndTokens(
            sources={
                0: ["the tokenizer", "the student's generation config"],
                1: ["the teacher's generation config", "the teacher's tokenizer"],
                2: ["the student's generation config", "the chat template", "the teacher's generation config"],
            },
            eos=0,
            turn_end=2,
            declared=frozenset({0, 2}),
        )
        assert list(ends.sources) == ends.ids == [0, 1, 2]
        assert ends.describe(teacher).startswith("'<|endoftext|>' (the tokenizer and the student's generation config)")

    def test_eos_of_the_tokenizer_can_be_kept(self):
        ends = self.find(TEXT_END, (0,), keep_eos=True)
        assert (ends.ids, ends.eos) == ([0, 2], 0)

    def test_template_gets_its_arguments(self):
        ends = self.find(TEXT_END, (0,), template=THINKING, chat_template_kwargs={"thinks": True})
        assert ends.turn_end == 2

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
        (doubt,) = ends.doubts
        assert doubt.startswith("The teacher's generation config ends completions with ")
        assert "(id 70), an ordinary token of the tokenizer; it is ignored" in doubt
        assert "eos_tokens" in doubt

    def test_ordinary_token_of_the_student_is_doubted_and_counts_as_before(self):
        ends = self.find(TEXT_END, (0, 70), template=None)
        assert ends.ids == [0, 70]
        (doubt,) = ends.doubts
        assert "(id 70), an ordinary token of the tokenizer; completions end with it nevertheless" in doubt

    def test_id_beyond_the_tokenizer_counts_as_before(self):
        tokenizer = build_chat_tokenizer()
        ends = self.find(TURN_END, (2, len(tokenizer)), template=None)
        assert (ends.ids, ends.doubts) == ([2, len(tokenizer)], [])
        assert token_name(tokenizer, len(tokenizer)) == f"the id {len(tokenizer)}"
        assert token_name(tokenizer, len(tokenizer) - 1) == repr(tokenizer.convert_ids_to_tokens(len(tokenizer) - 1))

    def test_eos_tokens_are_all_that_counts(self):
        ends = self.find(TEXT_END, (0,), teacher=(2,), eos_tokens=[TURN_START])
        assert (ends.ids, ends.eos) == ([1], 1)
        assert TURN_END in ends.doubts[0]  # what conversations end with

    def test_eos_of_the_tokenizer_stays_if_it_is_among_them(self):
        ends = self.find(TEXT_END, (0,), eos_tokens=[TURN_END, TEXT_END])
        assert (ends.ids, ends.eos, ends.doubts) == ([0, 2], 0, [])

    def test_first_of_them_becomes_the_eos_otherwise(self):
        ends = self.find(TEXT_END, (0,), eos_tokens=[TURN_END, TURN_START])
        assert (ends.ids, ends.eos, ends.doubts) == ([1, 2], 2, [])
        assert ends.sources == {1: ["eos_tokens"], 2: ["eos_tokens"]}

    def test_texts_may_leave_out_the_end_of_a_turn(self):
        assert self.find(TEXT_END, (0,), conversational=False, eos_tokens=[TURN_START]).doubts == []

    @pytest.mark.parametrize(
        ("value", "expected"), [(None, None), ("</s>", ["</s>"]), (("a", "b"), ["a", "b"]), (["a"], ["a"])]
    )
    def test_field_takes_one_token_or_several(self, value, expected):
        assert check_eos_tokens(value) == expected

    @pytest.mark.parametrize("value", [[], (), "", [""], ["a", ""], [2], ["a", None], 2, {"a": 1}, {"a"}])
    def test_field_refuses_something_else(self, value):
        with pytest.raises(UserError, match="eos_tokens must be a list of tokens"):
            check_eos_tokens(value)

    def test_word_that_is_no_token_is_refused(self):
        with pytest.raises(ValueError, match=r"eos_tokens: '<\|eot\|>' is not a token"):
            self.find(eos_tokens=["<|eot|>"])

    @pytest.mark.parametrize("bad", ["x", 1.5, True, 2**31, -(2**31)])
    def test_generation_config_with_something_else_is_refused(self, bad):
        with pytest.raises(ValueError, match="generation config of the teacher has the eos_token_id"):
            self.find(TEXT_END, (0,), teacher=(0, bad))
        assert declared_ends(config(0, 2**31 - 1)) == [0, 2**31 - 1]
        assert declared_ends(GenerationConfig(eos_token_id=3)) == [3]
        assert declared_ends(GenerationConfig()) == declared_ends(None) == []


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

    @pytest.mark.parametrize(
        ("student", "problem"),
        [
            (config(0, 2), "several tokens may end a completion: '<|endoftext|>' "),
            (config(70), "several tokens"),
            (None, "no config names one"),
        ],
    )
    def test_otherwise_it_is_refused_with_the_remedy(self, student, problem: str):
        tokenizer, ends = self.find(conversational=False, student=student)
        with pytest.raises(ValueError, match=rf"has no eos_token, and {re.escape(problem)}.*eos_tokens="):
            check_eos(tokenizer, ends)

    def test_special_token_among_ordinary_ones_says_which(self):
        assert self.find(conversational=False, student=config(70, 0))[1].eos == 0

    def test_stays_without_one_and_without_padding(self):
        tokenizer, ends = self.find(conversational=False)
        tokenizer.pad_token = None
        set_eos(tokenizer, ends)
        assert (tokenizer.eos_token, tokenizer.pad_token) == (None, None)


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

    @pytest.mark.parametrize("ids", [[2, 0], [0, 2]])
    def test_what_agrees_is_not_touched(self, ids: list[int]):
        tokenizer = build_chat_tokenizer(TURN_END)
        model = build_chat_model(tokenizer, ids)
        model.config.eos_token_id = [0, 2]
        carry(find_end_tokens(tokenizer, conversational=True, student=model.generation_config), model)
        assert (model.generation_config.eos_token_id, model.config.eos_token_id) == (ids, [0, 2])

    def test_base_of_an_adapter_adopts_what_was_saved_with_the_adapter(self, tmp_path):
        model = SimpleNamespace(generation_config=config(0))
        adopt_generation_config(model, str(tmp_path))
        assert model.generation_config.eos_token_id == [0]
        config(1, 2).save_pretrained(tmp_path)
        adopt_generation_config(model, str(tmp_path))
        assert model.generation_config.eos_token_id == [1, 2]

    @pytest.mark.parametrize(
        ("ids", "eos", "known", "generation", "expected"),
        [
            ([2], 2, 0, 2, 2),
            ([2], 2, [0, 1], 2, [2, 0, 1]),
            ([1, 2], 2, 2, [2, 1], 2),
            ([1, 2], None, 0, [1, 2], 0),
            ([2], 2, None, 2, 2),
        ],
    )
    def test_eos_comes_first_and_the_config_gains_it(self, ids, eos, known, generation, expected):
        """`generate` takes the first of several ends as padding."""
        text = SimpleNamespace(eos_token_id=known)
        model = SimpleNamespace(generation_config=config(0), config=SimpleNamespace(get_text_config=lambda: text))
        carry(EndTokens({id_: ["eos_tokens"] for id_ in ids}, eos, None, frozenset({0})), model)
        assert (model.generation_config.eos_token_id, text.eos_token_id) == (generation, expected)

    def test_tokenizer_without_padding_pads_with_its_new_eos(self):
        tokenizer = build_chat_tokenizer(TEXT_END)
        tokenizer.pad_token = None
        set_eos(tokenizer, EndTokens({2: ["eos_tokens"]}, 2, None))
        assert (tokenizer.eos_token, tokenizer.pad_token) == (TURN_END, TURN_END)

    def test_generation_config_is_read_from_the_config_where_there_is_no_file(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        model = build_chat_model(tokenizer, 2)
        model.config.save_pretrained(tmp_path)
        assert read_generation_config(str(tmp_path)).eos_token_id == 2
        assert read_generation_config(str(tmp_path / "nowhere")) is None
        assert read_generation_config(model) is model.generation_config

    def test_generation_config_is_that_of_the_revision(self, tmp_path, monkeypatch):
        repository = tmp_path / "models--o--n"
        (repository / "refs").mkdir(parents=True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
        for eos, revision in enumerate(("main", "chat", "config")):
            (repository / "refs" / revision).write_text(40 * str(eos))
            folder = repository / "snapshots" / (40 * str(eos))
            LlamaConfig(eos_token_id=eos).save_pretrained(folder)
            if revision != "config":
                config(eos).save_pretrained(folder)
        assert read_generation_config("o/n").eos_token_id == [0]
        assert read_generation_config("o/n", "chat").eos_token_id == [1]
        assert read_generation_config("o/n", "config").eos_token_id == 2

    def test_config_that_comes_with_code_is_not_read_unless_it_may_run(self, tmp_path: Path):
        # a class of its own, since transformers marks the class as one that comes with code
        (tmp_path / "own.py").write_text("from transformers import LlamaConfig\nclass Own(LlamaConfig): pass\n")
        (tmp_path / "config.json").write_text('{"auto_map": {"AutoConfig": "own.Own"}, "eos_token_id": 7}')
        assert read_generation_config(str(tmp_path)) is None
        assert read_generation_config(str(tmp_path), trust_remote_code=True).eos_token_id == 7
        assert read_generation_config(SimpleNamespace()) is None
