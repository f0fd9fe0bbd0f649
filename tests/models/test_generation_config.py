"""Generation configs that transformers loads but does not save: sampling options without `do_sample`."""

import json
import logging
from pathlib import Path

import pytest
import torch
from chat_models import TEXT_END, TURN_END, build_chat_model, build_chat_tokenizer
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from test_cli import refused
from test_ends_of_run import CHATS, fine_tuner, minillm
from transformers import GenerationConfig

from minillm_trl.baselines import KDTrainer
from minillm_trl.cli import main
from minillm_trl.errors import UserError
from minillm_trl.models.generation_config import make_saveable

SAMPLING = {"temperature": 0.6, "top_p": 0.9}


@pytest.fixture
def warnings(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("minillm_trl"), "propagate", True)
    caplog.set_level(logging.WARNING)
    return lambda: [record.getMessage() for record in caplog.records if "do_sample=true" in record.getMessage()]


def saved(folder: Path) -> dict:
    return json.loads((folder / "generation_config.json").read_text())


def test_do_sample_is_set_and_announced_once(tmp_path, warnings):
    config = GenerationConfig(eos_token_id=3, **SAMPLING)
    make_saveable(config, "'a'")
    make_saveable(config, "'a'")
    (line,) = warnings()
    assert "'a'" in line
    config.save_pretrained(tmp_path)
    assert {name: saved(tmp_path)[name] for name in (*SAMPLING, "do_sample", "eos_token_id")} == {
        **SAMPLING,
        "do_sample": True,
        "eos_token_id": 3,
    }
    make_saveable(GenerationConfig(**SAMPLING), "'b'", announce=False)
    assert len(warnings()) == 1


def test_config_that_can_be_saved_stays_as_it_is(warnings):
    for options in ({}, {"do_sample": True, **SAMPLING}, {"do_sample": False}, {"temperature": 1.0}):
        config = GenerationConfig(**options)
        before = config.to_dict()
        make_saveable(config, "'a'")
        assert config.to_dict() == before
    assert not warnings()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"do_sample": False, **SAMPLING}, "temperature"),
        ({"length_penalty": 2.0, **SAMPLING}, "length_penalty"),
    ],
)
def test_other_problems_are_refused_with_model_and_field(options, field):
    config = GenerationConfig(**options)
    before = config.to_dict()
    with pytest.raises(UserError, match=f"'a' cannot be saved.*generation_config.json.*(?s:.*){field}"):
        make_saveable(config, "'a'")
    assert config.to_dict() == before


@pytest.mark.parametrize("method", ["sft", "kd", "minillm"])
def test_training_sets_it_before_the_first_step_and_saves_it(method, tmp_path, warnings):
    tokenizer = build_chat_tokenizer(TEXT_END)
    student, teacher = build_chat_model(tokenizer, 0), build_chat_model(tokenizer, 1)
    student.generation_config = GenerationConfig(eos_token_id=0, **SAMPLING)
    options = {"save_strategy": "steps", "save_steps": 1}
    if method == "minillm":
        trainer = minillm(tmp_path, CHATS, tokenizer, student, teacher, **options)
    else:
        more = {"trainer": KDTrainer, "teacher_model": teacher} if method == "kd" else {}
        trainer = fine_tuner(tmp_path, CHATS, tokenizer, student, **more, **options)
    trainer.train()
    trainer.save_whole_model()
    assert len(warnings()) == 1
    for folder in (tmp_path, tmp_path / "checkpoint-1"):
        assert saved(folder)["do_sample"] is True
        assert saved(folder)["temperature"] == 0.6
        assert tokenizer.convert_tokens_to_ids(TURN_END) in saved(folder)["eos_token_id"]


def test_training_refuses_what_cannot_be_saved_before_the_first_step(tmp_path):
    tokenizer = build_chat_tokenizer(TEXT_END)
    student = build_chat_model(tokenizer, 0)
    student.generation_config = GenerationConfig(eos_token_id=0, do_sample=False, **SAMPLING)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with pytest.raises(UserError, match="the generation config of the student cannot be saved"):
        fine_tuner(tmp_path, CHATS, tokenizer, student).train()
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


@pytest.mark.parametrize("command", ["shrink", "merge"])
def test_commands_save_a_model_with_such_a_config(command, tmp_path, monkeypatch, capsys):
    save = GenerationConfig.save_pretrained

    def save_strictly(config, folder, **options):  # as releases of transformers do that do not spare loaded configs
        config.validate(strict=True)
        save(config, folder, **options)

    folder, output, tokenizer = tmp_path / "model", tmp_path / "output", build_tokenizer()
    model = build_model("llama", len(tokenizer), layers=3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    words = ["shrink", "--model", folder, "--num_layers", "2"]
    if command == "merge":
        adapter = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        adapter.save_pretrained(tmp_path / "adapter")
        words = ["merge", "--model", folder, "--adapter", tmp_path / "adapter"]
    words = list(map(str, [*words, "--output_dir", output]))
    monkeypatch.setattr(GenerationConfig, "save_pretrained", save_strictly)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": 0, "do_sample": False, **SAMPLING}))
    assert "generation_config.json" in refused(capsys, *words)
    path.write_text(json.dumps({"eos_token_id": 0, **SAMPLING}))
    assert main(words) == 0
    assert {name: saved(output)[name] for name in ("do_sample", *SAMPLING)} == {"do_sample": True, **SAMPLING}
