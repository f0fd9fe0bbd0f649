"""`minillm-trl benchmark`: what it refuses, and what of a second run is done already."""

import os
import re
import shutil

import pytest
import yaml
from benchmark_tasks import (
    PAGE,
    OwnTasks,
    evaluated_tasks,
    needs_lm_eval,
    no_loading,
    read,
    write_answers,
    write_choices,
)

from minillm_trl.cli import main
from minillm_trl.cli.arguments import parse_with_config
from minillm_trl.cli.benchmark import build_parser
from minillm_trl.models.loading import load_model


class TestWithoutLMEval:
    def test_missing_package_is_named_with_its_extra(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["benchmark", "--model", "none", "--tasks", "gsm8k", "--output_dir", str(tmp_path)]) == 2
        message = "General benchmarks need lm-eval, which is not installed: pip install 'minillm-trl[eval]'"
        assert message in capsys.readouterr().err

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--limit", "0"], "--limit must be positive, got 0"),
            (["--num_fewshot", "-1"], "--num_fewshot must not be negative, got -1"),
            (["--batch_size", "many"], "--batch_size must be a positive number or auto, got 'many'"),
            (["--batch_size", "0"], "--batch_size must be a positive number or auto, got '0'"),
            (["--confirm"], "unknown option '--confirm'. Did you mean 'config'"),
        ],
    )
    def test_wrong_options_are_refused(self, tmp_path, capsys, options: list[str], message: str):
        run = ["benchmark", "--model", "none", "--tasks", "gsm8k", "--output_dir", str(tmp_path), *options]
        assert main(run) == 2
        assert message in capsys.readouterr().err

    def test_options_can_stand_in_a_yaml(self, tmp_path):
        path = tmp_path / "benchmark.yaml"
        path.write_text("tasks: [gsm8k, sciq]\nlimit: 10\nbatch_size: 4\napply_chat_template: true\n")
        values = parse_with_config(build_parser(), ["--config", str(path), "--model", "m", "--output_dir", "o"])[0]
        assert (values.tasks, values.limit, values.batch_size) == (["gsm8k", "sciq"], 10, "4")
        assert values.apply_chat_template
        assert not values.confirm_run_unsafe_code

    def test_commands_of_the_page_parse(self, tmp_path, monkeypatch):
        text = PAGE.read_text()
        (example,) = re.findall(r"```yaml\n(.*?)```", text, flags=re.DOTALL)
        (tmp_path / "benchmark.yaml").write_text(example)
        monkeypatch.chdir(tmp_path)
        commands = re.findall(r"^(?:HF_ALLOW_CODE_EVAL=1 )?minillm-trl benchmark (.+)$", text, flags=re.MULTILINE)
        assert len(commands) == 5
        for command in commands:
            assert parse_with_config(build_parser(), command.split())[0].tasks


@needs_lm_eval
class TestSecondRun(OwnTasks):
    def test_second_run_goes_on_with_the_task_that_is_left(self, tmp_path, tasks, model_dir, capsys, monkeypatch):
        write_choices(tasks)
        write_answers(tasks, ["a"] * 5)
        run = self.arguments(tmp_path, model_dir("llama"), "choices", "answers")
        with evaluated_tasks(stop_at="answers") as evaluated:
            assert main(run) == 130
        assert evaluated == ["choices"]
        done = tmp_path / "out" / "choices"
        written = (done / "results.json").read_bytes()
        assert not (tmp_path / "out" / "answers").exists()
        with evaluated_tasks() as evaluated:
            assert main(run) == 0
        assert evaluated == ["answers"]
        assert f"{done}: done before" in capsys.readouterr().out
        assert (done / "results.json").read_bytes() == written
        monkeypatch.setattr("minillm_trl.models.loading.load_model", no_loading)
        assert main(run) == 0

    def test_results_of_other_settings_are_not_taken_for_done(self, tmp_path, tasks, model_dir, capsys, monkeypatch):
        write_choices(tasks, fewshot_split="test")
        run = self.arguments(tmp_path, model_dir("llama"), "choices")
        assert main([*run, "--limit", "2"]) == 0
        assert read(tmp_path / "out" / "choices")["settings"]["prompts"] == 2
        monkeypatch.setattr("minillm_trl.models.loading.load_model", no_loading)
        folder = tmp_path / "out" / "choices"
        for options, change in (
            (["--limit", "3"], "prompts=2, now 3"),
            (["--limit", "2", "--num_fewshot", "1"], "num_fewshot=0, now 1"),
            (["--limit", "2", "--dtype", "bfloat16"], "dtype='auto', now 'bfloat16'"),
            (["--limit", "2", "--apply_chat_template"], "apply_chat_template=False, now True"),
        ):
            assert main([*run, *options]) == 2
            assert f"{folder} holds results of {change}. Delete this folder" in capsys.readouterr().err
        write_choices(tasks, doc_to_text="Question: {{question}}", fewshot_split="test")
        assert main([*run, "--limit", "2"]) == 2
        assert f"{folder} holds results of definition_sha256=" in capsys.readouterr().err

    def test_results_of_other_documents_and_older_than_the_weights_are_not_taken_for_done(
        self, tmp_path, tasks, model_dir, capsys
    ):
        model = tmp_path / "model"
        shutil.copytree(model_dir("llama"), model)
        write_choices(tasks)
        run = self.arguments(tmp_path, str(model), "choices")
        assert main(run) == 0
        written = (tmp_path / "out" / "choices" / "results.json").stat().st_mtime
        os.utime(model / "model.safetensors", (written + 1, written + 1))
        assert main(run) == 2
        assert f"holds results that are older than {model / 'model.safetensors'}" in capsys.readouterr().err
        os.utime(model / "model.safetensors", (0, 0))
        (tasks / "choices.jsonl").write_text((tasks / "choices.jsonl").read_text().replace("the mill", "the hill"))
        assert main(run) == 2
        assert "holds results of data_sha256=" in capsys.readouterr().err


