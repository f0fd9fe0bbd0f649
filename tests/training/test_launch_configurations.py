"""The launch configurations: accelerate takes them, and the training subcommands run under them."""

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.other import get_free_port
from conftest import ENVIRONMENT, run_module
from test_distributed import needs_deepspeed

from minillm_trl.cli.launch import accelerate_config_path

ROOT = Path(__file__).parents[2]
LAUNCH = sorted((ROOT / "recipes" / "accelerate_configs").glob("*.yaml"))


class TestLaunchConfigurations:
    def test_each_has_its_twin_for_the_other_precision(self):
        names = {path.stem for path in LAUNCH}
        assert {name for name in names if name.startswith("v100_")} >= {
            "v100_single_gpu_fp16",
            "v100_ddp_fp16",
            "v100_zero2_fp16",
            "v100_zero3_fp16",
            "v100_fsdp_fp16",
            "v100_multi_node_fp16",
            "v100_multi_node_fsdp_fp16",
        }
        twins = {name.removeprefix("v100_").replace("_fp16", "_bf16") for name in names if name.startswith("v100_")}
        assert names - {name for name in names if name.startswith("v100_")} == {"cpu", "single_gpu"} | (
            twins - {"single_gpu_bf16"}
        )

    @pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
    def test_accelerate_takes_every_key(self, path: Path):
        config = load_config_from_file(str(path))  # refuses unknown keys
        name = path.stem
        precision = "fp16" if "fp16" in name else "bf16" if "bf16" in name else "no"
        assert config.mixed_precision == precision
        kind = {"z": "DEEPSPEED", "d": "MULTI_GPU", "m": "MULTI_GPU", "c": "MULTI_GPU", "s": "NO"}
        assert config.distributed_type == ("FSDP" if "fsdp" in name else kind[name.removeprefix("v100_")[0]])
        arguments = launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
        arguments, _, _ = _validate_launch_command(arguments)
        assert arguments.mixed_precision == precision
        if "zero" in name:
            assert arguments.zero_stage == int(name.split("zero")[1][0])
        if "zero3" in name:  # a checkpoint is a model that can be loaded
            assert str(arguments.zero3_save_16bit_model).lower() == "true"
        if "fsdp" in name:
            assert int(arguments.fsdp_version) == 2
            assert arguments.fsdp_state_dict_type == "FULL_STATE_DICT"
            assert str(arguments.fsdp_cpu_ram_efficient_loading).lower() == "false"
        if "multi_node" in name:
            assert arguments.num_machines == 2
            assert arguments.num_processes == 16

    @pytest.mark.cli
    @pytest.mark.distributed
    @pytest.mark.parametrize(
        ("subcommand", "name"),
        [
            ("sft", "v100_ddp_fp16"),
            ("minillm", "ddp_bf16"),
            pytest.param("sft", "zero2_bf16", marks=needs_deepspeed),
            pytest.param("minillm", "v100_zero3_fp16", marks=needs_deepspeed),
            ("minillm", "v100_single_gpu_fp16"),
        ],
    )
    def test_training_subcommands_run_under_them(self, tmp_path: Path, model_dir, subcommand: str, name: str):
        """But for the precision, which CPUs do not have."""
        recipe = write_recipe(tmp_path, subcommand, model_dir)
        processes = 1 if "single" in name else 2
        launch = ["--accelerate_config", name, "--num_processes", str(processes), "--mixed_precision", "no"]
        result = run_module("minillm_trl", subcommand, "--config", recipe, *launch)
        assert result.returncode == 0, result.stderr[-3000:]
        assert (tmp_path / "out" / "model.safetensors").is_file()
        assert result.stdout.count("Saved to") == 1

    @pytest.mark.parametrize("path", LAUNCH, ids=lambda path: path.stem)
    def test_runs_of_one_machine_take_a_free_port(self, path: Path):
        config = load_config_from_file(str(path))
        several = config.num_machines == 1 and config.distributed_type != "NO"
        assert config.main_process_port == (0 if several else 29500 if config.num_machines > 1 else None)

    @pytest.mark.distributed
    def test_two_machines_reach_what_two_processes_of_one_do(self, tmp_path: Path, model_dir):
        """Both "machines" are this one; each is started with its own number, as the file says."""

        def run_machine(rank: int, port: int) -> subprocess.CompletedProcess:
            folder = tmp_path / f"machine{rank}-{port}"
            folder.mkdir()
            launch = ["--config_file", accelerate_config_path("multi_node_bf16"), "--mixed_precision", "no"]
            launch += ["--num_processes", 2, "--main_process_ip", "127.0.0.1", "--main_process_port", port]
            launch += ["--machine_rank", rank, "-m", "minillm_trl", "minillm"]
            command = [sys.executable, "-m", "accelerate.commands.launch", *launch]
            command += ["--config", write_recipe(folder, "minillm", model_dir)]
            return subprocess.run(
                list(map(str, command)), capture_output=True, text=True, timeout=300, env=ENVIRONMENT
            )

        def run_machines(port: int) -> list[subprocess.CompletedProcess]:
            with ThreadPoolExecutor(2) as pool:
                return list(pool.map(run_machine, (0, 1), (port, port)))

        port = get_free_port()
        machines = run_machines(port)
        if any("terminate called without an active exception" in run.stderr for run in machines):  # see run_module
            port = get_free_port()
            machines = run_machines(port)
        for process in machines:
            assert process.returncode == 0, process.stderr[-3000:]
        one = write_recipe(tmp_path, "minillm", model_dir)
        result = run_module("minillm_trl", "minillm", "--config", one, "--accelerate_config", "cpu")
        assert result.returncode == 0, result.stderr[-3000:]
        several, single = (last_losses(path) for path in (tmp_path / f"machine0-{port}" / "out", tmp_path / "out"))
        assert several == pytest.approx(single, rel=1e-4)


def write_recipe(folder: Path, subcommand: str, model_dir) -> Path:
    rows = [{"prompt": f"the mill {i}", "completion": " is a pub"} for i in range(16)]
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {
        "model_name_or_path": model_dir("llama"),
        "dataset": str(data),
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "max_steps": 2,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
    }
    if subcommand == "minillm":
        settings |= {
            "teacher_model_name_or_path": model_dir("llama", seed=1, width=48),
            "max_completion_length": 6,
            "steps_per_generation": 1,
            "shared_coins": False,
        }
    path = folder / f"{subcommand}.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def last_losses(folder: Path) -> list[float]:
    state = json.loads((folder / "checkpoint-2" / "trainer_state.json").read_text())
    return [log["loss"] for log in state["log_history"] if "loss" in log]
