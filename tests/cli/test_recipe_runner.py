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
from evaluation_results import write_results

from minillm_trl.cli import main
from minillm_trl.cli.stages import read_recipe
from minillm_trl.data.templates import format_instruction
from minillm_trl.demo.models import build_model, train_tokenizer
from minillm_trl.demo.settings import Shape
from minillm_trl.training.checkpoints import newest_whole_checkpoint, record_files

ROOT = Path(__file__).parents[2]

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
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **values}, sort_keys=False))


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
    checkpoint = newest_whole_checkpoint(run)
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
    record_files(path.parent)
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
    table = output[output.index(": Quality") :]
    assert [line.split()[0] for line in table[table.index("───") :].splitlines()[1:6]] == models
    report = Path("runs/dolly_toy/evaluation/report.md").read_text()
    assert all(f"| {name.replace('_', chr(92) + '_')} |" in report for name in models)

    before = {path: path.stat().st_mtime_ns for path in Path("runs").rglob("*.json")}
    assert main(["recipe", str(dolly_toy)]) == 0
    again = capsys.readouterr().out
    assert again.count(" done\n") == len(names)
    assert table == again[again.index(": Quality") :]
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
        assert "stage sft: runs/sft is not empty, and no recipe wrote it" in capsys.readouterr().err
        assert self.states(capsys, "--accept", "sft") == ["done", "pending", "pending", "pending"]

    def test_chosen_stage_needs_what_it_builds_on(self, recipe, capsys):
        assert main(["recipe", "toy", "--stages", "minillm"]) == 2
        assert "stage minillm builds on sft, which is not done" in capsys.readouterr().err
        assert main(["recipe", "toy", "--stages", "kd"]) == 2
        assert "toy has no stage 'kd'. Choose from sft, minillm, evaluate:sft" in capsys.readouterr().err

    def test_mistake_in_a_later_stage_is_found_before_the_first_runs(self, recipe, capsys):
        change(recipe / "minillm.yaml", teacher_mixed_alfa=0.2)
        assert main(["recipe", "toy"]) == 2
        assert "unknown option 'teacher_mixed_alfa'. Did you mean" in capsys.readouterr().err
        assert not Path("runs").exists()

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("stages: {}\n", "expected `stages` and `evaluate`"),
            ("stages: {sft: train}\nevaluate: {}\n", "stages: sft: 'train' is not one of prepare-data, shrink, sft"),
            ("stages: {sft: sft}\nevaluate: {config: eval.yaml}\n", "evaluate: expected `config`, `models`"),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [sft], output_dir: e, base: sft}\n",
                "evaluate: expected `config`, `models`",
            ),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [sft], output_dir: e, baseline: kd}\n",
                "evaluate: 'kd' is not one of the models",
            ),
            (
                "stages: {sft: sft}\nevaluate: {config: eval.yaml, models: [kd], output_dir: runs/e}\n",
                "evaluate: models: no stage 'kd' makes a model",
            ),
            (
                "stages: {sft: sft}\nevaluate:\n  config: eval.yaml\n  models:\n  output_dir: e\n",
                "recipe.yaml:4: evaluate: models: expected a list of stages, got None",
            ),
            (
                "stages: {sft: sft}\nevaluate:\n  config: eval.yaml\n  models: [sft]\n  output_dir:\n",
                "recipe.yaml:5: evaluate: output_dir: expected a path, got None",
            ),
            (
                "stages: {sft: sft}\nevaluate:\n  config: eval.yaml\n  models: [sft, sft]\n  output_dir: e\n",
                "recipe.yaml:4: evaluate: models: 'sft' is listed twice",
            ),
            ("stages:\n  sft: sft\n  sft: kd\nevaluate: {}\n", "recipe.yaml:3: the key 'sft' is already in line 2"),
            ("stages: {sft: sft, sft: kd}\n", "recipe.yaml:1: the key 'sft' is already in line 1"),
            ("stages:\n  sft: [sft\nevaluate: {}\n", "recipe.yaml:3: broken YAML"),
            ("stages:\n  evaluate: sft\nevaluate: {}\n", "recipe.yaml:2: stages: evaluate: not a name for a stage"),
        ],
    )
    def test_broken_recipe_is_refused(self, recipe, capsys, content: str, message: str):
        (recipe / "recipe.yaml").write_text(content)
        assert main(["recipe", "toy"]) == 2
        assert message in capsys.readouterr().err
        assert main(["recipe", "."]) == 2
        assert "no recipe.yaml in this folder" in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("stage", "output", "message"),
        [
            ("minillm", "./runs/sft", "sft and minillm would write to one place: runs/sft and runs/sft."),
            ("minillm", "runs/sft/second", "sft and minillm would write to one place"),
            ("minillm", "runs", "sft and minillm would write to one place"),
            ("minillm", "runs/evaluation/sft/mill", "minillm and evaluate:sft would write to one place"),
            ("sft", "runs/evaluation", "sft and evaluate:sft would write to one place"),
            ("minillm", "runs/seqkd_teacher_data", "seqkd's teacher_data_dir and minillm would write to one place"),
        ],
    )
    def test_two_stages_with_one_folder_are_refused(self, recipe, capsys, stage: str, output: str, message: str):
        self.add_seqkd(recipe)
        change(recipe / f"{stage}.yaml", output_dir=output)
        assert main(["recipe", "toy", "--list"]) == 2
        assert message in capsys.readouterr().err

    def test_report_in_the_folder_of_a_training_is_refused(self, recipe, capsys):
        content = yaml.safe_load((recipe / "recipe.yaml").read_text())
        change(recipe / "recipe.yaml", evaluate={**content["evaluate"], "models": ["sft"], "output_dir": "runs/sft"})
        assert main(["recipe", "toy", "--list"]) == 2
        assert "would write to one place: runs/sft" in capsys.readouterr().err

    def add_seqkd(self, recipe: Path) -> None:
        values = yaml.safe_load((recipe / "minillm.yaml").read_text())
        values |= {"teacher_model_name_or_path": "runs/sft", "model_name_or_path": "gpt2", "output_dir": "runs/seqkd"}
        (recipe / "seqkd.yaml").write_text(yaml.safe_dump(values))
        content = yaml.safe_load((recipe / "recipe.yaml").read_text())
        change(recipe / "recipe.yaml", stages={**content["stages"], "seqkd": "seqkd"})

    def test_answers_to_a_mixture_are_outdated_with_its_data(self, recipe):
        self.add_seqkd(recipe)
        values = yaml.safe_load((recipe / "seqkd.yaml").read_text()) | {"teacher_model_name_or_path": "gpt2"}
        for name in ("dataset", "dataset_name"):
            values.pop(name, None)
        (recipe / "seqkd.yaml").write_text(yaml.safe_dump(values | {"datasets": [{"path": "runs/sft/answers"}]}))
        found = read_recipe(recipe)
        folders = found.outdated(found.with_dependents(found.named(["sft"])))
        assert Path("runs/seqkd_teacher_data") in folders

    def test_answers_of_the_teacher_are_kept_until_it_is_made_again(self, recipe):
        self.add_seqkd(recipe)
        found = read_recipe(recipe)
        sft, seqkd = found.named(["sft", "seqkd"])
        run, answers = Path("runs/seqkd"), Path("runs/seqkd_teacher_data")
        assert found.outdated(found.with_dependents([seqkd])) == [run]
        folders = found.outdated(found.with_dependents([sft]))
        assert {run, answers} < set(folders)
        change(recipe / "minillm.yaml", dataset=str(answers))
        found = read_recipe(recipe)
        assert "seqkd" not in [stage.name for stage in found.inputs(found.named(["minillm"])[0])]  # it comes later

    def test_changed_stage_is_listed_and_does_not_block_what_does_not_build_on_it(self, recipe, capsys):
        write_results(Path("runs/evaluation/sft/mill"), {"rouge_l": [1.0]})
        write_results(Path("runs/evaluation/minillm/mill"), {"rouge_l": [2.0]})
        self.finish("sft", "minillm", "evaluate")
        change(recipe / "minillm.yaml", max_steps=3)
        changed = "changed: runs/minillm was made with max_steps=2 (now 3)"
        assert self.states(capsys) == ["done", changed, "done", "done"]
        for stage in ("minillm", "evaluate:minillm"):
            assert main(["recipe", "toy", "--stages", stage]) == 2
            assert "stage minillm: runs/minillm was made with max_steps=2 (now 3)" in capsys.readouterr().err
        assert main(["recipe", "toy", "--stages", "sft", "evaluate:sft"]) == 0
        output = capsys.readouterr().out
        assert "Not in the table, since stages they build on have changed: evaluate:minillm" in output
        assert [line.split()[0] for line in output.splitlines() if line.startswith(("sft ", "minillm "))] == ["sft"]

    def test_rerun_of_a_stage_that_is_not_chosen_is_refused(self, recipe, capsys):
        self.finish("sft", "minillm")
        assert main(["recipe", "toy", "--rerun", "sft", "--stages", "minillm"]) == 2
        assert "--rerun sft: --stages leaves it out" in capsys.readouterr().err
        assert Path("runs/sft").is_dir()

    def test_accept_runs_nothing(self, recipe, capsys, monkeypatch):
        monkeypatch.setattr("minillm_trl.cli.recipe.run_subcommand", lambda *words: pytest.fail(f"ran {words}"))
        Path("runs/sft").mkdir(parents=True)
        assert main(["recipe", "toy", "--accept", "sft"]) == 0
        states = [" ".join(line.split()[2:]) for line in capsys.readouterr().out.splitlines()]
        assert states == ["done", "pending", "pending", "pending"]
        for option in ("--rerun", "--stages"):
            assert main(["recipe", "toy", "--accept", "sft", option, "sft"]) == 2
            assert "--accept runs nothing. Leave --rerun and --stages out" in capsys.readouterr().err

    def test_evaluations_at_the_temperatures_of_the_yaml_end_in_one_report(self, recipe, model_dir, capsys):
        rows = [{"prompt": f"the pub {i}", "completion": " is a mill"} for i in range(3)]
        Path("data/validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        change(recipe / "eval.yaml", temperatures=[1.0, 0.5, "greedy"], validation_split="validation")
        for name, seed in (("sft", 0), ("minillm", 1)):
            shutil.copytree(model_dir("llama", seed), Path("runs", name))
        assert main(["recipe", "toy", "--accept", "sft", "minillm"]) == 0
        assert main(["recipe", "toy"]) == 0
        for name in ("sft", "minillm"):
            folder = Path("runs/evaluation", name, "mill")
            found = {str(path.parent.relative_to(folder)) for path in folder.glob("**/results.json")}
            decodings = {"temperature_1.0", "temperature_0.5", "greedy"}
            assert found == decodings | {f"validation/{decoding}" for decoding in decodings}
        report = Path("runs/evaluation/report.md").read_text()
        for heading in ("Where people decode", "Difference from sft at equal entropy"):
            assert f"### {heading}\n" in report

    def test_data_stage_is_asked_whether_its_source_has_changed(self, recipe, capsys):
        raw = Path("raw.jsonl")
        raw.write_text(Path("data/train.jsonl").read_text())
        values = {"task": "examples", "source": "raw.jsonl", "output_dir": "made"}
        (recipe / "rows.yaml").write_text(yaml.safe_dump(values))
        content = yaml.safe_load((recipe / "recipe.yaml").read_text())
        change(recipe / "recipe.yaml", stages={"rows": "prepare-data", **content["stages"]})
        change(recipe / "sft.yaml", dataset="made")
        run = ["recipe", "toy", "--stages", "rows"]
        assert main(run) == 0
        self.finish("sft")
        marker = Path("made/stage.json").read_bytes()
        assert main(run) == 0
        assert Path("made/stage.json").read_bytes() == marker  # or what builds on it would count as outdated
        raw.write_text(raw.read_text().replace("pub", "mill"))
        capsys.readouterr()
        assert self.states(capsys)[0] == "done"  # so far as the marker says
        assert main(run) == 2
        message = capsys.readouterr().err
        assert "stage rows: output_dir=made" in message
        assert "`--rerun rows` moves the folder aside" in message

        assert main(["recipe", "toy", "--accept", "rows", "sft"]) == 0
        assert main(run) == 0
        change(recipe / "rows.yaml", overwrite=True)
        read_recipe(recipe).named(["rows"])[0].mark([], finished=True)
        self.finish("sft")
        capsys.readouterr()
        assert main([*run, "sft"]) == 2
        assert "stage sft: runs/sft builds on made, which has been made again since" in capsys.readouterr().err

    def test_launch_flags_go_to_training_stages_only(self, recipe, monkeypatch):
        commands = []

        def record(subcommand: str, words: list[str]) -> int:
            commands.append([subcommand, *words])
            return 0

        monkeypatch.setattr("minillm_trl.cli.recipe.run_subcommand", record)
        launch = ["--accelerate_config", "cpu", "--num_processes", "2"]
        assert main(["recipe", "toy", "--stages", "sft", "minillm", *launch]) == 0
        assert [command[0] for command in commands] == ["sft", "minillm"]
        assert all(
            command[-4:] == ["--num_processes", "2", "--resume_from_checkpoint", "true"] for command in commands
        )
        assert all(Path(command[-5]).name == "cpu.yaml" for command in commands)
