"""A run's record: what it says, what it never says, and that the recipe in it makes the same run again."""

import json
import subprocess
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, concatenate_datasets
from safetensors.torch import load_file
from test_cli import run_cli
from trl import SFTConfig

import minillm_trl.training.run_record
from minillm_trl.cli import kd, main, minillm, seqkd, sft
from minillm_trl.cli.arguments import parse
from minillm_trl.cli.recording import repeating_options
from minillm_trl.files.redaction import REDACTED, redact, redact_command
from minillm_trl.training.run_record import RunRecord, dataset_digest, plain

SECRET, LOGIN = "hf_planted0123456789", "planted-user:planted-password"


@pytest.fixture
def data_file(tmp_path: Path) -> Path:
    path = tmp_path / "data" / "train.jsonl"
    path.parent.mkdir()
    rows = [{"prompt": f"the mill {i}\n", "completion": f"the mill is cheap {i}"} for i in range(16)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(tmp_path: Path, data_file: Path, model_dir) -> Path:
    """A YAML for `minillm` with everything but the output folder."""
    path = tmp_path / "minillm.yaml"
    path.write_text(
        f"model_name_or_path: {model_dir('llama')}\nteacher_model_name_or_path: {model_dir('llama', 1, 48)}\n"
        f"dataset: {data_file}\nuse_cpu: true\nreport_to: none\nmax_steps: 9\nlearning_rate: 1e-3\n"
        "per_device_train_batch_size: 4\nsteps_per_generation: 2\nnum_iterations: 2\nmax_completion_length: 8\n"
        "logging_steps: 1\nsave_steps: 2\neval_strategy: steps\neval_steps: 2\neval_dataset: "
        f"{data_file}\nenv:\n  PLANTED_API_KEY: {SECRET}\n"
    )
    return path


def run(*words: object) -> int:
    return main([str(word) for word in words])


def record_in(folder: Path) -> dict:
    return json.loads((folder / "run.json").read_text())


class TestRun:
    @pytest.fixture(autouse=True)
    def clean_environment(self, monkeypatch):
        for name in ("HF_TOKEN", "PLANTED_API_KEY"):
            monkeypatch.setenv(name, "")  # so that what the runs set is undone

    def test_recipe_repeats_it_bit_for_bit_and_no_secret_is_written(self, tmp_path, config, data_file, monkeypatch):
        monkeypatch.setenv("WANDB_API_KEY", "planted-wandb-key")
        first, second = tmp_path / "first", tmp_path / "second"
        words = ["--config", config, "--max_steps", "4", "--hub_token", SECRET, "--run_name", "planted-wandb-key"]
        assert run("minillm", *words, "--output_dir", first) == 0

        record = record_in(first)
        (attempt,) = record["attempts"]
        assert record["subcommand"] == "minillm"
        assert attempt["status"] == "finished"
        assert attempt["command"][:4] == ["minillm-trl", "minillm", "--config", str(config)]
        assert attempt["command"][6:10] == ["--hub_token", REDACTED, "--run_name", REDACTED]
        assert attempt["steps"] == 4
        assert attempt["resumed_from"] is None
        assert attempt["seeds"]["seed"] == 42
        assert attempt["configuration"]["MiniLLMConfig"]["max_steps"] == 4
        assert attempt["configuration"]["MiniLLMConfig"]["eval_strategy"] == "steps"
        assert attempt["data"]["train"]["rows"] == attempt["data"]["evaluation"]["rows"] == 16
        assert attempt["data"]["train"]["source"] == str(data_file)
        assert len(attempt["models"]["teacher"]["fingerprint"]) == 64
        assert attempt["models"]["teacher"]["fingerprint"] != attempt["models"]["student"]["fingerprint"]
        assert attempt["versions"].keys() >= {"minillm-trl", "python", "torch", "trl", "transformers", "datasets"}
        assert attempt["processes"] == {"number": 1, "distributed_type": "NO"}
        seconds = attempt["seconds"]
        assert 0 < seconds["rollouts"] < seconds["training"]
        assert seconds["training"] + seconds["evaluation"] + seconds["saving"] < seconds["total"]
        written = [path for path in first.rglob("*") if path.is_file()]
        assert {"training_args.bin", "run.yaml", "run.json"} <= {path.name for path in written}
        for path in written:
            assert SECRET.encode() not in path.read_bytes(), path
        for name in ("run.json", "run.yaml"):
            assert "planted-wandb-key" not in (first / name).read_text()

        assert run("minillm", "--config", first / "run.yaml", "--output_dir", second) == 0
        ours, theirs = (load_file(folder / "model.safetensors") for folder in (first, second))
        assert all((ours[name] == theirs[name]).all() for name in ours)
        start = load_file(Path(attempt["models"]["student"]["name"]) / "model.safetensors")
        assert any((ours[name] != start[name]).any() for name in ours)
        recipes = [yaml.safe_load((folder / "run.yaml").read_text()) for folder in (first, second)]
        assert {name for name in recipes[0] if recipes[0][name] != recipes[1][name]} == {"output_dir"}

    def test_every_attempt_is_kept(self, tmp_path, config, monkeypatch, capsys):
        folder = tmp_path / "out"

        def stop(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunRecord, "on_log", stop)
            assert run("minillm", "--config", config, "--max_steps", "4", "--output_dir", folder) == 130
        assert f"--resume_from_checkpoint true to continue from {folder / 'checkpoint-2'}." in capsys.readouterr().err
        words = ["--max_steps", "4", "--output_dir", folder, "--resume_from_checkpoint", "true"]
        assert run("minillm", "--config", config, *words) == 0
        first, second = record_in(folder)["attempts"]
        assert (first["status"], first["steps"], first["resumed_from"]) == ("stopped", 3, None)
        assert (second["status"], second["steps"]) == ("finished", 4)
        assert second["resumed_from"] == str(folder / "checkpoint-2")
        assert "resume_from_checkpoint" not in yaml.safe_load((folder / "run.yaml").read_text())

    @pytest.mark.parametrize("moment", ["on_train_begin", "on_step_end"])
    def test_run_stopped_before_its_first_checkpoint_is_not_told_to_resume(
        self, tmp_path, config, monkeypatch, capsys, moment: str
    ):
        def stop(*args, **kwargs):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(RunRecord, moment, stop)
            words = ["--config", config, "--max_steps", "2", "--output_dir", tmp_path / "out"]
            assert run("minillm", *words) == 130
        message = capsys.readouterr().err
        assert "It has saved no checkpoint yet" in message
        assert "--resume_from_checkpoint" not in message

    def test_token_among_the_arguments_of_a_model_is_refused(self, tmp_path, config, capsys):
        words = ["--teacher_model_init_kwargs", json.dumps({"token": SECRET}), "--output_dir", tmp_path / "out"]
        assert run("minillm", "--config", config, *words) == 2
        message = capsys.readouterr().err
        assert "teacher_model_init_kwargs has 'token', which would be saved" in message
        assert SECRET not in message
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("name", ["sft", "kd", "seqkd"])
    def test_the_other_trainings_write_one_too(self, name, tmp_path, data_file, model_dir):
        words = ["--dataset", data_file, "--model_name_or_path", model_dir("llama"), "--output_dir", tmp_path / name]
        if name != "sft":
            words += ["--teacher_model_name_or_path", model_dir("llama", 1, 48)]
        if name == "seqkd":
            words += ["--max_completion_length", "4", "--keep_unfinished", "true"]
        words += ["--use_cpu", "true", "--report_to", "none", "--max_steps", "1", "--save_strategy", "no"]
        assert run(name, *words) == 0
        (attempt,) = record_in(tmp_path / name)["attempts"]
        assert attempt["status"] == "finished"
        assert attempt["models"].keys() == ({"student"} if name == "sft" else {"student", "teacher"})
        assert attempt["data"].keys() == ({"prompts", "train"} if name == "seqkd" else {"train"})
        assert ("teacher_answers" in attempt["seconds"]) == (name == "seqkd")


@pytest.mark.distributed
def test_degenerate_run_on_two_processes_stops_with_status_3(tmp_path, config):
    folder = tmp_path / "out"
    result = run_cli(
        *("minillm", "--config", config, "--output_dir", folder, "--on_degeneration", "stop"),
        *("--importance_weighting", "sequence", "--teacher_mixed_alpha", "0.95", "--learning_rate", "1e-5"),
        *("--eval_strategy", "no", "--accelerate_config", "cpu", "--num_processes", "2"),
    )
    assert result.returncode == 3, result.stderr[-3000:]
    assert result.stderr.count("step 6: importance weights explode (exploding_weights)") == 1
    assert "Training stops here" in result.stderr
    assert "was not saved" in result.stdout
    assert not (folder / "model.safetensors").exists()
    (attempt,) = record_in(folder)["attempts"]
    assert (attempt["status"], attempt["steps"]) == ("stopped", 6)
    assert attempt["error"] == "degeneration: exploding_weights"
    assert attempt["processes"] == {"number": 2, "distributed_type": "MULTI_CPU"}
    recipe = yaml.safe_load((folder / "run.yaml").read_text())
    assert (recipe["accelerate_config"], recipe["num_processes"]) == ("cpu", "2")


@pytest.mark.parametrize("module", [sft, kd, seqkd, minillm])
def test_recipe_is_parsed_into_the_same_configuration(module, tmp_path, monkeypatch):
    for name in ("MKL_CBWR", "SOME_TOKEN"):  # set by the YAML, undone afterwards
        monkeypatch.setenv(name, "")
    words = ["--dataset", "e2e", "--model_name_or_path", "student", "--output_dir", str(tmp_path / "out")]
    words += ["--use_cpu", "true", "--learning_rate", "3e-4", "--lora_target_modules", "q_proj", "v_proj"]
    config = tmp_path / "given.yaml"
    config.write_text("report_to: [none]\nwarmup_steps: 0.1\nenv:\n  MKL_CBWR: COMPATIBLE\n  SOME_TOKEN: planted\n")
    words += ["--config", str(config)]
    if module is not sft:
        words += ["--teacher_model_name_or_path", "teacher"]
        words += ["--teacher_model_init_kwargs", '{"revision": "v2"}']
    parser = module.build_parser()
    parsed, _ = parse(parser, words)
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(plain(repeating_options(parser, words)), sort_keys=False))
    again, _ = parse(module.build_parser(), ["--config", str(path)])
    assert [plain(values) for values in again] == [plain(values) for values in parsed]
    # what was given stands first
    names = list(yaml.safe_load(path.read_text()))
    assert {"dataset_name", "learning_rate", "report_to", "warmup_steps"} < set(names[:12])
    assert yaml.safe_load(path.read_text())["env"] == {"MKL_CBWR": "COMPATIBLE"}


