"""`demo --models smollm2` with a tiny teacher of as many layers, from a folder and from a stand-in for the hub."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from chat_models import save_small_smollm2, write_small_dolly

from minillm_trl.cli import main
from minillm_trl.cli.launch import recipes_folder
from minillm_trl.cli.real_demo import RECIPE

NAME = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    return save_small_smollm2(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def dolly(tmp_path_factory) -> Path:
    return write_small_dolly(tmp_path_factory.mktemp("dolly"), 460)


@pytest.fixture
def short_recipe(tmp_path, monkeypatch) -> Path:
    """The recipe with few updates."""
    folder = tmp_path / RECIPE
    shutil.copytree(recipes_folder(RECIPE), folder)
    changes = {
        "heal": {"max_steps": 2},
        "sft": {"max_steps": 2},
        "minillm": {"max_steps": 4, "num_iterations": 1, "max_completion_length": 4},
        "answers": {"max_completion_length": 4},
        "eval": {"max_rows": 10, "max_new_tokens": 4},
    }
    for stage, values in changes.items():
        path = folder / f"{stage}.yaml"
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    monkeypatch.setattr("minillm_trl.cli.real_demo.recipes_folder", lambda name: folder)
    return folder


@pytest.mark.slow
def test_runs_from_folders_and_resumes(tmp_path, teacher, dolly, short_recipe, capfd):
    words = ["demo", "--models", "smollm2", "--teacher", str(teacher), "--dolly", str(dolly)]
    words += ["--output_dir", str(tmp_path / "run")]
    assert main(words) == 0
    printed = capfd.readouterr().out
    assert printed.count("MiniLLM student:") == 10
    runs = tmp_path / "run" / "runs" / "smollm2"
    config = json.loads((runs / "start" / "config.json").read_text())
    assert (config["num_hidden_layers"], config["intermediate_size"]) == (24, 1024)
    made = (runs / "minillm" / "model.safetensors").stat().st_mtime_ns
    assert main(words) == 0
    assert "MiniLLM student:" in capfd.readouterr().out
    assert (runs / "minillm" / "model.safetensors").stat().st_mtime_ns == made  # nothing ran again
    assert main([*words[:-4], "--dolly", str(dolly.with_name("other.jsonl")), *words[-2:]]) == 2
    other = write_small_dolly(tmp_path, 461)
    capfd.readouterr()
    assert main([*words[:-4], "--dolly", str(other), *words[-2:]]) == 2
    assert "name another --output_dir" in capfd.readouterr().err


@pytest.mark.slow
def test_teacher_comes_by_its_name_from_the_hub(tmp_path, teacher):
    """The hub's cache holds the teacher under its name, so that it loads by name without a network."""
    model = tmp_path / "cache" / f"models--{NAME.replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    shutil.copytree(teacher, model / "snapshots" / ("0" * 40))
    config = recipes_folder(RECIPE) / "teacher.yaml"
    command = [sys.executable, "-m", "minillm_trl", "shrink", "--config", str(config)]
    environment = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    subprocess.run(command, cwd=tmp_path, env=environment, check=True, capture_output=True)
    assert (tmp_path / "runs" / "smollm2" / "teacher" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--models", "smollm2", "--full"], "--full has no effect with --models smollm2"),
        (["--models", "smollm2", "--quick"], "--quick has no effect with --models smollm2"),
        (["--models", "smollm2", "--seed", "0"], "--seed has no effect with --models smollm2"),
        (["--teacher", "somewhere"], "--teacher and --dolly belong to --models smollm2"),
        (["--models", "smollm2", "--dolly", "nowhere.jsonl"], "--dolly nowhere.jsonl: no such file"),
    ],
)
def test_options_without_effect_are_refused(words, message, capsys):
    assert main(["demo", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("models", ["e2e", "smollm2"])
def test_a_folder_that_cannot_be_made_is_named(tmp_path, models, capsys):
    file = tmp_path / "file"
    file.touch()
    assert main(["demo", "--models", models, "--output_dir", str(file)]) == 2
    assert f"{file} cannot be written" in capsys.readouterr().err
