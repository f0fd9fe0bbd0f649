"""`evaluate` over several tasks, and `compare` of what it wrote."""

import csv
import json
import logging
import math
import os
import re
import shutil
from pathlib import Path

import pytest
from evaluation_results import SEEDS, write_results
from test_report import Page

from minillm_trl.cli import main
from minillm_trl.evaluation.calibration import CalibrationBin
from minillm_trl.evaluation.comparison import compare_models
from minillm_trl.evaluation.comparison_tables import COLUMNS
from minillm_trl.evaluation.metrics import MeanInterval
from minillm_trl.evaluation.plots import Curve, Intervals, Reliability
from minillm_trl.evaluation.report import Report, Section, Table, format_cell
from minillm_trl.evaluation.results import read_evaluation
from minillm_trl.evaluation.training_history import training_folder


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
        monkeypatch.setattr("minillm_trl.cli.models.load_model", lambda *_, **__: pytest.fail("loaded a model"))
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


def compare(folder: Path, *names: str, **options) -> Report:
    return compare_models([read_evaluation(name, folder / name) for name in names], **options)


def section(report: Report, heading: str) -> Section:
    (found,) = [each for each in report.sections if each.heading == heading]
    return found


def cells(table: Table) -> dict[str, dict]:
    return {row.name: row.cells for row in table.rows}


