"""What ends the completions of a run, from the data to what is saved."""

import logging

import pytest
import torch
import trl
from chat_models import (
    CHATML,
    TEXT_END,
    TURN_END,
    TURN_START,
    answer,
    build_chat_model,
    build_chat_tokenizer,
    question,
)
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer
from minillm_trl.evaluation.evaluate import evaluate_model
from minillm_trl.models.loading import load_model
from minillm_trl.models.teacher import load_teacher

TEXTS = Dataset.from_dict({"prompt": ["the mill:", "a pub:"] * 2, "completion": [" near the river", " cheap"] * 2})
CHATS = Dataset.from_list(
    [{"prompt": question(row["prompt"]), "completion": answer(row["completion"].strip())} for row in TEXTS]
)
TRAINING = {
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "max_steps": 1,
    "save_strategy": "no",
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
}


@pytest.fixture
def warnings(caplog, monkeypatch):
    """What is logged, whatever other tests did to the loggers of transformers."""
    monkeypatch.setattr(logging.getLogger("minillm_trl"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("minillm_trl")]


def fine_tuner(folder, data, tokenizer, model, trainer=FineTuningTrainer, **options):
    config = KDConfig if trainer is KDTrainer else FineTuningConfig
    more = {name: options.pop(name) for name in ("teacher_model", "eval_dataset", "peft_config") if name in options}
    args = config(str(folder), **{**TRAINING, **options})
    return trainer(args=args, model=model, train_dataset=data, processing_class=tokenizer, **more)


def minillm(folder, data, tokenizer, student, teacher, **options):
    more = {name: options.pop(name) for name in ("peft_config", "lm_dataset") if name in options}
    options = {"steps_per_generation": 1, "max_completion_length": 6, "gradient_checkpointing": False, **options}
    args = MiniLLMConfig(str(folder), **{**TRAINING, **options})
    data = data.select_columns("prompt")
    return MiniLLMTrainer(student, teacher, args=args, train_dataset=data, processing_class=tokenizer, **more)


def learnt(trainer) -> list[str]:
    """The tokens that each row of the training data teaches."""
    tokenizer = trainer.processing_class
    rows = trainer.train_dataset
    return [tokenizer.decode([id_ for id_ in labels if id_ != -100]) for labels in rows["labels"]]


class TestBaseStudentOnConversations:
    @pytest.fixture
    def saved(self, tmp_path, warnings):
        tokenizer = build_chat_tokenizer(TEXT_END)
        trainer = fine_tuner(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0))
        assert learnt(trainer)[0] == "near the river<|im_end|>\n"
        trainer.train()
        trainer.save_whole_model()
        (line,) = warnings()
        assert "'<|im_end|>' (the chat template)" in line
        return tmp_path

    def test_saved_student_ends_with_what_it_learnt(self, saved):
        tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
        assert (tokenizer.eos_token, tokenizer.pad_token) == (TURN_END, TEXT_END)
        assert sorted(model.generation_config.eos_token_id) == [0, 2]
        with torch.no_grad():  # a head that always ends the turn
            model.lm_head.weight.zero_()
            model.lm_head.weight[2] = 1.0
            model.model.norm.weight.fill_(1.0)
            model.model.embed_tokens.weight.fill_(1.0)
        ids = torch.tensor([[5, 6]])
        assert model.generate(ids, do_sample=False, max_new_tokens=9).tolist() == [[5, 6, 2]]

    def test_next_stage_has_nothing_to_say(self, saved, warnings):
        tokenizer, model = AutoTokenizer.from_pretrained(saved), AutoModelForCausalLM.from_pretrained(saved)
        before = len(warnings())
        trainer = minillm(saved / "next", CHATS, tokenizer, model, build_chat_model(tokenizer, [2, 0], seed=1))
        assert trainer.eos_token_ids == [0, 2]
        assert warnings()[before:] == []


