"""What `docs/getting_started.md` tells a new user to type is run, in its order, with a tiny teacher and student."""

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from conftest import build_tokenizer
from transformers import GPT2Config, GPT2LMHeadModel

from minillm_trl.cli import main

TEXT = (Path(__file__).parents[2] / "docs/getting_started.md").read_text()
TRAINING = "--use_cpu true --bf16 false --report_to none --max_steps 2 --logging_steps 1"
# What makes each command small; everything else is as on the page
SMALL = {
    "prepare-data": "--validation_rows 4 --test_rows 4",
    "sft": f"{TRAINING} --per_device_train_batch_size 8",
    "minillm": f"{TRAINING} --per_device_train_batch_size 2 --gradient_accumulation_steps 2 --steps_per_generation 4 "
    "--max_completion_length 6 --eval_steps 2 --save_steps 2 --warmup_steps 1",
    "evaluate": "--seeds 10 20 --max_new_tokens 6",
    "generate": "--max_new_tokens 6",
}
IN_PYTHON = {
    "per_device_train_batch_size=16": "per_device_train_batch_size=2, use_cpu=True, bf16=False, report_to='none'",
    "gradient_accumulation_steps=4": "gradient_accumulation_steps=2",
    "steps_per_generation=16": "steps_per_generation=4",
    "max_completion_length=256": "max_completion_length=6",
    "max_steps=1600": "max_steps=1",
}


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", TEXT, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder with two models in it, the page's YAML, and data in the form that it shows."""
    monkeypatch.chdir(tmp_path)
    tokenizer = build_tokenizer()
    for name, width in (("TEACHER", 32), ("STUDENT", 16)):
        shape = GPT2Config(vocab_size=300, n_positions=512, n_embd=width, n_layer=1, n_head=2, eos_token_id=0)
        GPT2LMHeadModel(shape).save_pretrained(name)
        tokenizer.save_pretrained(name)
    (example, *_) = blocks("json")
    rows = [json.loads(line) for line in example.splitlines()]
    rows = [{**rows[i % 2], "instruction": f"the mill {i}", "output": f"the mill is cheap {i}"} for i in range(24)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (configuration,) = blocks("yaml")
    (tmp_path / "my.yaml").write_text(configuration)
    return tmp_path


def test_page_leads_from_two_models_and_a_file_to_a_student_that_is_compared(folder: Path):
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[1:] for line in lines if line.startswith("minillm-trl ")]
    assert [words[0] for words in commands] == [
        *("doctor", "demo", "prepare-data", "sft", "sft", "doctor", "minillm"),
        *("evaluate", "evaluate", "evaluate", "compare", "generate"),
    ]
    for words in commands:
        if words[0] != "demo":  # which has tests of its own
            assert main([*words, *shlex.split(SMALL.get(words[0], ""))]) == 0, words
    report = (folder / "runs/my/report/report.html").read_text()
    assert all(name in report for name in ("teacher", "sft", "minillm"))
    # the student is a plain model; the best checkpoint was chosen by what the page says
    assert (folder / "runs/my/minillm/model.safetensors").is_file()
    state = json.loads((folder / "runs/my/minillm/checkpoint-2/trainer_state.json").read_text())
    assert {"eval_rouge_l", "eval_objective/reverse_kl"} <= set(state["log_history"][-1])

    (code,) = blocks("python")
    for given, small in IN_PYTHON.items():
        assert given in code
        code = code.replace(given, small)
    exec(code, {})
    assert (folder / "runs/my/python/model.safetensors").is_file()


def test_batches_of_the_yaml_are_what_its_comment_says(folder: Path):
    values = yaml.safe_load((folder / "my.yaml").read_text())
    rows, window = values["per_device_train_batch_size"], values["gradient_accumulation_steps"]
    updates = values["steps_per_generation"] * values["num_iterations"] // window
    assert (rows * values["steps_per_generation"], rows * window, updates) == (256, 64, 16)
    assert values["save_steps"] % updates == 0  # between two rollouts
