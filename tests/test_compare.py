"""`evaluate` over several tasks, and `compare` of what it wrote."""

import json
import os
from pathlib import Path

import pytest

from minillm_trl.cli import main
from minillm_trl.evaluation.comparison import compare_models, read_evaluation

SEEDS = [1, 2]


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
        table = capsys.readouterr().out.splitlines()
        assert table[1].split() == ["dolly:", "Rouge-L", "vicuna:", "Rouge-L"]
        assert [line.split()[0] for line in table[3:5]] == ["student", "teacher"]
        assert "### vicuna" in (tmp_path / "report" / "report.md").read_text()
        assert (tmp_path / "report" / "report.html").read_text().count("<table>") == 3

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
        assert "model: expected one value, got ['a', 'b']" in capsys.readouterr().err

    def test_task_named_twice_is_refused(self, tmp_path, capsys):
        tasks = ["--tasks", "a=e2e", "a=e2e"]
        assert main(["evaluate", "--model", "none", "--output_dir", str(tmp_path), *tasks]) == 2
        assert "names 'a' twice" in capsys.readouterr().err


def write_results(folder: Path, rouge: list[float], model: str = "m", prompts: str = "x", **settings) -> Path:
    folder.mkdir(parents=True)
    kept = {"seeds": SEEDS, "temperature": 1.0, "max_new_tokens": 8, "prompts": len(rouge), "dataset": "data/dolly"}
    kept |= {"split": "test", "model": model, "adapter": None, "teacher": "t", **settings}
    summary = {"rouge_l": {"mean": sum(rouge) / len(rouge), "low": 0.0, "high": 9.0, "n": len(rouge)}}
    results = {"settings": kept, "summary": summary, "per_prompt": [{"rouge_l": value} for value in rouge]}
    (folder / "results.json").write_text(json.dumps(results))
    samples = [{"prompt": f"{prompts}{i}", "references": ["r"], "outputs": ["o"]} for i in range(len(rouge))]
    (folder / "samples.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return folder


class TestCompare:
    def test_differences_to_the_baseline_are_paired_by_prompt(self, tmp_path):
        write_results(tmp_path / "sft", [10.0, 90.0, 20.0])
        write_results(tmp_path / "minillm", [12.0, 92.0, 22.0])
        write_results(tmp_path / "big", [50.0, 50.0, 50.0], model="t")
        models = [read_evaluation(name, tmp_path / name) for name in ("sft", "minillm", "big")]
        report = compare_models(models, baseline="sft")
        rows = {row.name: row for row in report.table.rows}
        # 2 for each prompt, although prompts differ by 80
        assert rows["minillm"].cells["rouge_l_gain"] == "+2.0 [+2.0, +2.0]"
        assert "rouge_l_gain" not in rows["sft"].cells
        assert [row.is_teacher for row in report.table.rows] == [False, False, True]
        assert report.details == {}
        assert [row.is_teacher for row in compare_models(models[:2], teacher="sft").table.rows] == [True, False]
        assert report.summary == "Highest among the students: Rouge-L minillm."  # and not the teacher

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeds": [1]}, r"a and b were evaluated differently on dolly: seeds is \[1, 2\] and \[1\]"),
            ({"temperature": 0.7}, "a and b were evaluated differently on dolly: temperature is 1.0 and 0.7"),
            ({"max_new_tokens": 9}, "a and b were evaluated differently on dolly: max_new_tokens is 8 and 9"),
            ({"prompts": "y"}, "a and b were evaluated on different prompts of dolly"),
        ],
    )
    def test_unlike_evaluations_are_refused_naming_both(self, tmp_path, change: dict, message: str):
        write_results(tmp_path / "a", [1.0, 2.0])
        write_results(tmp_path / "b", [1.0, 2.0], **change)
        with pytest.raises(ValueError, match=message):
            compare_models([read_evaluation(name, tmp_path / name) for name in "ab"])

    def test_folder_without_results_and_unknown_baseline_are_named(self, tmp_path, capsys):
        assert main(["compare", str(tmp_path)]) == 2
        assert f"{tmp_path}: no results of `minillm-trl evaluate`" in capsys.readouterr().err
        folder = write_results(tmp_path / "a", [1.0])
        assert main(["compare", str(folder), "--baseline", "sft"]) == 2
        assert "--baseline sft: there are only a" in capsys.readouterr().err