class TestMiniLLM:
    def ends(self, folder, data, eos, student, teacher, pad=TEXT_END, **options):
        tokenizer = build_chat_tokenizer(eos)
        tokenizer.pad_token = pad
        models = build_chat_model(tokenizer, student), build_chat_model(tokenizer, teacher, seed=1)
        trainer = minillm(folder, data, tokenizer, *models, **options)
        assert trainer.generation_config.eos_token_id == trainer.eos_token_ids
        assert trainer.generation_config.pad_token_id == tokenizer.pad_token_id is not None
        return trainer.eos_token_ids, trainer.model.generation_config.eos_token_id, tokenizer.eos_token_id

    def test_base_student_of_a_chat_teacher_ends_as_it_does(self, tmp_path, warnings):
        assert self.ends(tmp_path, TEXTS, TEXT_END, 0, [2, 0]) == ([0, 2], [0, 2], 0)
        (line,) = warnings()
        assert "'<|im_end|>' (the teacher's generation config)" in line

    def test_base_student_on_conversations_ends_its_turn(self, tmp_path):
        assert self.ends(tmp_path, CHATS, TEXT_END, 0, 0) == ([0, 2], [2, 0], 2)

    def test_models_that_agree_are_left_as_they_are(self, tmp_path, warnings):
        assert self.ends(tmp_path, CHATS, TURN_END, 2, 2) == ([2], 2, 2)
        assert warnings() == []

    def test_ordinary_token_of_the_teacher_is_warned_of(self, tmp_path, warnings):
        assert self.ends(tmp_path, TEXTS, TEXT_END, 0, [0, 70])[0] == [0]
        (line,) = warnings()
        assert "(id 70)" in line

    def test_eos_tokens_choose(self, tmp_path):
        options = {"eos_tokens": [TURN_START, TURN_END]}
        assert self.ends(tmp_path, TEXTS, TEXT_END, 0, 0, **options) == ([1, 2], [1, 2], 1)

    @pytest.mark.parametrize("pad", [TEXT_END, None])
    def test_tokenizer_without_eos_gets_the_one_that_is_named(self, tmp_path, pad):
        assert self.ends(tmp_path, CHATS, None, 0, 0, pad) == ([0, 2], [2, 0], 2)
        assert self.ends(tmp_path, TEXTS, None, 0, 0, pad) == ([0], 0, 0)

    def test_without_any_end_it_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"has no eos_token.*eos_tokens="):
            self.ends(tmp_path, TEXTS, None, None, None)

    def test_completions_end_there(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        student, teacher = (build_chat_model(tokenizer, 0, seed) for seed in (0, 1))
        trainer = minillm(tmp_path, CHATS, tokenizer, student, teacher, max_completion_length=64, temperature=4.0)
        trainer.model.train()
        batch = trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in CHATS])
        lengths = batch["completion_mask"].sum(dim=1).tolist()
        rows = [ids[:length] for ids, length in zip(batch["completion_ids"].tolist(), lengths, strict=True)]
        assert any(ids[-1] == 2 for ids in rows)
        assert not any({0, 2} & {*ids[:-1]} for ids in rows)

    @pytest.mark.parametrize(("data", "ends"), [(CHATS, [0, 2]), (TEXTS, [0])])
    def test_vllm_ends_with_them_and_nothing_else(self, tmp_path, monkeypatch, data, ends):
        class VLLM:
            def __init__(self, *, generation_kwargs, **unused):
                self.generation_kwargs = generation_kwargs

        monkeypatch.setattr(trl.trainer.grpo_trainer, "VLLMGeneration", VLLM)
        tokenizer = build_chat_tokenizer(TEXT_END)
        models = build_chat_model(tokenizer, 0), build_chat_model(tokenizer, 0)
        options = {"use_vllm": True, "teacher_mixed_alpha": 0.0, "generation_kwargs": {"seed": 1}}
        trainer = minillm(tmp_path, data, tokenizer, *models, **options)
        expected = {"stop_token_ids": ends, "ignore_eos": True, "seed": 1}
        assert trainer.vllm_generation.generation_kwargs == expected

    def test_trained_student_is_saved_with_them(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        trainer = minillm(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0), build_chat_model(tokenizer, 0))
        trainer.train()
        trainer.save_whole_model()
        assert GenerationConfig.from_pretrained(tmp_path).eos_token_id == [2, 0]
        assert AutoTokenizer.from_pretrained(tmp_path).eos_token == TURN_END


