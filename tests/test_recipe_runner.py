"""`minillm-trl recipe`: goes on where it was killed, skips what is done, refuses what has changed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import ENVIRONMENT

from minillm_trl.checkpoints import last_complete_checkpoint
from minillm_trl.cli import main
from minillm_trl.cli.stages import read_recipe
from minillm_trl.data.templates import format_instruction
from minillm_trl.demo.models import build_model, train_tokenizer
from minillm_trl.demo.settings import Shape

ROOT = Path(__file__).parents[1]

TRAINING = {
    "dataset": "data",
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "disable_tqdm": True,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
}


def write_recipe(folder: Path, student: str, teacher: str) -> Path:
    """A recipe in `folder/toy` of fine-tuning, MiniLLM from there, and an evaluation of both."""
    (folder / "data").mkdir()
    rows = [{"prompt": f"the mill {i}", "completion": " is a pub"} for i in range(8)]
    for split in ("train", "test"):
        (folder / "data" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    stages = {
        "sft": {**TRAINING, "model_name_or_path": student, "max_steps": 2},
        "minillm": {
            **TRAINING,
            "model_name_or_path": "runs/sft",
            "teacher_model_name_or_path": teacher,
            "max_completion_length": 4,
            "max_steps": 2,
        },
    }
    recipe = folder / "toy"
    recipe.mkdir()
    for name, values in stages.items():
        (recipe / f"{name}.yaml").write_text(yaml.safe_dump({**values, "output_dir": f"runs/{name}"}))
    evaluation = {"teacher": teacher, "tasks": {"mill": "data"}, "seeds": [1], "max_new_tokens": 4}
    (recipe / "eval.yaml").write_text(yaml.safe_dump(evaluation))
    models = {"config": "eval.yaml", "models": ["sft", "minillm"], "baseline": "sft", "output_dir": "runs/evaluation"}
    content = {"stages": {"sft": "sft", "minillm": "minillm"}, "evaluate": models}
    (recipe / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return recipe


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch, model_dir) -> Path:
    monkeypatch.chdir(tmp_path)
    write_recipe(tmp_path, model_dir("llama"), model_dir("llama", 1, 48))
    return Path("toy")


def change(path: Path, **values) -> None:
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}))


@pytest.fixture
def dolly_toy(tmp_path: Path, monkeypatch) -> Path:
    """`recipes/dolly_toy` with models as the demo leaves them, but untrained and tiny."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "recipes" / "dolly_toy", "dolly_toy")
    raw = Path("data/raw/databricks-dolly-15k.jsonl")
    raw.parent.mkdir(parents=True)
    shutil.copy(ROOT / "tests/data/dolly/databricks-dolly-excerpt.jsonl", raw)
    rows = [json.loads(line) for line in raw.read_text().splitlines()]
    texts = [format_instruction(row["instruction"], row["context"]) + row["response"] for row in rows]
    tokenizer = train_tokenizer(texts, 800)
    for seed, (name, width) in enumerate({"teacher": 48, "sft": 32}.items()):
        for saved in (build_model(Shape(width, 1, 2), tokenizer, seed), tokenizer):
            saved.save_pretrained(f"runs/demo/{name}/model")
    change(Path("dolly_toy/sft_teacher.yaml"), max_steps=60, eval_steps=4, save_steps=4)  # time for a kill
    return Path("dolly_toy")


def kill_after_a_checkpoint(run: Path, recipe: Path) -> Path:
    """Kill the recipe and its stage in the middle of the run; returns the newest state."""
    command = [sys.executable, "-m", "minillm_trl", "recipe", str(recipe)]
    process = subprocess.Popen(command, env=ENVIRONMENT, start_new_session=True)
    saved = run / "checkpoint-4" / "trainer_state.json"
    try:
        while not (saved.is_file() and saved.stat().st_size) and process.poll() is None:
            time.sleep(0.005)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    checkpoint = last_complete_checkpoint(run)
    assert checkpoint is not None
    return Path(checkpoint) / "trainer_state.json"


