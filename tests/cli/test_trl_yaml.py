"""YAML files for `trl sft`: `minillm-trl sft` takes each option with the same meaning, or refuses it by name."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import trl.scripts.sft
import yaml
from conftest import build_model, build_tokenizer
from safetensors.torch import load_file
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from minillm_trl.cli import main, sft
from minillm_trl.cli.arguments import parse
from minillm_trl.cli.option_names import aliases, right_name

OF_TRL = (ScriptArguments, SFTConfig, ModelConfig, DatasetMixtureConfig)
REFUSED = {"ignore_bias_buffers"}  # which TRL does not use

CPU = "use_cpu: true\nbf16: false\noutput_dir: out\nreport_to: none\n"
WHOLE = """
model_name_or_path: org/base
dataset_name: org/chats
dataset_config: main
dataset_train_split: train_sft
dataset_test_split: test_sft
learning_rate: 2.0e-5
num_train_epochs: 2
per_device_train_batch_size: 4
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs: {use_reentrant: false}
max_length: 1024
packing: true
packing_strategy: bfd
assistant_only_loss: true
chat_template_path: template.jinja
eos_token: <|im_end|>
eval_strategy: steps
eval_steps: 0.25
lr_scheduler_type: cosine_with_min_lr
lr_scheduler_kwargs: {min_lr_rate: 0.1}
warmup_steps: 0.03
neftune_noise_alpha: 5
seed: 7
"""
ADAPTER = """
model_name_or_path: org/base
model_revision: v2
attn_implementation: sdpa
dtype: float32
dataset_name: org/pairs
completion_only_loss: false
use_peft: true
lora_r: 32
lora_alpha: 64
lora_dropout: 0.1
lora_target_modules: [q_proj, v_proj]
use_rslora: true
load_in_4bit: true
bnb_4bit_quant_type: nf4
use_bnb_nested_quant: true
max_steps: 100
optim: adamw_torch
save_total_limit: 2
"""
MIXTURE = """
model_name_or_path: org/base
datasets:
  - path: org/one
    name: main
    columns: [messages]
    fraction: 0.8
  - path: json
    data_files: two.jsonl
    split: train
    fraction: 0.2
test_split_size: 0.1
eval_strategy: epoch
logging_first_step: true
pad_to_multiple_of: 8
dataset_num_proc: 2
"""
STREAM = """
model_name_or_path: org/base
dataset_name: org/many
dataset_streaming: true
dataset_text_field: content
max_steps: 1000
"""


@pytest.mark.parametrize("text", [WHOLE, ADAPTER, MIXTURE, STREAM], ids=["whole", "adapter", "mixture", "stream"])
def test_values_are_those_that_trl_reads(tmp_path, text):
    file = tmp_path / "sft.yaml"
    file.write_text(text + CPU)
    theirs = trl.scripts.sft.make_parser().parse_args_and_config(["--config", str(file)])
    ours, _ = parse(sft.build_parser(), ["--config", str(file)])
    read = [{name: value for part in parts for name, value in vars(part).items()} for parts in (theirs, ours)]
    for name, given in yaml.safe_load(file.read_text()).items():
        expected, found = (values[name] for values in read)
        if name == "datasets":  # TRL makes dataclasses of them, and we check them when they are loaded
            assert found == given
        else:
            assert found == expected, name


def test_every_option_of_trl_is_taken_or_refused_with_a_reason():
    parser = sft.build_parser()
    known = {action.dest for action in parser._actions} | aliases(parser).keys()
    missing = {entry.name for kind in OF_TRL for entry in fields(kind)} - known
    assert missing == REFUSED
    assert all("Did you mean" not in right_name(name, known) for name in missing)


@pytest.mark.slow
def test_run_of_a_file_gives_the_weights_of_trl(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    build_model("llama", len(tokenizer), 0).save_pretrained("base")
    tokenizer.save_pretrained("base")
    rows = [{"prompt": f"the mill {i}:", "completion": " a cheap pub" * (i % 3 + 1)} for i in range(12)]
    Path("train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    Path("sft.yaml").write_text(
        "model_name_or_path: base\ndatasets: [{path: json, data_files: train.jsonl, columns: [prompt, completion]}]\n"
        "max_steps: 4\nlearning_rate: 0.01\nper_device_train_batch_size: 4\nsave_strategy: 'no'\n"
        "gradient_checkpointing: false\ndisable_tqdm: true\n" + CPU
    )
    assert main(["sft", "--config", "sft.yaml"]) == 0
    words = ["--config", "sft.yaml", "--output_dir", "theirs"]
    trl.scripts.sft.main(*trl.scripts.sft.make_parser().parse_args_and_config(words))
    ours, theirs, start = (load_file(f"{folder}/model.safetensors") for folder in ("out", "theirs", "base"))
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)
    assert not all(torch.allclose(start[name], theirs[name], atol=1e-3) for name in theirs)