def test_adapter_is_saved_with_what_it_ends_with_and_keeps_it_when_merged(tmp_path):
    tokenizer = build_chat_tokenizer(TEXT_END)
    build_chat_model(tokenizer, 0).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapter = tmp_path / "adapter"
    lora = LoraConfig(target_modules="all-linear", r=2)
    trainer = fine_tuner(adapter, CHATS, tokenizer, str(tmp_path / "base"), peft_config=lora)
    trainer.train()
    trainer.save_whole_model()
    for model in (load_model(str(adapter)), load_teacher(str(adapter), None, torch.float32)):
        assert model.generation_config.eos_token_id == [2, 0]
    assert not (adapter / "config.json").exists()


def test_second_save_replaces_the_folder_of_further_chat_templates(tmp_path):
    tokenizer = build_chat_tokenizer(TEXT_END)
    template = tokenizer.chat_template
    trainer = fine_tuner(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0))
    for text in ("first", "second"):
        trainer.processing_class.chat_template = {"default": template, "tool": text}
        trainer.save_whole_model()
    assert (tmp_path / "additional_chat_templates" / "tool.jinja").read_text() == "second"
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template["default"] == template
    assert not list(tmp_path.glob("unfinished"))


class TestFineTuning:
    def test_texts_end_with_the_eos_of_the_tokenizer(self, tmp_path, warnings):
        tokenizer = build_chat_tokenizer(TEXT_END)
        trainer = fine_tuner(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 0))
        assert learnt(trainer)[0] == " near the river<|endoftext|>"
        assert trainer.model.generation_config.eos_token_id == 0
        assert warnings() == []

    @pytest.mark.parametrize(
        "option", [{"eos_token": TURN_END}, {"eos_tokens": [TURN_END, TEXT_END]}, {"eos_tokens": TURN_END}]
    )
    def test_another_end_of_texts_can_be_chosen(self, tmp_path, option):
        tokenizer = build_chat_tokenizer(TEXT_END)
        trainer = fine_tuner(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 0), **option)
        stays = option == {"eos_tokens": [TURN_END, TEXT_END]}  # where the tokenizer's is among them
        assert learnt(trainer)[0].endswith(TEXT_END if stays else TURN_END)
        ends = trainer.model.generation_config.eos_token_id
        assert ends == (2 if option == {"eos_tokens": TURN_END} else [0, 2] if stays else [2, 0])
        assert tokenizer.eos_token_id == (0 if stays else 2)

    def test_data_of_an_evaluation_does_not_change_them(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        trainer = fine_tuner(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 0), eval_dataset=CHATS)
        assert trainer.model.generation_config.eos_token_id == 0
        assert tokenizer.eos_token == TEXT_END

    def test_chosen_eos_stays_though_turns_end_otherwise(self, tmp_path):
        for options, eos in (({"eos_token": TEXT_END}, 0), ({}, 2)):
            tokenizer = build_chat_tokenizer(TEXT_END)
            fine_tuner(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0), **options)
            assert tokenizer.eos_token_id == eos

    def test_eos_token_outside_eos_tokens_is_refused(self, tmp_path):
        with pytest.raises(ValueError, match=r"eos_token='<\|im_end\|>' is not in eos_tokens="):
            FineTuningConfig(str(tmp_path), eos_token=TURN_END, eos_tokens=[TEXT_END], **TRAINING)

    @pytest.mark.parametrize("value", [[], [""], [3]])
    def test_eos_tokens_that_are_none_are_refused(self, tmp_path, value):
        for config in (FineTuningConfig, MiniLLMConfig):
            with pytest.raises(ValueError, match="eos_tokens must be a list of tokens"):
                config(str(tmp_path), eos_tokens=value, **TRAINING)

    @pytest.mark.parametrize("template", [None, "{% for m in messages %}{{ m.content }}{% endfor %}"])
    def test_texts_need_no_end_of_turn(self, tmp_path, warnings, template):
        tokenizer = build_chat_tokenizer(TEXT_END, template)
        fine_tuner(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 0))
        assert warnings() == []

    @pytest.mark.parametrize("trainer", [FineTuningTrainer, KDTrainer])
    def test_template_without_an_end_of_turn_is_warned_of(self, tmp_path, warnings, trainer):
        tokenizer = build_chat_tokenizer(TEXT_END, "{% for m in messages %}{{ m.content }}\n{% endfor %}")
        options = {"teacher_model": build_chat_model(tokenizer, 0)} if trainer is KDTrainer else {}
        fine_tuner(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0), trainer, **options)
        (line,) = warnings()
        assert "no special token after an assistant's turn" in line

    @pytest.mark.parametrize("pad", [TEXT_END, None])
    def test_tokenizer_without_eos(self, tmp_path, pad):
        def make(data, ends, **options):
            tokenizer = build_chat_tokenizer(None)
            tokenizer.pad_token = pad
            model = build_chat_model(tokenizer, ends)
            return fine_tuner(tmp_path, data, tokenizer, model, **options)

        assert learnt(make(CHATS, 0))[0].endswith("<|im_end|>\n")
        assert learnt(make(TEXTS, 0))[0].endswith(TEXT_END)
        assert learnt(make(TEXTS, None, eos_tokens=TURN_START))[0].endswith(TURN_START)
        with pytest.raises(ValueError, match=r"has no eos_token.*eos_tokens="):
            make(TEXTS, None)

    def test_tokenizer_without_eos_takes_the_one_that_trl_is_told(self, tmp_path):
        def make(data, template=None, pad=TEXT_END, **options):
            tokenizer = build_chat_tokenizer(None, template)
            tokenizer.pad_token = pad
            return fine_tuner(tmp_path, data, tokenizer, build_chat_model(tokenizer, None), **options)

        assert learnt(make(TEXTS, pad=None, eos_token=TURN_START))[0].endswith(TURN_START)
        assert learnt(make(TEXTS, CHATML, eos_token=TURN_START))[0].endswith(TURN_START)
        (tmp_path / "template.jinja").write_text(CHATML)
        trainer = make(CHATS, chat_template_path=str(tmp_path / "template.jinja"))
        assert learnt(trainer)[0].endswith("<|im_end|>\n")
        assert trainer.model.generation_config.eos_token_id == 2

    def test_turns_end_as_the_arguments_of_the_template_say(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        end = f"{{{{ '{TURN_END}' if closes else '{TEXT_END}' }}}}"
        tokenizer.chat_template = f"{{% for m in messages %}}{TURN_START}{{{{ m.content }}}}{end}{{% endfor %}}"
        model = build_chat_model(tokenizer, 0)
        fine_tuner(tmp_path, CHATS, tokenizer, model, chat_template_kwargs={"closes": True})
        assert model.generation_config.eos_token_id == [2, 0]

    def test_rows_of_token_ids_end_with_the_eos_of_the_tokenizer(self, tmp_path):
        tokenizer = build_chat_tokenizer(TEXT_END)
        rows = Dataset.from_dict({"input_ids": [[5, 6, 0]] * 2, "labels": [[-100, 6, 0]] * 2})
        options = {"dataset_kwargs": {"skip_prepare_dataset": True}}
        trainer = fine_tuner(tmp_path, rows, tokenizer, build_chat_model(tokenizer, 0), **options)
        assert trainer.model.generation_config.eos_token_id == 0
        assert tokenizer.eos_token == TEXT_END
        assert learnt(trainer)[0] == tokenizer.decode([6, 0])

    def test_template_is_given_its_arguments(self, tmp_path):
        tokenizer = build_chat_tokenizer(TURN_END)
        tokenizer.chat_template = "{{ note }}" + tokenizer.chat_template
        trainer = fine_tuner(
            tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 2), chat_template_kwargs={"note": "the mill "}
        )
        assert tokenizer.decode(trainer.train_dataset["input_ids"][0]).startswith("the mill <|im_start|>user")

    def test_samples_of_an_evaluation_end_there(self, tmp_path, monkeypatch):
        tokenizer = build_chat_tokenizer(TEXT_END)
        options = {"predict_with_generate": True, "eval_strategy": "steps", "eval_dataset": CHATS}
        trainer = fine_tuner(
            tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 0), max_completion_length=4, **options
        )
        seen = []
        sample = "minillm_trl.baselines.fine_tuning.sample_prompts"
        monkeypatch.setattr(sample, lambda *_, eos_token_ids, **__: seen.append(eos_token_ids) or [[2], [2]])
        assert trainer.evaluate()["eval_rollout/eos_rate"] == 1.0
        assert seen == [[0, 2]]


