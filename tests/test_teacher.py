"""A teacher that does not fit is refused with the first difference."""

import pytest
import torch
from conftest import build_model, build_tokenizer
from tokenizers import normalizers

from minillm_trl.teacher import check_same_tokenizer, load_teacher, max_context, shared_vocab_size


class TestCheckSameTokenizer:
    def test_equal_tokenizers_pass(self):
        check_same_tokenizer(build_tokenizer(), build_tokenizer(), conversational=True)

    def test_other_vocabulary_is_refused_with_the_first_token(self):
        student, teacher = build_tokenizer(), build_tokenizer()
        teacher.add_tokens(["<new>"])
        message = rf"first difference is the token '<new>', id None for the student and {len(student)} for the teacher"
        with pytest.raises(ValueError, match=message):
            check_same_tokenizer(student, teacher)

    def test_other_normalisation_is_refused_although_the_vocabulary_agrees(self):
        teacher = build_tokenizer()
        teacher.backend_tokenizer.normalizer = normalizers.Lowercase()
        with pytest.raises(ValueError, match="encode the same text differently, from token 0"):
            check_same_tokenizer(build_tokenizer(), teacher)

    def test_other_chat_template_matters_for_conversations_only(self):
        student, teacher = build_tokenizer(), build_tokenizer()
        teacher.chat_template = "{{ messages[0].content }}"
        check_same_tokenizer(student, teacher)
        with pytest.raises(ValueError, match="different chat templates"):
            check_same_tokenizer(student, teacher, conversational=True)


class TestLoadTeacher:
    def test_teacher_is_frozen_and_in_eval_mode(self):
        teacher = load_teacher(build_model("gpt2").train(), None, torch.float32)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_dtype_is_the_given_one_or_the_default(self, model_dir):
        assert load_teacher(model_dir(), None, torch.float16).dtype == torch.float16
        assert load_teacher(model_dir(), {"dtype": torch.float32}, torch.float16).dtype == torch.float32

    def test_init_kwargs_for_a_loaded_teacher_are_refused(self):
        with pytest.raises(ValueError, match=r"teacher_model_init_kwargs=.* has no effect"):
            load_teacher(build_model("gpt2"), {"dtype": "float16"}, torch.float32)


def test_shared_vocabulary_is_the_smaller_one():
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    assert shared_vocab_size(build_model("gpt2", rows + 8), build_model("llama", rows + 3), tokenizer) == rows + 3


def test_head_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the teacher's LM head has 50 rows"):
        shared_vocab_size(build_model("gpt2"), build_model("gpt2", 50), build_tokenizer())


def test_context_is_the_shorter_one():
    short = build_model("gpt2")
    short.config.n_positions = 64
    assert max_context(build_model("llama"), short) == 64