class TestTables:
    def test_differences_to_the_baseline_are_paired_by_prompt(self, tmp_path):
        rouge = [10.0, 90.0, 20.0, 50.0, 30.0, 70.0, 60.0]
        write_results(tmp_path / "sft", {"rouge_l": rouge})
        write_results(tmp_path / "minillm", {"rouge_l": [each + 2 for each in rouge]})
        write_results(tmp_path / "kd", {"rouge_l": [11.0, *rouge[1:]]})
        write_results(tmp_path / "big", {"rouge_l": [50.0] * 7}, model="t")
        report = compare(tmp_path, "sft", "minillm", "kd", "big", baseline="sft")
        table = section(report, "dolly").tables["Difference to sft"]
        found = cells(table)
        assert "sft" not in found
        # 2 for each prompt, although prompts differ by 80; two of 2 ** 7 ways to choose the signs are as far from 0
        assert found["minillm"]["rouge_l"] == "+2.0 [+2.0, +2.0]"
        records = {record.model: record for record in report.records if record.measure == "rouge_l"}
        p = {name: record.p for name, record in records.items()}
        assert (p["minillm"], p["kd"], p["sft"]) == (2 / 128, 1.0, None)
        assert records["minillm"].p_holm == 3 * 2 / 128
        assert found["minillm"]["rouge_l_p"] == "0.047"
        assert records["minillm"].difference == pytest.approx(2)
        assert records["kd"].difference == pytest.approx(1 / 7)
        marked = [row.name for row in table.rows if row.marks["rouge_l"]]
        assert marked == ["minillm"]
        assert table.note == "* differs from sft by more than chance: corrected p of at most 0.05"
        assert report.summary == (
            "Highest Rouge-L among the students: minillm on dolly. Above sft by more than chance: minillm on dolly."
        )

    def test_without_a_baseline_there_are_no_differences(self, tmp_path):
        for name in "ab":
            write_results(tmp_path / name, {"rouge_l": [1.0, 2.0]})
        report = compare(tmp_path, "a", "b")
        assert list(section(report, "dolly").tables) == ["Quality"]
        assert report.summary == "Highest Rouge-L among the students: a on dolly; b on dolly."
        assert all(record.p is None for record in report.records)

    def test_teacher_is_the_one_that_others_name_or_the_one_named(self, tmp_path):
        write_results(tmp_path / "sft", {"rouge_l": [1.0, 2.0]})
        write_results(tmp_path / "big", {"rouge_l": [5.0, 6.0]}, model="t")
        for teacher, expected in ((None, [False, True]), ("sft", [True, True])):
            table = section(compare(tmp_path, "sft", "big", teacher=teacher), "dolly").tables["Quality"]
            assert [row.is_teacher for row in table.rows] == expected
        assert compare(tmp_path, "sft", "big").summary == "Highest Rouge-L among the students: sft on dolly."

    def test_measures_are_in_three_tables(self, tmp_path):
        measures = ("rouge_l", "exact_match", "loss", "reverse_kl", "forward_kl", "length", "self_bleu", "eos_rate")
        values = {name: [0.5, 1.5] for name in measures}
        write_results(tmp_path / "a", values, excess_error=[None, 5.0, 7.0], corpus={"distinct_4grams": 0.75})
        write_results(tmp_path / "b", values, excess_error=[None, 6.0])
        tables = section(compare(tmp_path, "a", "b"), "dolly").tables
        keys = {heading: [column.key for column in table.columns] for heading, table in tables.items()}
        assert keys == {
            "Quality": ["rouge_l", "rouge_l_by_seed", "exact_match", "loss"],
            "Closeness to the teacher": ["reverse_kl", "forward_kl", "excess_error"],
            "Length, repetition and diversity": ["length", "eos_rate", "corpus_distinct_4grams", "self_bleu"],
        }
        assert cells(tables["Quality"])["a"]["rouge_l_by_seed"] == "0.5–1.5"
        closeness = tables["Closeness to the teacher"]
        assert closeness.columns[2].label == "ExAccErr at token 2 (%)"  # the last that both have
        assert [row.cells["excess_error"] for row in closeness.rows] == [5.0, 6.0]
        assert cells(tables["Length, repetition and diversity"])["a"]["corpus_distinct_4grams"] == 0.75

    def test_classification_is_judged_by_accuracy(self, tmp_path):
        bins = [{"low": 0.5, "high": 1.0, "count": 4, "confidence": 0.8, "accuracy": 0.75}]
        values = {"accuracy": [100.0, 0.0, 100.0, 100.0], "confidence": [0.9, 0.7, 0.8, 0.8]}
        for name, ece in (("a", 0.05), ("b", 0.25)):
            folder = tmp_path / name
            calibration = {"ece": ece, "bins": bins}
            labels = {"label_words": ["yes", "no"], "dataset": "sst2", "outputs": [[]] * 4}
            write_results(folder / "sst2", values, calibration=calibration, **labels)
            write_results(folder / "dolly", {"rouge_l": [1.0, 2.0]})
        report = compare(tmp_path, "a", "b")
        overview = section(report, "All tasks").tables[""]
        assert [column.label for column in overview.columns] == ["dolly: Rouge-L", "sst2: Accuracy (%)"]
        assert cells(overview)["b"]["sst2"].mean == 75.0
        assert cells(section(report, "sst2").tables["Quality"])["b"]["ece"] == 0.25
        assert ("Label words", "yes, no") in report.facts
        assert [part.heading for part in report.sections if part.samples] == ["Answers: dolly"]

    def test_general_benchmark_is_judged_by_its_main_measure_under_the_names_of_lm_eval(self, tmp_path):
        better = {"acc": True, "word_perplexity": False}
        settings = {"kind": "lm_eval", "main_measure": "acc", "higher_is_better": better, "num_fewshot": 5}
        settings |= {"definition_sha256": "2e", "limit": None}
        for name, values in (("a", [1.0] * 8), ("b", [0.0] * 7 + [1.0])):
            folder = write_results(tmp_path / name / "sciq", {"acc": values}, seeds=[], **settings)
            results = json.loads((folder / "results.json").read_text())
            results["summary"]["word_perplexity"] = results["summary"]["acc"]  # no mean over documents
            (folder / "results.json").write_text(json.dumps(results))
            write_results(tmp_path / name / "dolly", {"rouge_l": [1.0, 2.0]})
        report = compare(tmp_path, "a", "b", baseline="b")
        labels = [(each.label, each.better) for each in section(report, "All tasks").tables[""].columns]
        assert labels == [("dolly: Rouge-L", "higher"), ("sciq: acc", "higher")]
        tables = section(report, "sciq").tables
        assert [(each.label, each.better) for each in tables["Quality"].columns] == [
            ("acc", "higher"),
            ("word_perplexity", "lower"),
        ]
        assert cells(tables["Difference to b"])["a"]["acc"].startswith("+0.875 [")
        assert ("lm-eval", "5 examples") in report.facts
        assert "Above b by more than chance: a on sciq." in report.summary

    def test_main_measure_of_a_benchmark_may_have_no_interval(self, tmp_path):
        settings = {"kind": "lm_eval", "main_measure": "inst_acc", "higher_is_better": {}, "num_fewshot": 0}
        settings |= {"definition_sha256": "2e", "limit": None, "corpus": {"inst_acc": 0.25}}
        for name in "ab":  # prompts in the chat templates of two tokenizers
            write_results(tmp_path / name, {"strict_acc": [0.0, 1.0]}, prompts=[f"{name} 1", f"{name} 2"], **settings)
        report = compare(tmp_path, "a", "b", baseline="b")
        assert cells(section(report, "dolly").tables["Quality"])["a"]["corpus_inst_acc"] == 0.25
        write_results(tmp_path / "c", {"strict_acc": [0.0, 1.0]}, **{**settings, "num_fewshot": 5})
        with pytest.raises(ValueError, match="num_fewshot is 0 and 5"):
            compare(tmp_path, "a", "c")

    def test_task_that_only_some_were_evaluated_on(self, tmp_path):
        write_results(tmp_path / "a" / "dolly", {"rouge_l": [1.0, 2.0]})
        write_results(tmp_path / "a" / "vicuna", {"rouge_l": [3.0, 4.0]})
        write_results(tmp_path / "b" / "dolly", {"rouge_l": [5.0, 6.0]})
        report = compare(tmp_path, "a", "b", baseline="b")
        assert cells(section(report, "All tasks").tables[""])["b"].keys() == {"dolly"}
        assert list(section(report, "vicuna").tables) == ["Quality"]  # nothing to compare with

    def test_without_references_there_is_no_overview(self, tmp_path):
        for task in ("dolly", "vicuna"):
            write_results(tmp_path / "a" / task, {"length": [1.0, 2.0]})
        report = compare(tmp_path, "a", baseline="a")
        assert report.summary == "Neither references nor labels, so neither Rouge-L nor accuracy."
        assert "All tasks" not in [part.heading for part in report.sections]
        assert not section(report, "dolly").figures

    @pytest.mark.parametrize(
        ("settings", "expected"),
        [
            ({}, "sampled at temperature 1.0; no 6-gram twice (no_repeat_ngram_size 6)"),
            (
                {"temperature": 0.7, "no_repeat_ngram_size": 0},
                "sampled at temperature 0.7; no n-gram blocked (no_repeat_ngram_size 0)",
            ),
            ({"greedy": True}, "greedy (the most likely token); no 6-gram twice (no_repeat_ngram_size 6)"),
        ],
    )
    def test_facts_say_how_was_decoded(self, tmp_path, settings: dict, expected: str):
        write_results(tmp_path / "a", {"rouge_l": [1.0]}, **settings)
        facts = dict(compare(tmp_path, "a").facts)
        assert facts["Decoding"] == expected
        assert facts["Length limit"] == "8 tokens"
        assert ("Sampling seeds" in facts) == ("greedy" not in settings)

    def test_tasks_that_were_decoded_in_different_ways_are_told_apart(self, tmp_path):
        write_results(tmp_path / "a" / "dolly", {"rouge_l": [1.0]})
        write_results(tmp_path / "a" / "vicuna", {"rouge_l": [1.0]}, max_new_tokens=512)
        facts = dict(compare(tmp_path, "a").facts)
        assert facts["Length limit of dolly"] == "8 tokens"
        assert facts["Length limit of vicuna"] == "512 tokens"
        assert facts["Sampling seeds"] == "1, 2"