class TestKD:
    @pytest.mark.parametrize(("ends", "lines"), [(2, 1), ([0, 2], 0)])
    def test_teacher_that_ends_otherwise_is_warned_of(self, tmp_path, warnings, ends, lines):
        tokenizer = build_chat_tokenizer(TEXT_END)
        models = build_chat_model(tokenizer, 0), build_chat_model(tokenizer, ends, seed=1)
        fine_tuner(tmp_path, TEXTS, tokenizer, models[0], KDTrainer, teacher_model=models[1])
        assert len(warnings()) == lines
        assert all("'<|endoftext|>'" in line and "'<|im_end|>'" in line for line in warnings())


class TestTokenizerLikeSmolLM2s:
    """Its pad token is its end token, and its template adds a system message where the conversation has none."""

    SYSTEM = "<|im_start|>system\nabout the river<|im_end|>\n"

    def tokenizer(self):
        tokenizer = build_chat_tokenizer(TURN_END)
        tokenizer.pad_token = TURN_END
        tokenizer.chat_template = (
            "{% if messages[0]['role'] != 'system' %}{{ '" + self.SYSTEM + "' }}{% endif %}" + tokenizer.chat_template
        )
        return tokenizer

    @pytest.mark.parametrize("trainer", [FineTuningTrainer, KDTrainer])
    def test_end_is_learnt_and_padding_is_not(self, tmp_path, trainer):
        tokenizer = self.tokenizer()
        rows = [
            {"prompt": question("the mill"), "completion": answer(text)} for text in ("a pub", "a pub near a mill")
        ]
        options = {"teacher_model": build_chat_model(tokenizer, 2)} if trainer is KDTrainer else {}
        data, model = Dataset.from_list(rows), build_chat_model(tokenizer, 2)
        tuner = fine_tuner(tmp_path, data, tokenizer, model, trainer, **options)
        batch = tuner.data_collator([dict(row) for row in tuner.train_dataset])
        taught = [tokenizer.decode(labels[labels != -100]) for labels in batch["labels"]]
        assert [text.strip() for text in taught] == ["a pub<|im_end|>", "a pub near a mill<|im_end|>"]
        padding = batch["attention_mask"] == 0
        assert padding.any()
        assert (batch["labels"][padding] == -100).all()
        assert (batch["input_ids"][padding] == tokenizer.eos_token_id).all()

    @pytest.mark.parametrize(
        ("conversation", "system"),
        [
            (question("the mill"), SYSTEM),
            ([{"role": "system", "content": "cheap"}, *question("the mill")], "<|im_start|>system\ncheap<|im_end|>\n"),
        ],
    )
    def test_rollouts_have_one_system_message(self, tmp_path, conversation, system):
        tokenizer = self.tokenizer()
        trainer = minillm(tmp_path, CHATS, tokenizer, build_chat_model(tokenizer, 2), build_chat_model(tokenizer, 2))
        (ids,), _, _ = trainer._tokenize_prompts([conversation])
        turns = "<|im_start|>user\nthe mill<|im_end|>\n<|im_start|>assistant\n"
        assert tokenizer.decode(ids) == system + turns


