"""A teacher that does not fit is refused with the first difference."""

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from conftest import build_model, build_tokenizer
from datasets import Dataset
from peft import LoraConfig
from test_adapters import train
from tokenizers import normalizers
from transformers import BitsAndBytesConfig

from minillm_trl import MiniLLMConfig
from minillm_trl.errors import UserError
from minillm_trl.models.context import max_context
from minillm_trl.models.teacher import (
    PROBE_TEXT,
    check_same_tokenizer,
    has_tokenizer,
    load_teacher,
    place_teacher,
    shard_blocks,
    shared_vocab_size,
    tokenizer_source,
)
from minillm_trl.training.checks import check_arguments


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
        with pytest.raises(ValueError, match=r"encode the same text differently, .*token 0"):
            check_same_tokenizer(build_tokenizer(), teacher)

    def test_encoding_that_ends_earlier_is_refused_at_its_end(self):
        teacher = build_tokenizer()
        teacher.backend_tokenizer.normalizer = normalizers.Strip(left=False, right=True)
        length = len(teacher(PROBE_TEXT)["input_ids"])
        assert 0 < length < len(build_tokenizer()(PROBE_TEXT)["input_ids"])
        with pytest.raises(ValueError, match=rf"starting at token {length}: \[\d.*\] and \[\]"):
            check_same_tokenizer(build_tokenizer(), teacher)

    def test_other_chat_template_matters_for_conversations_only(self):
        student, teacher = build_tokenizer(), build_tokenizer()
        teacher.chat_template = "{{ messages[0].content }}"
        check_same_tokenizer(student, teacher)
        with pytest.raises(ValueError, match="different chat templates"):
            check_same_tokenizer(student, teacher, conversational=True)

    def test_student_in_process_without_a_tokenizer_is_refused(self, model_dir, tmp_path):
        args = MiniLLMConfig(str(tmp_path), use_cpu=True, bf16=False, per_device_train_batch_size=1)
        prompts = Dataset.from_dict({"prompt": ["the mill"] * args.generation_batch_size})
        with pytest.raises(UserError, match="processing_class"):
            check_arguments(build_model("gpt2"), model_dir(), None, args, prompts, None, None, None)