@pytest.mark.cli
def test_raw_dolly_becomes_a_table_although_killed_and_then_nothing_is_left(dolly_toy: Path, capsys):
    teacher = Path("runs/dolly_toy/sft_teacher")
    path = kill_after_a_checkpoint(teacher, dolly_toy)
    state = json.loads(path.read_text())
    assert state["global_step"] < 60
    state["log_history"][0]["loss"] = 123.0  # a mark that training anew would not have
    path.write_text(json.dumps(state))
    (teacher / "checkpoint-99").mkdir()  # as a kill in the middle of saving leaves it

    assert main(["recipe", str(dolly_toy)]) == 0
    output = capsys.readouterr().out
    stages = ["dolly", "sft_teacher", "sft", "kd", "seqkd", "minillm"]
    models = stages[1:]
    names = [*stages, *(f"evaluate:{name}" for name in models)]
    expected = [[str(number), name, "pending"] for number, name in enumerate(names, start=1)]
    expected[0][2], expected[1][2] = "done", "stopped"
    assert [line.split() for line in output.splitlines()[: len(names)]] == expected
    history = json.loads((teacher / "checkpoint-60/trainer_state.json").read_text())["log_history"]
    assert history[0]["loss"] == 123.0
    assert [entry["step"] for entry in history if "loss" in entry] == list(range(4, 61, 4))
    table = output[output.index("Rouge-L minus sft's") :]
    assert [line.split()[0] for line in table.splitlines()[2:7]] == models
    report = Path("runs/dolly_toy/evaluation/report.md").read_text()
    assert all(f"| {name.replace('_', chr(92) + '_')} |" in report for name in models)

    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.json")}
    assert main(["recipe", str(dolly_toy)]) == 0
    again = capsys.readouterr().out
    assert again.count(" done\n") == len(names)
    assert table.splitlines()[:7] == again[again.index("Rouge-L minus sft's") :].splitlines()[:7]
    assert {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.json")} == before


@pytest.mark.cli
def test_failed_stage_stops_the_recipe_with_its_status(recipe, capsys):
    TestStates().finish("sft", "minillm", "evaluate")
    change(recipe / "minillm.yaml", learning_rate=1e-3, max_completion_length=1000)
    assert main(["recipe", "toy"]) == 2
    message = capsys.readouterr().err
    assert "runs/minillm was made with learning_rate=None (now 0.001), max_completion_length=4 (now 1000)" in message
    shutil.copytree(
        yaml.safe_load((recipe / "sft.yaml").read_text())["model_name_or_path"], "runs/sft", dirs_exist_ok=True
    )
    assert main(["recipe", "toy", "--rerun", "minillm"]) == 2
    captured = capsys.readouterr()
    assert "runs/minillm was moved to runs/minillm.replaced-1" in captured.out
    assert "stage minillm ended with status 2" in captured.err
    assert Path("runs/minillm.replaced-1/model.safetensors").is_file()
    assert Path("runs/evaluation/minillm.replaced-1").is_dir()
    assert main(["recipe", "toy", "--list"]) == 0
    assert [line.split()[2] for line in capsys.readouterr().out.splitlines()] == ["done", "stopped", "done", "pending"]


class TestStates:
    def finish(self, *names: str) -> None:
        """As if the stages had run."""
        recipe = read_recipe(Path("toy"))
        for stage in recipe.named(list(names)):
            stage.output.mkdir(parents=True, exist_ok=True)
            (stage.output / "model.safetensors").touch()
            stage.mark(recipe.inputs(stage), finished=True)

    def states(self, capsys, *arguments: str) -> list[str]:
        assert main(["recipe", "toy", "--list", *arguments]) == 0
        return [" ".join(line.split()[2:]) for line in capsys.readouterr().out.splitlines()]

    def test_what_builds_on_a_stage_that_was_made_again_is_refused(self, recipe, capsys):
        self.finish("sft", "minillm", "evaluate")
        assert self.states(capsys) == ["done"] * 4
        self.finish("sft")
        assert main(["recipe", "toy"]) == 2
        message = capsys.readouterr().err
        assert "stage minillm: runs/minillm builds on runs/sft, which has been made again since" in message
        assert self.states(capsys, "--rerun", "sft") == ["again"] * 4
        assert self.states(capsys, "--accept", "minillm", "evaluate") == ["done"] * 4

    def test_rerun_takes_what_builds_on_the_stage_and_nothing_else(self, recipe, capsys):
        self.finish("sft", "minillm", "evaluate")
        assert self.states(capsys, "--rerun", "minillm") == ["done", "again", "done", "again"]

    def test_a_checkpoint_of_a_stage_counts_as_the_stage(self, recipe):
        change(recipe / "minillm.yaml", model_name_or_path="runs/sft/checkpoint-2")
        found = read_recipe(recipe)
        (minillm,) = found.named(["minillm"])
        assert [stage.name for stage in found.inputs(minillm)] == ["sft"]

    def test_folder_that_no_recipe_wrote_is_refused_or_accepted(self, recipe, capsys):
        Path("runs/sft").mkdir(parents=True)
        Path("runs/sft/model.safetensors").touch()
        assert main(["recipe", "toy"]) == 2
        assert "stage sft: runs/sft is not empty, and no recipe has written it" in capsys.readouterr().err
        assert self.states(capsys, "--accept", "sft") == ["done", "pending", "pending", "pending"]

    def test_chosen_stage_needs_what_it_builds_on(self, recipe, capsys):
        assert main(["recipe", "toy", "--stages", "minillm"]) == 2
        assert "stage minillm builds on sft, which is not done" in capsys.readouterr().err
        assert main(["recipe", "toy", "--stages", "kd"]) == 2
        assert "toy has no stage 'kd'. There are: sft, minillm, evaluate:sft" in capsys.readouterr().err

    def test_mistake_in_a_later_stage_is_found_before_the_first_runs(self, recipe, capsys):
        change(recipe / "minillm.yaml", teacher_mixed_alfa=0.2)
        assert main(["recipe", "toy"]) == 2
        assert "unknown option 'teacher_mixed_alfa'. Did you mean" in capsys.readouterr().err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("stages: {}\n", "expected `stages` and `evaluate`"),
            ("stages: {sft: train}\nevaluate: {}\n", "stages: sft: 'train' is none of prepare-data, sft"),
            ("stages: {sft: sft}\nevaluate: {config: eval.yaml}\n", "evaluate: expected `config`, `models`"),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [sft], output_dir: e, base: sft}\n",
                "evaluate: expected `config`, `models`",
            ),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [sft], output_dir: e, baseline: kd}\n",
                "evaluate: 'kd' is none of the models",
            ),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [kd], output_dir: runs/e}\n",
                "evaluate: models: there is no stage 'kd'",
            ),
        ],
    )
    def test_broken_recipe_is_refused(self, recipe, capsys, content: str, message: str):
        (recipe / "recipe.yaml").write_text(content)
        assert main(["recipe", "toy"]) == 2
        assert message in capsys.readouterr().err
        assert main(["recipe", "."]) == 2
        assert "no recipe.yaml in this folder" in capsys.readouterr().err

    def test_launch_flags_go_to_training_stages_only(self, recipe, monkeypatch):
        commands = []

        def record(command: list[str]) -> int:
            commands.append(command[3:])
            return 0

        monkeypatch.setattr("minillm_trl.cli.recipe._run_child", record)
        launch = ["--accelerate_config", "cpu", "--num_processes", "2"]
        assert main(["recipe", "toy", "--stages", "sft", "minillm", *launch]) == 0
        assert [command[0] for command in commands] == ["sft", "minillm"]
        assert all(command[-2:] == ["--num_processes", "2"] for command in commands)
        assert all(Path(command[-3]).name == "cpu.yaml" for command in commands)