@needs_lm_eval
class TestRefusals(OwnTasks):
    @pytest.fixture(autouse=True)
    def no_model(self, monkeypatch):
        monkeypatch.setattr("minillm_trl.models.loading.load_model", no_loading)

    def refused(self, capsys, tmp_path, model: str, *names: str) -> str:
        assert main(self.arguments(tmp_path, model, *names)) == 2
        return capsys.readouterr().err

    def test_unknown_task_is_refused_with_the_nearest_names(self, tmp_path, tasks, capsys):
        write_choices(tasks)
        message = self.refused(capsys, tmp_path, "none", "choises")
        assert "--tasks: 'choises' " in message
        assert str(tasks) in message
        assert "'choices'?" in message
        message = self.refused(capsys, tmp_path, "none", "choices", "choices")
        assert "--tasks names 'choices' twice" in message

    def test_missing_folder_and_data_are_named(self, tmp_path, tasks, capsys):
        assert f"--include_path {tasks}: no such folder" in self.refused(capsys, tmp_path, "none", "choices")
        write_choices(tasks)
        (tasks / "choices.jsonl").unlink()
        assert "--tasks: choices cannot be loaded: " in self.refused(capsys, tmp_path, "none", "choices")

    def test_code_of_the_model_runs_only_with_leave(self, tmp_path, tasks, capsys, monkeypatch, model_dir):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
        write_answers(tasks, ["a"] * 5, name="program", unsafe_code=True, tag="programs")
        (tasks / "all.yaml").write_text("group: all\ntask: [program]\n")
        for name in ("program", "programs", "all"):
            message = self.refused(capsys, tmp_path, "none", name)
            assert "--tasks: program " in message
            assert "add --confirm_run_unsafe_code" in message
        run = self.arguments(tmp_path, model_dir("llama"), "program", "--confirm_run_unsafe_code")
        assert main(run) == 2
        assert "environment variable HF_ALLOW_CODE_EVAL=1" in capsys.readouterr().err
        monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")
        monkeypatch.setattr("minillm_trl.models.loading.load_model", load_model)
        assert main(run) == 0
        assert read(tmp_path / "out" / "program")["settings"]["prompts"] == 5

    def test_number_of_examples_that_a_task_cannot_have_is_refused(self, tmp_path, tasks, capsys):
        write_choices(tasks, num_fewshot=0, fewshot_split="test")
        message = self.refused(capsys, tmp_path, "none", "choices", "--num_fewshot", "2")
        assert "--num_fewshot 2: choices is defined without examples" in message
        write_choices(tasks, fewshot_split="test")
        message = self.refused(capsys, tmp_path, "none", "choices", "--num_fewshot", "9")
        assert "--num_fewshot 9: choices " in message

    def test_task_without_room_for_a_prompt_is_refused(self, tmp_path, tasks, capsys, model_dir):
        write_answers(tasks, ["a"] * 5, generation_kwargs={"until": ["\n"]})  # lm-eval's limit of 256
        message = self.refused(capsys, tmp_path, model_dir("llama"), "answers")
        assert "--tasks: answers generates up to 256 tokens" in message
        assert "in a context of 128 tokens" in message

    def test_group_that_is_no_mean_over_documents_is_refused(self, tmp_path, tasks, capsys):
        write_choices(tasks, "one", slice(0, 3))
        write_choices(tasks, "two", slice(3, 5))
        metrics = [{"metric": "acc", "aggregation": "mean", "weight_by_size": False}]
        group = {"group": "both", "task": ["one", "two"], "aggregate_metric_list": metrics}
        (tasks / "both.yaml").write_text(yaml.safe_dump(group))
        message = self.refused(capsys, tmp_path, "none", "both")
        assert "both averages over tasks of different size" in message
        for name in ("one", "two"):
            write_choices(tasks, name, metric_list=[{"metric": "mcc", "aggregation": "matthews_corrcoef"}])
        message = self.refused(capsys, tmp_path, "none", "both")
        assert "no metric of both is a mean over documents in all its tasks" in message
