"""Processes that were started together know about each other, or none of them works."""

import json
import os
from pathlib import Path

import pytest
from accelerate import PartialState
from conftest import run_module
from datasets import Dataset
from test_launch_configurations import write_recipe

from minillm_trl import MiniLLMConfig, MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, SeqKDConfig
from minillm_trl.cli import SUBCOMMANDS, main
from minillm_trl.cli.launch import hand_over
from minillm_trl.errors import UserError
from minillm_trl.hardware.processes import launched_on_cpu
from minillm_trl.training.run_record import RunRecord

LAUNCHER = ("WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_CPU", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def two_started(monkeypatch):
    """As after a launch of two processes which accelerate, that looks for GPUs, has not connected."""
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.cli
@pytest.mark.distributed
@pytest.mark.parametrize("subcommand", ["sft", "minillm"])
def test_cpu_configuration_needs_no_use_cpu_in_the_recipe(tmp_path: Path, model_dir, subcommand: str):
    recipe = write_recipe(tmp_path, subcommand, model_dir)
    recipe.write_text(recipe.read_text().replace("use_cpu: true\n", ""))
    result = run_module("minillm_trl", subcommand, "--config", recipe, "--accelerate_config", "cpu")
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("Saved to") == 1
    (attempt,) = json.loads((tmp_path / "out" / "run.json").read_text())["attempts"]
    assert attempt["processes"] == {"number": 2, "distributed_type": "MULTI_CPU"}
    assert attempt["status"] == "finished"


def test_hand_over_tells_the_processes_of_a_cpu_configuration_alone(monkeypatch):
    told = []
    monkeypatch.setattr(
        "accelerate.commands.launch.launch_command", lambda _: told.append(os.environ.get("ACCELERATE_USE_CPU"))
    )
    for name in ("cpu", "ddp_bf16"):
        hand_over("sft", ["--accelerate_config", name], {"--accelerate_config": name})
    assert told == ["true", None]


@pytest.mark.parametrize(
    ("variables", "has_gpus", "expected"),
    [
        ({}, False, False),  # `use_cpu` is left as it is, and a CPU used
        ({"LOCAL_RANK": "1"}, False, True),
        ({"LOCAL_RANK": "1"}, True, False),
        ({"LOCAL_RANK": "1", "ACCELERATE_USE_CPU": "true"}, True, True),
        ({"ACCELERATE_USE_CPU": "False"}, True, False),
    ],
)
def test_a_launch_is_on_cpus_if_it_says_so_or_has_nothing_else(monkeypatch, variables, has_gpus, expected):
    monkeypatch.setattr("torch.accelerator.is_available", lambda: has_gpus)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert launched_on_cpu() is expected


@pytest.mark.parametrize("kind", [MiniLLMConfig, FineTuningConfig, KDConfig, SeqKDConfig])
def test_launch_on_cpus_implies_use_cpu(tmp_path: Path, monkeypatch, kind: type):
    assert not kind(str(tmp_path), report_to="none").use_cpu
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert kind(str(tmp_path), report_to="none").use_cpu


class TestRefusal:
    @pytest.mark.parametrize("subcommand", ["sft", "kd", "seqkd", "minillm", "evaluate"])
    def test_command_ends_before_it_reads_or_writes(self, tmp_path: Path, capsys, two_started, subcommand: str):
        model = ["--model" if subcommand == "evaluate" else "--model_name_or_path", "none"]
        teacher = [] if subcommand in ("sft", "evaluate") else ["--teacher_model_name_or_path", "none"]
        output_dir = tmp_path / "out"
        words = [subcommand, "--dataset", "none.jsonl", *model, *teacher, "--output_dir", str(output_dir)]
        assert main(words) == 2
        assert "WORLD_SIZE=2" in capsys.readouterr().err
        assert not output_dir.exists()

    @pytest.mark.parametrize("subcommand", sorted(set(SUBCOMMANDS) - {"sft", "kd", "seqkd", "minillm", "evaluate"}))
    def test_command_of_one_process_is_not_launched_in_several(self, capsys, monkeypatch, two_started, subcommand):
        monkeypatch.setenv("LOCAL_RANK", "0")
        assert main([subcommand]) == 2
        assert f"{subcommand} runs in one process" in capsys.readouterr().err

    def test_hand_over_is_not_refused(self, tmp_path: Path, monkeypatch, two_started):
        monkeypatch.setattr("minillm_trl.cli.sft.hand_over", lambda *_: 7)
        words = ["sft", "--dataset", "d", "--model_name_or_path", "m", "--output_dir", str(tmp_path)]
        assert main([*words, "--accelerate_config", "cpu"]) == 7

    def test_trainers_of_python_end_before_they_load_a_model(self, tmp_path: Path, tokenizer, two_started):
        data = Dataset.from_dict({"prompt": ["the mill"] * 8, "completion": [" is cheap"] * 8})
        options = {"processing_class": tokenizer, "train_dataset": data}
        tokenizer.save_pretrained(tmp_path / "model")  # without weights
        (tmp_path / "model" / "model.safetensors").touch()
        model = str(tmp_path / "model")
        fine_tuning, minillm = (
            config_class(str(tmp_path), report_to="none") for config_class in (FineTuningConfig, MiniLLMConfig)
        )
        with pytest.raises(UserError, match="WORLD_SIZE=2"):
            FineTuningTrainer(model=model, args=fine_tuning, **options)
        with pytest.raises(UserError, match="WORLD_SIZE=2"):
            MiniLLMTrainer(model=model, teacher_model=model, args=minillm, **options)


def test_run_of_which_another_process_failed_has_not_finished(tmp_path: Path, monkeypatch):
    def fail(state: PartialState) -> None:
        raise RuntimeError("Connection closed by peer")

    args = FineTuningConfig(str(tmp_path), report_to="none")
    record = RunRecord("sft", [], {}, [args], None)
    with pytest.raises(RuntimeError, match="closed by peer"), record:
        monkeypatch.setattr(PartialState, "wait_for_everyone", fail)
    (attempt,) = json.loads((tmp_path / "run.json").read_text())["attempts"]
    assert attempt["status"] == "failed"
    assert "Connection closed by peer" in attempt["error"]
    assert "Traceback" in attempt["traceback"]