class TestRefusals:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"seeds": [1]}, r"a and b were evaluated differently on dolly: seeds is \[1, 2\] and \[1\]"),
            ({"temperature": 0.7}, "differently on dolly: temperature is 1.0 and 0.7"),
            ({"greedy": True}, "differently on dolly: greedy is False and True"),
            ({"no_repeat_ngram_size": 0}, "differently on dolly: no_repeat_ngram_size is 6 and 0"),
            ({"max_new_tokens": 9}, "differently on dolly: max_new_tokens is 8 and 9"),
            ({"label_words": ["a", "b"]}, r"differently on dolly: label_words is None and \['a', 'b'\]"),
            ({"prompts": ["y0", "y1"]}, "a and b were evaluated on different prompts of dolly"),
            ({"reference": "s"}, "a and b were evaluated with different references of dolly"),
            ({"data_sha256": "2e"}, "a and b were evaluated on different data of dolly"),
        ],
    )
    def test_unlike_evaluations_are_refused_naming_both(self, tmp_path, change: dict, message: str):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]})
        write_results(tmp_path / "b", {"rouge_l": [1.0, 2.0]}, **change)
        with pytest.raises(ValueError, match=message):
            compare(tmp_path, "a", "b")

    def test_distance_to_another_teacher_is_refused(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0]}, model="t")  # the teacher itself, without a distance
        write_results(tmp_path / "b", {"reverse_kl": [1.0]})
        write_results(tmp_path / "c", {"forward_kl": [1.0]}, teacher="u")
        write_results(tmp_path / "d", {"rouge_l": [1.0]}, excess_error=[1.0], teacher="u")
        for other in "cd":
            with pytest.raises(ValueError, match=f"b and {other}: .* on dolly is to different teachers, 't' and 'u'"):
                compare(tmp_path, "a", "b", other)
        compare(tmp_path, "a", "c")  # one of two has it

    def test_exposure_bias_of_another_number_of_samples_is_refused(self, tmp_path):
        for name, samples in (("a", 10), ("b", 5), ("c", 0)):
            error = [1.0] if samples else None
            write_results(tmp_path / name, {"rouge_l": [1.0]}, excess_error=error, exposure_bias_samples=samples)
        with pytest.raises(ValueError, match=r"a and b were .* on dolly: exposure_bias_samples is 10 and 5"):
            compare(tmp_path, "a", "b", "c")
        compare(tmp_path, "a", "c")  # measured of one only

    def test_results_that_lack_something_are_refused_with_the_file(self, tmp_path):
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]})
        path = folder / "results.json"
        results = json.loads(path.read_text())
        fewer = {**results["settings"]}
        del fewer["greedy"]
        changes = [
            ({key: value for key, value in results.items() if key != "by_seed"}, "by_seed"),
            ({**results, "settings": fewer}, "greedy"),
            ({**results, "per_prompt": [{"rouge_l": 1.0}]}, "samples.jsonl has 2 lines for 1 prompts"),
            ({**results, "per_prompt": [{"rouge_l": 1.0}, {}]}, "a prompt lacks a measure"),
        ]
        for changed, message in changes:
            path.write_text(json.dumps(changed))
            with pytest.raises(ValueError, match=rf"{path}: not what .* writes \(.*{message}.*\). Evaluate again"):
                read_evaluation("a", folder)

    def test_characters_that_some_take_for_line_breaks_are_read_as_they_were_written(self, tmp_path):
        text = "one\u2028two\u2029three\u0085four\x0bfive"
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]}, outputs=[[text, text]] * 2)
        assert [sample["outputs"] for sample in read_evaluation("a", folder).tasks["dolly"].samples] == [
            [text] * 2
        ] * 2

    def test_names_without_a_row_are_refused(self, tmp_path, capsys):
        assert main(["compare", str(tmp_path)]) == 2
        assert f"{tmp_path}: no results of `minillm-trl evaluate`" in capsys.readouterr().err
        folder = str(write_results(tmp_path / "a", {"rouge_l": [1.0]}))
        assert main(["compare", folder, "--baseline", "sft"]) == 2
        assert "--baseline sft: there are only a" in capsys.readouterr().err
        assert main(["compare", folder, folder]) == 2
        assert "each model needs a name of its own" in capsys.readouterr().err
        for word in ("b=x", "a"):
            assert main(["compare", folder, "--training", word]) == 2
            assert f"--training {word}: expected NAME=OUTPUT_DIR with a name of a." in capsys.readouterr().err


