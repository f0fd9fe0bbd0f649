"""The command line: runs, some in processes of their own, and mistakes answered with one clear message."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import run_module
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from minillm_trl.cli import SUBCOMMANDS, main
from minillm_trl.cli.launch import LAUNCHED, accelerate_config_path, hand_over, read_flags
from minillm_trl.training.checkpoints import record_files

TRAINING = [
    "--use_cpu",
    "true",
    "--bf16",
    "false",
    "--report_to",
    "none",
    "--max_steps",
    "2",
    "--logging_steps",
    "1",
    "--save_strategy",
    "no",
]


def run_cli(*arguments: object) -> subprocess.CompletedProcess:
    return run_module("minillm_trl", *arguments)


def finish(*arguments: object) -> None:
    """Run a command in this process; it must succeed."""
    assert main([str(argument) for argument in arguments]) == 0


def refused(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """The message of a command that must end with status 2."""
    assert main([str(argument) for argument in arguments]) == 2
    return capsys.readouterr().err


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.jsonl"
    rows = [{"prompt": f"the mill {i}\n", "completion": f"the mill is cheap {i}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestTopLevel:
    @pytest.mark.cli
    @pytest.mark.smoke  # imports hardly anything
    def test_help_names_every_subcommand_without_importing_torch(self):
        code = "import sys; from minillm_trl.cli import main; main(['--help']); assert 'torch' not in sys.modules"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert all(name in result.stdout for name in SUBCOMMANDS)

    def test_unknown_subcommand_offers_the_nearest(self, capsys: pytest.CaptureFixture):
        assert "unknown subcommand 'minilm'. Did you mean 'minillm'?" in refused(capsys, "minilm")

    def test_version_is_the_package_s(self, capsys: pytest.CaptureFixture):
        assert main(["--version"]) == 0
        assert capsys.readouterr().out.startswith("minillm-trl 0.")

    @pytest.mark.parametrize("name", SUBCOMMANDS)
    def test_help_of_each_subcommand_is_shown(self, name: str, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit) as ended:
            main([name, "--help"])
        assert ended.value.code == 0
        assert f"minillm-trl {name}" in capsys.readouterr().out

    def test_own_options_come_before_the_inherited_ones(self, capsys: pytest.CaptureFixture):
        with pytest.raises(SystemExit):
            main(["minillm", "--help"])
        text = capsys.readouterr().out
        text = text[text.index("\noptions:") :]
        assert text.index("--dataset ") < text.index("--teacher_mixed_alpha") < text.index("--num_train_epochs")


class TestMistakes:
    def test_yaml_typo_is_named_with_line_and_nearest_option(self, tmp_path, capsys):
        path = tmp_path / "run.yaml"
        path.write_text("dataset: e2e\nteacher_mixed_alfa: 0.2\n")
        message = refused(capsys, "minillm", "--config", path)
        assert f"{path}:2: unknown option 'teacher_mixed_alfa'. Did you mean 'teacher_mixed_alpha'?" in message

    def test_flag_typo_is_named_with_nearest_option(self, capsys):
        message = refused(capsys, "minillm", "--teacher_mixed_alfa", "0.2")
        assert "unknown option '--teacher_mixed_alfa'. Did you mean 'teacher_mixed_alpha'?" in message

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("dataset: [e2e\n", ":2: broken YAML"),
            ("- a\n", ":1: expected `name: value` lines"),
            ("gamma: often\n", ":1: gamma: expected float, got 'often'"),
            ("max_steps: [1, 2]\n", ":1: max_steps: expected one value, got a list"),
            ("gamma: 1.0\ngamma: 0.5\n", ":2: the key 'gamma' is already in line 1"),
            ("\nbf16: maybe\n", ":2: bf16: expected true or false, got 'maybe'"),
            ("dtype: float33\n", ":1: dtype: expected one of auto, bfloat16, float16, float32, got 'float33'"),
            ("gamma: \x07\n", ": broken YAML: character #x0007 is not allowed"),
        ],
    )
    def test_bad_yaml_is_named_with_file_and_line(self, tmp_path, capsys, text: str, message: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        assert f"{path}{message}" in refused(capsys, "minillm", "--config", path)

    def test_word_that_belongs_to_no_option_is_refused_and_not_launched_as_a_script(self, tmp_path, capsys, data_file):
        message = refused(
            capsys,
            *("sft", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--use_cpu", "true", "--bf16", "false", "stray"),
        )
        assert "unexpected 'stray'" in message

    @pytest.mark.parametrize("name", ["generate", "evaluate"])
    def test_flag_typo_without_yaml_is_named_with_nearest_option(self, tmp_path, capsys, name: str):
        where = ["--prompt", "a"] if name == "generate" else ["--dataset", "e2e", "--output_dir", str(tmp_path)]
        message = refused(capsys, name, "--model", "none", *where, "--temprature", "1")
        assert "unknown option '--temprature'. Did you mean 'temperature'?" in message

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--prompt", "a", "--output", "nowhere/x.jsonl"], "there is no folder nowhere"),
            (["--prompt", "a", "--seed", "-1"], "--seed must not be negative, got -1"),
            (["--dataset", "e2e", "--max_rows", "-1"], "--max_rows must be positive, got -1"),
        ],
    )
    def test_generate_refuses_before_a_model_is_loaded(self, capsys, arguments: list[str], message: str):
        assert message in refused(capsys, "generate", "--model", "none", *arguments)

    def test_missing_student_is_named(self, capsys):
        assert "required: --model_name_or_path" in refused(capsys, "sft", "--dataset", "e2e")

    def test_missing_yaml_is_named(self, capsys):
        assert "--config nowhere.yaml: no such file" in refused(capsys, "sft", "--config", "nowhere.yaml")

    def test_missing_required_option_is_named(self, capsys):
        assert "--model_name_or_path" in refused(capsys, "sft", "--output_dir", "x")
        message = refused(capsys, "sft", "--output_dir", "x", "--model_name_or_path", "x")
        assert "dataset_name is missing" in message

    def test_broken_data_line_is_named_before_any_model_loads(self, tmp_path, capsys, data_file):
        with data_file.open("a") as file:
            file.write('{"prompt": "the mill", \n')
        message = refused(
            capsys,
            *("minillm", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--teacher_model_name_or_path", "none", "--use_cpu", "true"),
        )
        assert f"{data_file}:17" in message

    def test_value_outside_its_range_is_named(self, tmp_path, capsys, data_file):
        message = refused(
            capsys,
            *("minillm", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--teacher_model_name_or_path", "none", "--use_cpu", "true", "--teacher_mixed_alpha", "1.5"),
        )
        assert "teacher_mixed_alpha must lie in [0, 1], got 1.5" in message

    def test_backend_of_several_processes_in_a_single_one_is_named(self, tmp_path, capsys, data_file):
        words = ["sft", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path]
        message = refused(capsys, *words, "--use_cpu", "true", "--bf16", "false", "--ddp_backend", "gloo")
        assert "ddp_backend needs several processes" in message

    def test_endless_message_keeps_its_two_ends(self, capsys):
        message = refused(capsys, "generate", "--model", "none", "--dataset", f"{'x' * 10_000}.jsonl")
        assert len(message) < 4_200
        assert "characters) ... xxx" in message
        assert message.startswith("minillm-trl generate: ")

    def test_evaluation_on_a_split_of_a_single_file_is_refused(self, tmp_path, capsys, data_file):
        message = refused(
            capsys,
            *("sft", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--use_cpu", "true", "--bf16", "false", "--dataset_eval_split", "test"),
        )
        assert "has no splits, so this would evaluate on the training data" in message

    def test_unknown_accelerate_config_lists_the_known_ones(self, tmp_path, capsys, data_file):
        message = refused(
            capsys,
            *("sft", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--use_cpu", "true", "--bf16", "false", "--accelerate_config", "v100"),
        )
        assert "neither a file nor one of cpu, ddp_bf16, fsdp_bf16, multi_node_bf16, multi_node_fsdp_bf16" in message

    def test_run_that_would_be_written_over_is_refused(self, tmp_path, capsys, data_file):
        (tmp_path / "checkpoint-3").mkdir()
        (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
        message = refused(
            capsys,
            *("sft", "--dataset", data_file, "--model_name_or_path", "none", "--output_dir", tmp_path),
            *("--use_cpu", "true", "--bf16", "false"),
        )
        assert "holds a run that reached" in message
        assert "--resume_from_checkpoint true" in message


class TestLaunchFlags:
    def test_command_line_wins_over_yaml_and_booleans_lose_their_value(self):
        flags = read_flags(
            ["--num_processes", "2", "--cpu", "True", "--multi_gpu", "False"], ["--num_processes", "4", "--debug"]
        )
        assert flags == {"--num_processes": "4", "--cpu": None, "--debug": None}

    @pytest.mark.parametrize(("returncode", "status"), [(2, 2), (-9, 1)])
    def test_failure_of_a_single_process_is_the_status(self, monkeypatch, returncode: int, status: int):
        def fail(arguments):
            assert os.environ[LAUNCHED] == "1"
            raise subprocess.CalledProcessError(returncode, ["python"])

        monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
        assert hand_over("sft", ["--num_processes=1", "--seed", "3"], {"--num_processes": "1"}) == status
        assert LAUNCHED not in os.environ

    @pytest.mark.parametrize(("exitcode", "status"), [(2, 2), (-9, 1)])
    def test_failure_of_one_of_several_processes_is_the_status(self, monkeypatch, exitcode: int, status: int):
        def fail(arguments):
            raise ChildFailedError("minillm_trl", {1: ProcessFailure(1, 4321, exitcode, "<N/A>")})

        monkeypatch.setattr("accelerate.commands.launch.launch_command", fail)
        assert hand_over("sft", ["--num_processes=2"], {"--num_processes": "2"}) == status

    def test_option_without_its_value_is_refused(self):
        with pytest.raises(ValueError, match="--num_processes needs a value"):
            read_flags([], ["--num_processes"])


class TestRuns:
    @pytest.mark.cli
    @pytest.mark.smoke
    def test_sft_then_minillm_by_yaml_then_generate_and_evaluate(self, tmp_path, model_dir, data_file):
        student, distilled = tmp_path / "student", tmp_path / "distilled"
        result = run_cli(
            *("sft", "--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", student),
            *TRAINING,
            *("--per_device_train_batch_size", "4"),
        )
        assert result.returncode == 0, result.stderr[-2000:]
        config = tmp_path / "minillm.yaml"
        config.write_text(
            f"model_name_or_path: {student}\nteacher_model_name_or_path: {model_dir('llama', 1, 48)}\n"
            f"dataset: {data_file}\neval_dataset: {data_file}\neval_strategy: steps\neval_steps: 1\n"
            f"output_dir: {distilled}\nuse_cpu: true\nbf16: false\nreport_to: none\nmax_steps: 9\n"
            "learning_rate: 1e-3\n"
            "per_device_train_batch_size: 4\nsteps_per_generation: 2\nnum_iterations: 2\nmax_completion_length: 8\n"
            "logging_steps: 1\nsave_strategy: 'no'\n"
        )
        result = run_cli("minillm", "--config", config, "--max_steps", "2")  # the command line wins
        assert result.returncode == 0, result.stderr[-2000:]
        assert "'eval_rouge_l'" in result.stdout
        assert "2/2" in result.stderr
        generated = tmp_path / "out.jsonl"
        finish(
            *("generate", "--model", distilled, "--prompt", "the mill\\n", "the pub\\n", "--num_samples", "2"),
            *("--max_new_tokens", "6", "--output", generated),
        )
        rows = [json.loads(line) for line in generated.read_text().splitlines()]
        assert [(row["prompt"], row["sample"]) for row in rows] == [
            ("the mill\n", 0),
            ("the pub\n", 0),
            ("the mill\n", 1),
            ("the pub\n", 1),
        ]
        finish(
            *("evaluate", "--model", distilled, "--teacher", model_dir("llama", 1, 48), "--dataset", data_file),
            *("--seeds", "1", "2", "--max_new_tokens", "6", "--output_dir", tmp_path / "results"),
        )
        results = json.loads((tmp_path / "results" / "results.json").read_text())
        assert results["summary"].keys() >= {"rouge_l", "reverse_kl", "length", "eos_rate"}
        assert len((tmp_path / "results" / "samples.jsonl").read_text().splitlines()) == 16

    def test_lora_student_is_saved_as_an_adapter_that_evaluates(self, tmp_path, model_dir, data_file, capsys):
        finish(
            *("minillm", "--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", tmp_path),
            *("--teacher_model_name_or_path", model_dir("llama", 1, 48), *TRAINING, "--max_completion_length", "8"),
            *("--per_device_train_batch_size", "4", "--use_peft", "--lora_target_modules", "q_proj", "v_proj"),
        )
        assert (tmp_path / "adapter_config.json").is_file()
        assert not (tmp_path / "model.safetensors").exists()
        capsys.readouterr()
        finish(
            *("generate", "--model", model_dir("llama"), "--adapter", tmp_path, "--prompt", "the mill", "--greedy"),
            *("--max_new_tokens", "3"),
        )
        assert json.loads(capsys.readouterr().out)["prompt"] == "the mill"

        # the adapter as teacher of a smaller one on the same base, which is in NF4
        finish(
            *("minillm", "--dataset", data_file, "--model_name_or_path", model_dir("llama")),
            *("--teacher_model_name_or_path", tmp_path, "--teacher_shares_base", "true", "--output_dir"),
            *(tmp_path / "second", *TRAINING, "--max_completion_length", "8", "--per_device_train_batch_size", "4"),
            *("--use_peft", "--use_dora", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"),
            *("--load_in_4bit", "--bnb_4bit_quant_type", "nf4"),
        )
        config = json.loads((tmp_path / "second" / "adapter_config.json").read_text())
        assert config["use_dora"]
        assert config["base_model_name_or_path"] == model_dir("llama")

    def test_different_tokenizers_are_refused_before_a_model_is_loaded(self, tmp_path, capsys, model_dir, data_file):
        from conftest import build_tokenizer

        build_tokenizer(280).save_pretrained(tmp_path / "teacher")  # no weights: loading them would fail otherwise
        message = refused(
            capsys,
            *("minillm", "--dataset", data_file, "--model_name_or_path", model_dir(), "--output_dir", tmp_path),
            *("--teacher_model_name_or_path", tmp_path / "teacher", "--use_cpu", "true"),
        )
        assert "different tokenizers" in message

    @pytest.mark.cli
    def test_mistake_found_after_the_hand_over_ends_with_its_message_and_status(self, tmp_path, model_dir, data_file):
        data_file.write_text(data_file.read_text() + "{broken\n")
        result = run_cli(
            *("sft", "--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", tmp_path),
            *(*TRAINING, "--accelerate_config", "cpu", "--num_processes", "1"),
        )
        assert result.returncode == 2, result.stderr[-2000:]
        assert f"{data_file}:17" in result.stderr
        assert "Traceback" not in result.stderr

    @pytest.mark.cli
    @pytest.mark.smoke
    def test_sft_resumes_from_the_newest_checkpoint(self, tmp_path, model_dir, data_file):
        words = ["sft", "--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", tmp_path]
        words += [*TRAINING, "--save_strategy", "steps", "--save_steps", "1"]
        finish(*words, "--max_steps", "2")
        saved = tmp_path / "checkpoint-2" / "trainer_state.json"
        state = json.loads(saved.read_text())
        # a mark that training anew would not have: the same seed gives the same losses again
        state["log_history"][1]["loss"] = 123.0
        saved.write_text(json.dumps(state))
        record_files(saved.parent)
        result = run_cli(*words, "--max_steps", "3", "--resume_from_checkpoint", "true")
        assert result.returncode == 0, result.stderr[-2000:]
        history = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())["log_history"]
        assert [entry["step"] for entry in history] == [1, 2, 3]
        assert history[1]["loss"] == 123.0

    @pytest.mark.distributed
    def test_accelerate_launch_with_a_yaml_that_asks_for_it_too_launches_once(self, tmp_path, model_dir, data_file):
        config = tmp_path / "sft.yaml"
        config.write_text(
            f"dataset: {data_file}\nmodel_name_or_path: {model_dir('llama')}\noutput_dir: {tmp_path / 'out'}\n"
            "use_cpu: true\nbf16: false\nreport_to: [none]\nmax_steps: 1\nsave_strategy: 'no'\n"
            "per_device_train_batch_size: 2\naccelerate_config: cpu\nnum_processes: 2\n"
        )
        result = run_module(
            *("accelerate.commands.accelerate_cli", "launch", "--config_file", accelerate_config_path("cpu")),
            *("-m", "minillm_trl", "sft", "--config", config),
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert result.stdout.count("Saved to") == 1

    @pytest.mark.distributed
    @pytest.mark.smoke
    def test_accelerate_config_hands_over_to_two_processes(self, tmp_path, model_dir, data_file):
        result = run_cli(
            *("minillm", "--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", tmp_path),
            *("--teacher_model_name_or_path", model_dir("llama", 1, 48), *TRAINING, "--max_completion_length", "8"),
            *("--per_device_train_batch_size", "2", "--accelerate_config", "cpu", "--num_processes", "2"),
        )
        assert result.returncode == 0, result.stderr[-3000:]
        assert (tmp_path / "model.safetensors").is_file()
        assert result.stdout.count("Saved to") == 1  # by the main process
