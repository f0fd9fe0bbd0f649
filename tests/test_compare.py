"""`evaluate` over several tasks, and `compare` of what it wrote."""

import json
import os
import shutil
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
        monkeypatch.setattr("minillm_trl.cli.evaluate.load_model", lambda *_, **__: pytest.fail("loaded a model"))
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
        rows = [{"prompt": prompt, "completion": each} for prompt, each in zip("aab", completions, strict=True)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert main(self.arguments(tmp_path, "none")) == 2
        assert f"{path}: row 2 (counting from 0) has neither references nor a completion" in capsys.readouterr().err

    def test_task_named_twice_is_refused(self, tmp_path, capsys):
        tasks = ["--tasks", "a=e2e", "a=e2e"]
        assert main(["evaluate", "--model", "none", "--output_dir", str(tmp_path), *tasks]) == 2
        assert "names 'a' twice" in capsys.readouterr().err


def write_results(
    folder: Path,
    rouge: list[float],
    model: str = "m",
    prompts: str = "x",
    reference: str = "r",
    reverse_kl: bool = False,
    **settings,
) -> Path:
    folder.mkdir(parents=True)
    kept = {"seeds": SEEDS, "temperature": 1.0, "max_new_tokens": 8, "prompts": len(rouge), "dataset": "data/dolly"}
    kept |= {"split": "test", "model": model, "adapter": None, "teacher": "t", **settings}
    mean = sum(rouge) / len(rouge)
    summary = {"rouge_l": {"mean": mean, "low": 0.0, "high": 9.0, "n": len(rouge), "standard_error": 1.0}}
    if reverse_kl:
        summary["reverse_kl"] = summary["rouge_l"]
    results = {"settings": kept, "summary": summary, "per_prompt": [dict.fromkeys(summary, value) for value in rouge]}
    (folder / "results.json").write_text(json.dumps(results))
    samples = [{"prompt": f"{prompts}{i}", "references": [reference], "outputs": ["o"]} for i in range(len(rouge))]
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

    def test_other_references_are_refused(self, tmp_path):
        write_results(tmp_path / "a", [1.0, 2.0])
        write_results(tmp_path / "b", [1.0, 2.0], reference="s")
        with pytest.raises(ValueError, match="a and b were evaluated with different references"):
            compare_models([read_evaluation(name, tmp_path / name) for name in "ab"])

    def test_reverse_kl_to_another_teacher_is_refused(self, tmp_path):
        write_results(tmp_path / "a", [1.0], model="t")  # the teacher itself, without reverse KL
        write_results(tmp_path / "b", [1.0], reverse_kl=True)
        write_results(tmp_path / "c", [1.0], reverse_kl=True, teacher="u")
        models = [read_evaluation(name, tmp_path / name) for name in "abc"]
        with pytest.raises(ValueError, match="b and c: the reverse KL on dolly is to different teachers, 't' and 'u'"):
            compare_models(models)
        compare_models(models[::2])  # one of two has it

    def test_characters_that_some_take_for_line_breaks_are_read_as_they_were_written(self, tmp_path):
        folder = write_results(tmp_path / "a", [1.0, 2.0])
        text = "one\u2028two\u2029three\u0085four\x0bfive"
        samples = [{"prompt": f"x{i}", "references": ["r"], "outputs": [text]} for i in range(2)]
        lines = "".join(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)
        (folder / "samples.jsonl").write_text(lines, encoding="utf-8")
        assert read_evaluation("a", folder).tasks["dolly"].samples == samples

    def test_folder_without_results_and_unknown_baseline_are_named(self, tmp_path, capsys):
        assert main(["compare", str(tmp_path)]) == 2
        assert f"{tmp_path}: no results of `minillm-trl evaluate`" in capsys.readouterr().err
        folder = write_results(tmp_path / "a", [1.0])
        assert main(["compare", str(folder), "--baseline", "sft"]) == 2
        assert "--baseline sft: there are only a" in capsys.readouterr().err