class TestLoadTeacher:
    def test_teacher_is_frozen_and_in_eval_mode(self):
        teacher = load_teacher(build_model("gpt2").train(), None, torch.float32)
        assert not teacher.training
        assert not any(parameter.requires_grad for parameter in teacher.parameters())

    def test_dtype_is_the_given_one_or_the_default(self, model_dir):
        assert load_teacher(model_dir(), None, torch.float16).dtype == torch.float16
        assert load_teacher(model_dir(), {"dtype": torch.float32}, torch.float16).dtype == torch.float32

    @pytest.mark.parametrize(
        ("more", "expected"),
        [({}, torch.bfloat16), ({"bnb_4bit_compute_dtype": "float32"}, torch.float32)],
        ids=["default", "given"],
    )
    def test_four_bit_layers_compute_in_the_dtype_of_the_rest(self, model_dir, more: dict, expected: torch.dtype):
        quantization = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more}
        teacher = load_teacher(model_dir("llama"), {"quantization_config": quantization}, torch.bfloat16)
        layers = [module for module in teacher.modules() if isinstance(module, Linear4bit)]
        assert {layer.compute_dtype for layer in layers} == {expected}
        assert quantization == {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", **more}  # the caller's own

    def test_init_kwargs_for_a_loaded_teacher_are_refused(self):
        with pytest.raises(ValueError, match=r"teacher_model_init_kwargs=.* has no effect"):
            load_teacher(build_model("gpt2"), {"dtype": "float16"}, torch.float32)


class TestPlaces:
    """Wherever the teacher's weights are, training is that with a teacher that is whole and at hand."""

    def test_teacher_spread_by_its_device_map_trains_as_a_whole_one(self, tmp_path, model_dir):
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
        device_map = places | {"model.layers.0": "disk", "model.layers.1": "cpu"}
        kwargs = {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}
        teacher = model_dir("llama", seed=1, width=48)
        spread = train(tmp_path, model_dir("llama"), teacher, teacher_model_init_kwargs=kwargs)
        assert any(parameter.is_meta for parameter in spread.teacher_model.parameters())
        whole = train(tmp_path, model_dir("llama"), teacher)
        for one, other in zip(spread.model.parameters(), whole.model.parameters(), strict=True):
            torch.testing.assert_close(one, other)

    def test_offloaded_head_is_refused(self, tmp_path, model_dir):
        device_map = {"model": "cpu", "lm_head": "disk"}
        kwargs = {"device_map": device_map, "offload_folder": str(tmp_path / "offloaded")}
        with pytest.raises(ValueError, match=r"LM head of the teacher .* is offloaded by its device_map"):
            train(tmp_path, model_dir("llama"), model_dir("llama", seed=1), teacher_model_init_kwargs=kwargs)

    def test_what_cannot_be_sharded_is_refused(self, model_dir):
        kwargs = {"quantization_config": BitsAndBytesConfig(load_in_4bit=True)}
        with pytest.raises(ValueError, match=r"it is quantised\. Set shard_teacher=False"):
            shard_blocks(load_teacher(model_dir("llama"), kwargs, torch.float32), "cpu")
        unnamed = build_model("llama")
        unnamed._no_split_modules = None
        with pytest.raises(ValueError, match="it does not name its blocks"):
            shard_blocks(unnamed, "cpu")

    def test_teacher_under_zero3_is_refused(self):
        teacher = build_model("gpt2")
        next(teacher.parameters()).ds_id = 0
        with pytest.raises(ValueError, match="Pass its name or folder instead"):
            place_teacher(teacher, torch.device("cpu"))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"teacher_shares_base": True, "shard_teacher": True}, "shard_teacher=True and teacher_shares_base=True"),
            ({"teacher_shares_base": True, "offload_teacher": True}, "offload_teacher=True and teacher_shares_base"),
            ({"offload_teacher": True, "shard_teacher": True}, "Drop offload_teacher"),
            (
                {"teacher_shares_base": True, "teacher_model_init_kwargs": {"dtype": "float16"}},
                "has no effect with teacher_shares_base=True",
            ),
        ],
    )
    def test_places_that_exclude_each_other_are_refused(self, tmp_path, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            MiniLLMConfig(str(tmp_path), use_cpu=True, **options)


def test_shared_vocabulary_is_the_smaller_one():
    tokenizer = build_tokenizer()
    rows = len(tokenizer)
    assert shared_vocab_size(build_model("gpt2", rows + 8), build_model("llama", rows + 3), tokenizer) == rows + 3


def test_head_smaller_than_the_tokenizer_is_refused():
    with pytest.raises(ValueError, match="the teacher's LM head has 50 rows"):
        shared_vocab_size(build_model("gpt2"), build_model("gpt2", 50), build_tokenizer())


def test_adapter_without_a_tokenizer_has_that_of_its_base(tmp_path):
    LoraConfig(base_model_name_or_path="base").save_pretrained(tmp_path)
    assert tokenizer_source(str(tmp_path)) == "base"
    build_tokenizer().save_pretrained(tmp_path)
    assert tokenizer_source(str(tmp_path)) == str(tmp_path)


def test_context_is_the_shorter_one():
    short = build_model("gpt2")
    short.config.n_positions = 64
    assert max_context(build_model("llama"), short) == 64


class TestVocabularies:
    def test_head_may_have_as_many_rows_as_there_are_tokens_but_not_fewer(self):
        tokenizer = build_tokenizer()
        rows = len(tokenizer)
        exact, larger, smaller = (build_model("gpt2", size, layers=1) for size in (rows, rows + 1, rows - 1))
        assert shared_vocab_size(exact, exact, tokenizer) == rows
        assert shared_vocab_size(larger, exact, tokenizer) == rows
        for models, name in (((smaller, exact), "student"), ((exact, smaller), "teacher")):
            with pytest.raises(UserError, match=f"{rows} tokens but the {name}'s LM head has {rows - 1} rows"):
                shared_vocab_size(*models, tokenizer)

    def test_first_difference_has_the_smallest_id(self):
        student, teacher = build_tokenizer(), build_tokenizer()
        student.add_tokens(["<z>", "<a>"])
        teacher.add_tokens(["<y>", "<b>"])
        first = len(teacher) - 2
        with pytest.raises(UserError, match=rf"'<y>', id None for the student and {first} for the teacher"):
            check_same_tokenizer(student, teacher)

    def test_first_different_token_of_the_same_text_is_named(self):
        student, teacher = build_tokenizer(), build_tokenizer()
        teacher.backend_tokenizer.normalizer = normalizers.Replace("Response", "Answer")
        ours, theirs = (each(PROBE_TEXT)["input_ids"] for each in (student, teacher))
        place = next(n for n, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b)
        assert place > 0
        shown = [str(ids[place : place + 5]).replace("[", r"\[").replace("]", r"\]") for ids in (ours, theirs)]
        with pytest.raises(UserError, match=f"starting at token {place}: {shown[0]} and {shown[1]}"):
            check_same_tokenizer(student, teacher)

    def test_tokenizer_of_an_adapter_without_a_base_is_looked_for_with_it(self, tmp_path):
        LoraConfig().save_pretrained(tmp_path / "adapter")
        assert tokenizer_source(str(tmp_path / "adapter")) == str(tmp_path / "adapter")
        assert not has_tokenizer(str(tmp_path / "adapter"))
        assert not has_tokenizer("nobody/has-this-model")  # a name on the hub, which cannot be reached here
        assert tokenizer_source(str(tmp_path)) == str(tmp_path)
