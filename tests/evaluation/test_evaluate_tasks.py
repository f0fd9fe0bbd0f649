"""`evaluate` over the tasks of a YAML, each once, and compared afterwards."""

import json
import os
import shutil
from pathlib import Path

import pytest
from evaluation_results import SEEDS

from minillm_trl.cli import main


def write_rows(path: Path, prompts: list[str]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = [{"prompt": prompt, "completion": "the mill is a cheap pub"} for prompt in prompts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


class TestEvaluate:
    @pytest.fixture
    def config(self, tmp_path: Path, model_dir) -> Path:
        write_rows(tmp_path / "dolly" / "test.jsonl", ["the mill", "the pub"])
        write_rows(tmp_path / "vicuna" / "test.jsonl", ["the river", "the city", "the food"])
        path = tmp_path / "eval.yaml"
        path.write_text(
            f"teacher: {model_dir('llama', 1, 48)}\ntasks:\n  dolly: {tmp_path / 'dolly'}\n"
            f"  vicuna: {tmp_path / 'vicuna'}\nseeds: {SEEDS}\nmax_new_tokens: 4\n"
        )
        return path

    def test_tasks_of_a_yaml_are_evaluated_once_and_compared(self, tmp_path, config, model_dir, capsys):
        models = {"student": model_dir("llama"), "teacher": model_dir("llama", 1, 48)}
        for name, model in models.items():
            run = ["evaluate", "--config", str(config), "--model", model, "--output_dir", str(tmp_path / name)]
            assert main(run) == 0
        results = {
            (name, task): json.loads((tmp_path / name / task / "results.json").read_text())
            for name in models
            for task in ("dolly", "vicuna")
        }
        assert results["student", "vicuna"]["settings"]["prompts"] == 3
        assert "reverse_kl" in results["student", "dolly"]["summary"]
        assert "reverse_kl" not in results["teacher", "dolly"]["summary"]  # of itself

        capsys.readouterr()
        student = ["evaluate", "--config", str(config), "--model", models["student"], "--output_dir"]
        (tmp_path / "student" / "vicuna" / "results.json").unlink()
        assert main([*student, str(tmp_path / "student")]) == 0
        output = capsys.readouterr().out
        assert f"{tmp_path / 'student' / 'dolly'}: done before" in output
        assert f"written to {tmp_path / 'student' / 'vicuna'}" in output
        repeated = json.loads((tmp_path / "student" / "vicuna" / "results.json").read_text())
        assert repeated["per_prompt"] == results["student", "vicuna"]["per_prompt"]

        assert main([*student, str(tmp_path / "student"), "--seeds", "3"]) == 2
        message = capsys.readouterr().err
        assert f"{tmp_path / 'student' / 'dolly'} holds results of seeds=[1, 2], now [3]. Delete" in message

        weights = Path(models["student"]) / "model.safetensors"
        before = weights.stat()
        try:
            os.utime(weights)
            assert main([*student, str(tmp_path / "student")]) == 2
        finally:
            os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert f"holds results that are older than {weights}" in capsys.readouterr().err

        runs = [f"{name}={tmp_path / name}" for name in models]
        assert main(["compare", *runs, "--output_dir", str(tmp_path / "report")]) == 0
        *tables, _ = capsys.readouterr().out.strip().split("\n\n")
        of_a_task = ("Quality", "Closeness to the teacher", "Length, repetition and diversity")
        headings = ["All tasks", *(f"{task}: {heading}" for task in ("dolly", "vicuna") for heading in of_a_task)]
        assert [table.split("\n")[0] for table in tables] == headings
        assert [line.split()[0] for line in tables[0].splitlines()[-2:]] == ["student", "teacher"]
        assert "## vicuna" in (tmp_path / "report" / "report.md").read_text()

    @pytest.mark.parametrize(
        ("line", "message"),
        [
            ("seed: 3", ":2: unknown option 'seed'. Did you mean 'seeds'?"),
            ("seeds: [1, a]", ":2: seeds: expected int, got 'a'"),
            ("temperature: warm", ":2: temperature: expected float, got 'warm'"),
            ("trust_remote_code: maybe", ":2: trust_remote_code: expected true or false, got 'maybe'"),
        ],
    )
    def test_mistakes_in_the_yaml_are_named_with_file_and_line(self, tmp_path, capsys, line: str, message: str):
        path = tmp_path / "eval.yaml"
        path.write_text(f"dataset: e2e\n{line}\n")
        assert main(["evaluate", "--config", str(path), "--model", "none", "--output_dir", str(tmp_path)]) == 2
        assert f"{path}{message}" in capsys.readouterr().err

    def test_list_for_one_value_is_refused(self, tmp_path, capsys):
        path = tmp_path / "eval.yaml"
        path.write_text("dataset: e2e\nmodel: [a, b]\n")
        assert main(["evaluate", "--config", str(path), "--output_dir", str(tmp_path)]) == 2
        assert f"{path}:2: model: expected one value, got a list" in capsys.readouterr().err

    def arguments(self, tmp_path: Path, model: str, *more: str) -> list[str]:
        output = ["--dataset", str(tmp_path / "rows.jsonl"), "--output_dir", str(tmp_path / "out")]
        return ["evaluate", "--model", model, *output, "--seeds", "1", "--max_new_tokens", "4", *more]

    def test_other_columns_and_other_data_are_not_done_before(self, tmp_path, model_dir, capsys):
        path = tmp_path / "rows.jsonl"
        row = {"prompt": "the mill", "completion": "a pub", "gold": "the river"}
        path.write_text(json.dumps(row) + "\n")
        run = self.arguments(tmp_path, model_dir("llama"))
        assert main(run) == 0
        for options, change in (
            (["--references_column", "gold"], "references_column='references', now 'gold'"),
            (["--max_rows", "1"], "max_rows=None, now 1"),
        ):
            assert main([*run, *options]) == 2
            assert f"{tmp_path / 'out'} holds results of {change}" in capsys.readouterr().err
        before = path.stat()
        path.write_text(json.dumps({**row, "completion": "a river"}) + "\n")
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert main(run) == 2
        assert "holds results of data_sha256=" in capsys.readouterr().err

    def test_prompt_without_room_in_either_context_is_refused_before_a_model_is_loaded(
        self, tmp_path, model_dir, capsys, monkeypatch
    ):
        monkeypatch.setattr("minillm_trl.models.loading.load_model", lambda *_, **__: pytest.fail("loaded a model"))
        path = write_rows(tmp_path / "rows.jsonl", ["the mill", "the mill " * 20])
        assert main(self.arguments(tmp_path, model_dir("gpt2"), "--max_new_tokens", "100")) == 2
        assert f"{path}: 1 of 2 prompts have more than 28 tokens; the first is row 1" in capsys.readouterr().err
        assert main(self.arguments(tmp_path, model_dir("gpt2"), "--max_new_tokens", "128")) == 2
        assert "max_new_tokens=128 leaves no room for a prompt in a context of 128 tokens" in capsys.readouterr().err
        student = tmp_path / "student"
        shutil.copytree(model_dir("gpt2"), student)
        wide = json.loads((student / "config.json").read_text())
        wide.pop("n_positions", None)
        (student / "config.json").write_text(json.dumps({**wide, "max_position_embeddings": 512}))
        teacher = ["--teacher", model_dir("gpt2", 1, 48)]
        assert main(self.arguments(tmp_path, str(student), "--max_new_tokens", "100", *teacher)) == 2
        assert "prompts have more than 28 tokens" in capsys.readouterr().err

    def test_row_without_a_reference_is_named_before_anything_is_sampled(self, tmp_path, capsys):
        path = tmp_path / "rows.jsonl"
        completions = ["a pub", "a mill", None]
        rows = [
            {"prompt": prompt, "completion": completion} for prompt, completion in zip("aab", completions, strict=True)
        ]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(self.arguments(tmp_path, "none")) == 2
        assert f"{path}: row 2 (counting from 0) has neither references nor a completion" in capsys.readouterr().err

    def test_task_named_twice_is_refused(self, tmp_path, capsys):
        tasks = ["--tasks", "a=e2e", "a=e2e"]
        assert main(["evaluate", "--model", "none", "--output_dir", str(tmp_path), *tasks]) == 2
        assert "names 'a' twice" in capsys.readouterr().err