class TestTokenizerThatAppendsItsEos:
    def tokenizer(self):
        tokenizer = build_chat_tokenizer(TURN_END)
        tokenizer.bos_token = TURN_START
        tokenizer.add_bos_token = tokenizer.add_eos_token = True
        return tokenizer

    def test_fine_tuning_learns_one(self, tmp_path, warnings):
        tokenizer = self.tokenizer()
        trainer = fine_tuner(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 2))
        rows = trainer.train_dataset
        assert tokenizer.decode(rows["input_ids"][0]) == "<|im_start|>the mill: near the river<|im_end|>"
        assert learnt(trainer)[0] == " near the river<|im_end|>"
        (line,) = warnings()
        assert "'<|im_end|>'" in line
        tokenizer.save_pretrained(tmp_path)
        assert AutoTokenizer.from_pretrained(tmp_path)("a")["input_ids"] == tokenizer("a")["input_ids"]

    def test_rollouts_begin_without_it(self, tmp_path):
        tokenizer = self.tokenizer()
        trainer = minillm(tmp_path, TEXTS, tokenizer, build_chat_model(tokenizer, 2), build_chat_model(tokenizer, 2))
        prompt_ids, _, _ = trainer._tokenize_prompts(["the mill", "<|im_start|>a"])
        assert [tokenizer.decode(ids) for ids in prompt_ids] == ["<|im_start|>the mill", "<|im_start|>a"]

    def test_corpus_has_one_between_texts(self, tmp_path):
        tokenizer = self.tokenizer()
        models = build_chat_model(tokenizer, 2), build_chat_model(tokenizer, 2)
        corpus = Dataset.from_dict({"text": ["the mill", "a pub"]})
        trainer = minillm(tmp_path, TEXTS, tokenizer, *models, lm_dataset=corpus)
        (row,) = trainer._lm_batches.rows["input_ids"]
        assert tokenizer.decode(row) == "<|im_start|>the mill<|im_end|><|im_start|>a pub<|im_end|>"

    def test_second_bos_of_the_data_is_dropped(self, tmp_path, warnings):
        tokenizer = self.tokenizer()
        tokenizer.add_eos_token = False
        data = TEXTS.map(lambda row: {"prompt": TURN_START + row["prompt"]})
        trainer = fine_tuner(tmp_path, data, tokenizer, build_chat_model(tokenizer, 2))
        assert tokenizer.decode(trainer.train_dataset["input_ids"][0]).startswith("<|im_start|>the mill:")
        (line,) = warnings()
        assert line.startswith("4 of 4 texts begin with '<|im_start|>'")