class TestFigures:
    def test_rouge_l_of_all_tasks_is_one_figure(self, tmp_path):
        for name, gain in (("a", 0.0), ("b", 2.0)):
            for task in ("dolly", "vicuna"):
                write_results(tmp_path / name / task, {"rouge_l": [1.0 + gain, 3.0 + gain]})
        shutil.rmtree(tmp_path / "b" / "vicuna")
        (plot,) = section(compare(tmp_path, "a", "b"), "All tasks").figures
        assert isinstance(plot, Intervals)
        assert plot.categories == ["dolly", "vicuna"]
        means = {name: [each and each.mean for each in series] for name, series in plot.series.items()}
        assert means == {"a": [2.0, 2.0], "b": [4.0, None]}

    def test_buckets_without_prompts_are_left_out(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 3.0, 8.0]}, bucket_of=[0, 0, 2])
        (plot,) = section(compare(tmp_path, "a"), "dolly").figures
        assert plot.categories == ["all", "0–5 tokens\n(n = 2)", "11 or more tokens\n(n = 1)"]
        assert [each.mean for each in plot.series["a"]] == [4.0, 2.0, 8.0]

    def test_excess_error_is_a_curve_over_positions_from_1(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0]})
        write_results(tmp_path / "b", {"rouge_l": [1.0]}, excess_error=[None, 5.0, 7.0])
        (plot,) = section(compare(tmp_path, "a", "b"), "dolly").figures
        assert isinstance(plot, Curve)
        assert plot.series.keys() == {"b"}
        assert plot.series["b"][0] == [1.0, 2.0, 3.0]
        assert plot.series["b"][1] == pytest.approx([math.nan, 5.0, 7.0], nan_ok=True)
        assert list(plot.order) == ["a", "b"]

    def test_positions_that_few_samples_reach_are_left_out(self, tmp_path):
        curve = {"excess_error": [None, 5.0, 7.0, 99.0], "counts": [20, 11, 2, 1]}
        write_results(tmp_path / "a", {"rouge_l": [1.0]}, **curve)
        (plot,) = section(compare(tmp_path, "a"), "dolly").figures
        assert plot.series["a"][1] == pytest.approx([math.nan, 5.0, 7.0], nan_ok=True)

    def test_each_classification_has_a_reliability_diagram(self, tmp_path):
        bins = [
            {"low": 0.0, "high": 0.5, "count": 0, "confidence": None, "accuracy": None},
            {"low": 0.5, "high": 1.0, "count": 2, "confidence": 0.8, "accuracy": 0.5},
        ]
        calibration = {"ece": 0.3, "bins": bins}
        write_results(tmp_path / "a", {"accuracy": [0.0, 100.0]}, calibration=calibration, label_words=["x", "y"])
        (plot,) = section(compare(tmp_path, "a"), "dolly").figures
        assert isinstance(plot, Reliability)
        assert plot.title == "dolly: a, ECE 0.300"
        assert plot.bins == [CalibrationBin(0.0, 0.5, 0, None, None), CalibrationBin(0.5, 1.0, 2, 0.8, 0.5)]