class TestRecord:
    def record(self, folder: Path, recipe: dict | None = None) -> RunRecord:
        return RunRecord("sft", [], recipe or {}, [SFTConfig(str(folder), use_cpu=True, bf16=False)], None)

    def test_failure_is_noted_without_secrets(self, tmp_path, monkeypatch):
        monkeypatch.setenv("OPENAI_API_KEY", SECRET)
        recipe = {"dataset": f"https://{LOGIN}@host/data.jsonl", "hub_token": "short", "run_name": f"x{SECRET}"}
        error = RuntimeError(f"no answer from https://{LOGIN}@host with {SECRET}")
        with pytest.raises(RuntimeError), self.record(tmp_path, recipe):
            raise error
        (attempt,) = record_in(tmp_path)["attempts"]
        assert attempt["status"] == "failed"
        assert attempt["error"] == f"RuntimeError: no answer from https://{REDACTED}@host with {REDACTED}"
        recipe = yaml.safe_load((tmp_path / "run.yaml").read_text())
        assert recipe["dataset"] == f"https://{REDACTED}@host/data.jsonl"
        assert recipe["run_name"] == f"x{REDACTED}"
        assert recipe["hub_token"] == REDACTED

    def test_run_that_left_no_word_was_killed(self, tmp_path):
        self.record(tmp_path).__enter__()
        with self.record(tmp_path):
            pass
        assert [attempt["status"] for attempt in record_in(tmp_path)["attempts"]] == ["killed", "finished"]

    @pytest.mark.parametrize("content", ['{"stages": {}}', '{"attempts": [3]}', '{"attempts": [{}]}', "{"])
    def test_record_of_something_else_is_not_overwritten(self, tmp_path, content: str):
        (tmp_path / "run.json").write_text(content)
        with pytest.raises(ValueError, match="not the record of a training run"):
            self.record(tmp_path)

    def test_commit_is_that_of_the_packages_own_checkout(self, tmp_path):
        package = tmp_path / "package"
        package.mkdir()
        (package / "__init__.py").write_text("")
        git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "-q"], check=True)
        (tmp_path / "other").write_text("")
        subprocess.run([*git, "add", "other"], check=True)
        subprocess.run([*git, "commit", "-qm", "other"], check=True)
        assert minillm_trl.training.run_record._commit(package) is None  # as an environment inside another's checkout
        subprocess.run([*git, "add", "package"], check=True)
        subprocess.run([*git, "commit", "-qm", "package"], check=True)
        found = minillm_trl.training.run_record._commit(package)
        assert (len(found["commit"]), found["changed"]) == (40, False)
        (package / "__init__.py").write_text("x = 1\n")
        assert minillm_trl.training.run_record._commit(package)["changed"]