@pytest.mark.parametrize("data", [TEXTS, CHATS, TEXTS.map(lambda row: {"prompt": "a th", "completion": "e mill"})])
@pytest.mark.parametrize("eos", [TEXT_END, TURN_END])
def test_evaluate_measures_the_loss_that_training_logs(tmp_path, data, eos):
    tokenizer = build_chat_tokenizer(eos)
    model = build_chat_model(tokenizer, 0)
    references = [[row if isinstance(row, str) else row[0]["content"]] for row in data["completion"]]
    for row in range(2):
        one = data.select([row])
        options = {"eval_strategy": "steps", "eval_dataset": one}
        trainer = fine_tuner(tmp_path, one, build_chat_tokenizer(eos), model, **options)
        expected = trainer.evaluate()["eval_loss"]
        prompts = one.select_columns("prompt").add_column("references", references[row : row + 1])
        evaluation = evaluate_model(model, tokenizer, prompts, seeds=None, max_new_tokens=2, progress=False)
        assert evaluation.summary["loss"].mean == pytest.approx(expected, rel=1e-5)


def test_evaluate_counts_the_end_that_conversations_have():
    tokenizer = build_chat_tokenizer(TEXT_END)
    model = build_chat_model(tokenizer, 0)
    with torch.no_grad():  # answers with the end of turn at once
        model.lm_head.weight.zero_()
        model.lm_head.weight[2] = 1.0
        model.model.norm.weight.fill_(1.0)
        model.model.embed_tokens.weight.fill_(1.0)
    options = {"seeds": None, "max_new_tokens": 5, "progress": False}
    prompts = Dataset.from_list([{"prompt": question("the mill")}])
    summary = evaluate_model(model, tokenizer, prompts, **options).summary
    assert (summary["eos_rate"].mean, summary["length"].mean) == (1.0, 1.0)
    summary = evaluate_model(model, tokenizer, prompts, eos_tokens=[TEXT_END], **options).summary
    assert (summary["eos_rate"].mean, summary["length"].mean) == (0.0, 5.0)