def write_training(folder: Path, entries: list[dict], step: int = 20) -> Path:
    checkpoint = folder / f"checkpoint-{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return folder


class TestTraining:
    ENTRIES = (
        {"step": 10, "eval_rouge_l": 20.0, "eval_objective/reverse_kl": 9.0, "eval_completions/mean_length": 30.0},
        {"step": 15, "loss": 1.0, "objective/reverse_kl": 5.0},
        {"step": 20, "eval_rouge_l": 22.0, "eval_objective/reverse_kl": 7.0, "eval_completions/mean_length": 28.0},
    )

    def curves(self, folder: Path, *arguments: str) -> list[str]:
        """Figures of the training in the report of `compare`."""
        assert main(["compare", *arguments, "--output_dir", str(folder / "report")]) == 0
        _, _, training = (folder / "report" / "report.md").read_text().partition("## Training")
        return re.findall(r"!\[([^\]]+)\]", training)

    def test_evaluations_during_training_are_curves(self, tmp_path):
        training = write_training(tmp_path / "run", list(self.ENTRIES))
        write_training(training, [{"step": 10, "eval_rouge_l": 1.0}], step=10)  # an older one
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0]}, model=str(training))
        titles = ["Rouge-L on validation prompts", "Reverse KL on validation prompts", "Length on validation prompts"]
        assert self.curves(tmp_path, str(folder)) == titles
        (tmp_path / "torn" / "checkpoint-30").mkdir(parents=True)
        other = write_training(tmp_path / "torn", list(self.ENTRIES)[:1])
        assert self.curves(tmp_path, str(folder), "--training", f"a={other}") == titles

    def test_curves_have_the_evaluations_by_step(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0]})
        write_results(tmp_path / "b", {"rouge_l": [1.0]})
        history = {"eval_rouge_l": {10: 20.0, 20: 22.0}}
        (plot,) = section(compare(tmp_path, "a", "b", histories={"b": history}), "Training").figures
        assert plot.series == {"b": ([10.0, 20.0], [20.0, 22.0])}
        assert list(plot.order) == ["a", "b"]

    def test_folder_of_the_training_is_found_by_the_model_its_checkpoint_or_adapter(self, tmp_path):
        training = write_training(tmp_path / "run", list(self.ENTRIES))
        for model, adapter in (
            (str(training), None),
            (str(training / "checkpoint-20"), None),
            ("base", str(training)),
        ):
            assert training_folder({"model": model, "adapter": adapter}) == training
        assert training_folder({"model": "openai-community/gpt2", "adapter": None}) is None
        assert training_folder({"model": str(tmp_path), "adapter": None}) is None

    def test_found_training_without_evaluations_has_no_curves_and_a_named_one_is_refused(
        self, tmp_path, capsys, caplog
    ):
        training = write_training(tmp_path / "run", [{"step": 10, "loss": 1.0}])
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0]}, model=str(training))
        assert self.curves(tmp_path, str(folder)) == []
        capsys.readouterr()
        assert main(["compare", str(folder), "--training", f"a={training}"]) == 2
        assert f"--training a={training}: none of eval_rouge_l, " in capsys.readouterr().err
        assert main(["compare", str(folder), "--training", f"a={tmp_path}"]) == 2
        assert f"{tmp_path}: no whole checkpoint" in capsys.readouterr().err
        state = training / "checkpoint-20" / "trainer_state.json"
        state.write_text('{"log_history": [{"eval_rouge_l"')
        with caplog.at_level(logging.WARNING):
            assert main(["compare", str(folder)]) == 0
        assert f"{state}: cannot be used" in caplog.text
        assert main(["compare", str(folder), "--training", f"a={training}"]) == 2
        assert f"{training}: no whole checkpoint" in capsys.readouterr().err