def test_digest_of_a_dataset_is_that_of_its_rows():
    rows = [{"prompt": f"p{i}", "completion": f"c{i}", "references": ["a", "b"]} for i in range(1500)]
    whole = dataset_digest(Dataset.from_list(rows))
    parts = concatenate_datasets([Dataset.from_list(rows[:7]), Dataset.from_list(rows[7:])])
    assert dataset_digest(parts) == whole
    assert dataset_digest(Dataset.from_list([*rows, rows[0]]).select(range(1500))) == whole
    rows[1400]["references"] = ["a", "c"]
    assert dataset_digest(Dataset.from_list(rows)) != whole


class TestRedaction:
    def test_values_of_secret_options_are_hidden_in_commands(self):
        words = ["--hub_token", "a", "--api-key=b", "--eos_token", "c", "--hub_token", "--seed", "1"]
        hidden = ["--hub_token", REDACTED, f"--api-key={REDACTED}", "--eos_token", "c", "--hub_token", "--seed", "1"]
        assert redact_command(words) == hidden

    def test_secrets_are_hidden_at_any_depth(self, monkeypatch):
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
        monkeypatch.setenv("SORT_KEY", "seed")  # too short to be one
        value = {"kwargs": [{"token": "t", "seed": 1, "note": f"a {SECRET}"}], "eos_token": "</s>", "token": None}
        assert redact(value) == {
            "kwargs": [{"token": REDACTED, "seed": 1, "note": f"a {REDACTED}"}],
            "eos_token": "</s>",
            "token": None,
        }
        assert redact("mail a@b.c, https://host/@x") == "mail a@b.c, https://host/@x"
