"""Formats of weights that are refused, by name and before anything is loaded."""

from pathlib import Path

import pytest
from conftest import build_model, build_tokenizer
from datasets import Dataset
from transformers import BitsAndBytesConfig, GgufConfig

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, KDConfig, SeqKDConfig
from minillm_trl.cli import main
from minillm_trl.errors import UserError

EIGHT_BITS = [{"load_in_8bit": True}, BitsAndBytesConfig(load_in_8bit=True)]
KINDS = [MiniLLMConfig, KDConfig, SeqKDConfig]


def config(folder: Path, kind: type = MiniLLMConfig, **options: object):
    return kind(str(folder), use_cpu=True, report_to="none", **options)


class TestGGUF:
    @pytest.mark.parametrize(
        "init_kwargs",
        [
            {"gguf_file": "model.gguf"},
            {"quantization_config": {"quant_method": "gguf"}},
            {"quantization_config": GgufConfig(gguf_file="model.gguf")},
        ],
    )
    @pytest.mark.parametrize(
        ("kind", "option"),
        [
            (kind, f"{prefix}model_init_kwargs")
            for kind in (*KINDS, FineTuningConfig)
            for prefix in ("", "teacher_")
            if prefix == "" or kind is not FineTuningConfig
        ],
    )
    def test_keyword_is_refused_with_the_way_to_convert(self, tmp_path, kind: type, option: str, init_kwargs: dict):
        with pytest.raises(UserError) as raised:
            config(tmp_path, kind, **{option: init_kwargs})
        for part in (f"{option}: gguf_file=", "pip install gguf", "GgufConfig(dequantize=True)", "AutoTokenizer"):
            assert part in str(raised.value)

    @pytest.mark.parametrize("is_file", [True, False])
    @pytest.mark.parametrize("option", ["--model_name_or_path", "--teacher_model_name_or_path"])
    def test_file_or_folder_is_refused(self, tmp_path, capsys, model_dir, is_file: bool, option: str):
        path = tmp_path / "downloads" / "model.gguf"
        path.parent.mkdir()
        path.touch()
        names = {"--model_name_or_path": model_dir("llama"), "--teacher_model_name_or_path": model_dir("llama", 1, 48)}
        names[option] = str(path if is_file else path.parent)
        words = [word for pair in names.items() for word in pair]
        command = ["minillm", "--dataset", "e2e", "--max_train_rows", "64", "--use_cpu", "true", *words]
        assert main([*command, "--output_dir", str(tmp_path / "out")]) == 2
        message = capsys.readouterr().err
        assert f"{names[option]} is not supported" in message
        assert "pip install gguf" in message


class TestEightBits:
    @pytest.mark.parametrize("quantization", EIGHT_BITS)
    def test_teacher_that_samples_is_refused(self, tmp_path, quantization):
        init_kwargs = {"quantization_config": quantization}
        with pytest.raises(UserError, match=r"load_in_8bit=True cannot sample \(teacher_mixed_alpha=0.2\).*nf4"):
            config(tmp_path, teacher_model_init_kwargs=init_kwargs)
        config(tmp_path, teacher_model_init_kwargs=init_kwargs, teacher_mixed_alpha=0.0)
        config(tmp_path, KDConfig, teacher_model_init_kwargs=init_kwargs)

    def test_loaded_teacher_is_refused_too(self, tmp_path):
        teacher = build_model("llama", seed=1)
        teacher.is_loaded_in_8bit = True
        with pytest.raises(UserError, match="load_in_8bit=True cannot sample"):
            MiniLLMTrainer(
                model=build_model("llama"),
                teacher_model=teacher,
                args=config(tmp_path, per_device_train_batch_size=2, steps_per_generation=1),
                train_dataset=Dataset.from_dict({"prompt": ["the mill"] * 4}),
                processing_class=build_tokenizer(),
            )

    @pytest.mark.parametrize("name", ["load_in_8bit", "load_in_4bit"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_flag_outside_a_quantization_config_is_led_into_one(self, tmp_path, kind: type, name: str):
        for option in ("model_init_kwargs", "teacher_model_init_kwargs"):
            with pytest.raises(UserError, match=f'{option}: {name}=True.*"quantization_config": {{"{name}": true}}'):
                config(tmp_path, kind, **{option: {name: True}})

    @pytest.mark.parametrize("text", ['{"load_in_8bit": true}', '{"quantization_config": {"load_in_8bit": true}}'])
    def test_command_line_refuses_before_it_reads_anything(self, tmp_path, capsys, text: str):
        words = ["minillm", "--dataset", "none.jsonl", "--model_name_or_path", "none", "--use_cpu", "true"]
        words += ["--teacher_model_name_or_path", "none", "--teacher_model_init_kwargs", text]
        assert main([*words, "--output_dir", str(tmp_path / "out")]) == 2
        assert "load_in_8bit" in capsys.readouterr().err