class TestAnswers:
    PROMPTS = tuple(f"prompt {number}" for number in range(40))

    def samples(self, folder: Path, *names: str, **options) -> dict[str, list]:
        return section(compare(folder, *names, **options), "Answers: dolly").samples

    def test_some_are_random_and_the_others_those_where_students_differ_most(self, tmp_path):
        gains = {3: 50.0, 17: 90.0, 30: -70.0}
        for name in ("teacher", "sft", "minillm"):
            rouge = [10.0 + gains.get(row, 0.0) * (name == "minillm") for row in range(40)]
            rouge[5] += 100.0 * (name == "teacher")  # no student
            outputs = [[f"{name} {row} of seed {seed}" for seed in SEEDS] for row in range(40)]
            write_results(tmp_path / name, {"rouge_l": rouge, "length": [7.0] * 40}, outputs=outputs)
        groups = self.samples(tmp_path, "teacher", "sft", "minillm", teacher="teacher")
        drawn, differing = groups.values()
        assert list(groups) == [
            "Drawn at random (seed 0)",
            "Where the students differ most in Rouge-L, mean over seeds",
        ]
        assert groups == self.samples(tmp_path, "teacher", "sft", "minillm", teacher="teacher")
        rows = [int(sample.prompt[1:]) for sample in drawn]
        assert len(set(rows)) == 5
        assert [int(sample.prompt[1:]) for sample in differing] == [row for row in (17, 30, 3) if row not in rows]
        row = int(differing[0].prompt[1:])
        assert differing[0].outputs["sft"] == f"sft {row} of seed 1"
        assert differing[0].scores["sft"] == "Rouge-L 11.0 (all seeds 10.0), 8 tokens"

    def test_one_model_has_random_ones_alone_and_no_more_than_there_are(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0, 3.0]}, prompts=["x", "y", "z"])
        (drawn,) = self.samples(tmp_path, "a").values()
        assert [sample.prompt for sample in drawn] == ["x", "y", "z"]

    def test_conversations_are_shown_as_turns(self, tmp_path):
        prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        write_results(tmp_path / "a", {"rouge_l": [1.0]}, prompts=[prompt])
        (drawn,) = self.samples(tmp_path, "a").values()
        assert drawn[0].prompt == "system: Be brief.\nuser: Why?"


