"""Models that take images are not trained or merged as text, which would lose their processor."""

import json

import pytest
from conftest import build_model, build_tokenizer
from peft import LoraConfig, get_peft_model
from test_trained_weights import make_trainer
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from minillm_trl.cli import main


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = build_tokenizer()
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Gemma3Config(
        text_config={**sizes, "vocab_size": len(tokenizer) + 8, "head_dim": 8, "num_key_value_heads": 1},
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=4,
        image_token_index=len(tokenizer),
        boi_token_index=len(tokenizer) + 1,
        eoi_token_index=len(tokenizer) + 2,
    )
    path = tmp_path_factory.mktemp("multimodal")
    Gemma3ForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("command", ["sft", "kd", "seqkd", "minillm"])
def test_commands_refuse_it_as_a_student_before_it_is_loaded(tmp_path, model_dir, folder, capsys, command: str):
    data = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"the mill {i}", "completion": " is cheap"} for i in range(300)]  # enough for a rollout
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["--dataset", str(data), "--output_dir", str(tmp_path / "out"), "--use_cpu", "true", "--bf16", "false"]
    options += ["--max_completion_length", "8"]
    if command != "sft":
        options += ["--teacher_model_name_or_path", model_dir("gpt2")]
    assert main([command, "--model_name_or_path", folder, *options]) == 2
    message = capsys.readouterr().err
    assert f"--model_name_or_path {folder} is multimodal (model_type='gemma3', with a vision_config)" in message
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("kind", ["sft", "kd", "minillm"])
def test_trainers_refuse_it_too(tmp_path, folder, kind: str):
    with pytest.raises(ValueError, match=r"model='.*' is multimodal \(model_type='gemma3'"):
        make_trainer(kind, str(tmp_path), folder, build_model("gpt2", len(build_tokenizer()), 1))


def test_adapters_are_not_merged_into_it(tmp_path, folder, capsys):
    model = Gemma3ForConditionalGeneration.from_pretrained(folder)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    assert main(["merge", "--adapter", str(tmp_path / "adapter"), "--output_dir", str(tmp_path / "out")]) == 2
    assert f"the base '{folder}' of the adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