@pytest.fixture(scope="class")
def written(tmp_path_factory) -> tuple[Report, Path]:
    """A report of three models and three tasks from the command line, and the same as an object."""
    folder = tmp_path_factory.mktemp("compared")
    bins = [{"low": 0.5, "high": 1.0, "count": 8, "confidence": 0.8, "accuracy": 0.5}]
    for number, name in enumerate(("sft", "kd", "minillm")):
        spread = [0.37 * ((7 * row + number) % 5) for row in range(8)]
        for task in ("dolly", "vicuna"):
            measures = {"rouge_l": 20.0, "reverse_kl": 9.0, "length": 30.0, "repeated_4grams": 0.1, "loss": 2.0}
            values = {key: [base + number + each for each in spread] for key, base in measures.items()}
            curve = [3.0, 4.0 + number]
            more = {"bucket_of": [0, 1, 2, 2] * 2, "excess_error": curve, "corpus": {"distinct_4grams": 0.75}}
            write_results(folder / name / task, values, **more)
        labels = {"label_words": ["yes", "no"], "calibration": {"ece": 0.3, "bins": bins}, "outputs": [[]] * 8}
        write_results(folder / name / "sst2", {"accuracy": [0.0, 100.0] * 4}, **labels)
    write_training(folder / "run", list(TestTraining.ENTRIES))
    runs = [str(folder / name) for name in ("sft", "kd", "minillm")]
    more = ["--baseline", "sft", "--training", f"minillm={folder / 'run'}", "--output_dir", str(folder / "report")]
    assert main(["compare", *runs, *more]) == 0
    return compare(folder, "sft", "kd", "minillm", baseline="sft"), folder / "report"


class TestFiles:
    def test_page_is_well_formed_and_all_links_resolve(self, written):
        source = (written[1] / "report.html").read_text()
        page = Page(source)
        assert len(page.ids) == len(set(page.ids))
        assert {re.search(r"#([^)]+)", link).group(1) for link in page.links} <= set(page.ids)
        headings = re.findall(r"<h2>([^<]+)</h2>", source)
        assert headings == [
            *("All tasks", "How to read the numbers", "dolly", "sst2", "vicuna", "Training"),
            *("Answers: dolly", "Answers: vicuna"),
        ]
        assert re.findall(r'<a href="#[^"]+">([^<]+)</a>', source) == headings
        # two of all tasks, two of each with texts, three diagrams, three of the training
        assert page.tags.count("svg") == 2 + 4 + 3 + 3
        assert "http:" not in source
        assert "https:" not in source

    def test_markdown_has_a_figure_for_each_of_the_page(self, written):
        paths = re.findall(r"!\[[^\]]*\]\(([^)]+)\)", (written[1] / "report.md").read_text())
        assert len(set(paths)) == 12
        assert all((written[1] / path).read_bytes().startswith(b"\x89PNG") for path in paths)

    def test_csv_has_the_numbers_of_the_tables(self, written):
        report, folder = written
        with open(folder / "comparison.csv", newline="") as file:
            rows = {(row["model"], row["task"], row["measure"]): row for row in csv.DictReader(file)}
        compared = 0
        for task in ("dolly", "sst2", "vicuna"):
            for table in section(report, task).tables.values():
                for row in table.rows:
                    for column in table.columns:
                        if column.key not in COLUMNS or isinstance(row.cells.get(column.key, ""), str):
                            continue
                        found = rows[row.name, task, column.key]
                        cell: MeanInterval | float = float(found["mean"])
                        if found["n"]:
                            numbers = [float(found[key]) for key in ("mean", "low", "high")]
                            cell = MeanInterval(*numbers, int(found["n"]), float(found["standard_error"]))
                        assert cell == row.cells[column.key]
                        assert format_cell(cell, column.digits) == format_cell(row.cells[column.key], column.digits)
                        compared += 1
        assert compared == 3 * (2 * 7 + 2)

    def test_csv_has_the_differences_of_the_tables(self, written):
        report, folder = written
        with open(folder / "comparison.csv", newline="") as file:
            rows = {(row["model"], row["task"], row["measure"]): row for row in csv.DictReader(file)}
        table = section(report, "vicuna").tables["Difference to sft"]
        for row in table.rows:
            found = rows[row.name, "vicuna", "rouge_l"]
            numbers = [float(found[f"difference{end}"]) for end in ("", "_low", "_high")]
            mean, low, high = (f"{number:+z.1f}" for number in numbers)
            assert row.cells["rouge_l"] == f"{mean} [{low}, {high}]"
            assert row.cells["rouge_l_p"] == f"{float(found['p_holm']):.3f}"
            assert float(found["p"]) <= float(found["p_holm"])
        assert rows["sft", "vicuna", "rouge_l"]["difference"] == ""
        assert rows["kd", "vicuna", "length"]["p"]  # of every measure, also those whose differences no table shows
