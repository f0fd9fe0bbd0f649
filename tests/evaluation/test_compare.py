"""`compare`: its tables, and the evaluations that it refuses to compare."""

import json

import pytest
from comparisons import cells, compare, section
from evaluation_results import write_results

from minillm_trl.cli import main
from minillm_trl.evaluation.results import read_evaluation


class TestTables:
    def test_differences_to_the_baseline_are_paired_by_prompt(self, tmp_path):
        rouge = [10.0, 90.0, 20.0, 50.0, 30.0, 70.0, 60.0]
        write_results(tmp_path / "sft", {"rouge_l": rouge})
        write_results(tmp_path / "minillm", {"rouge_l": [score + 2 for score in rouge]})
        write_results(tmp_path / "kd", {"rouge_l": [11.0, *rouge[1:]]})
        write_results(tmp_path / "big", {"rouge_l": [50.0] * 7}, model="t")
        report = compare(tmp_path, "sft", "minillm", "kd", "big", baseline="sft")
        table = section(report, "dolly").tables["Difference from sft"]
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
        assert table.note == "* significantly different from sft: corrected p of at most 0.05"
        assert report.summary == (
            "Highest Rouge-L among the students: minillm on dolly. Significantly better than sft: minillm on dolly."
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
        labels = [(column.label, column.better) for column in section(report, "All tasks").tables[""].columns]
        assert labels == [("dolly: Rouge-L", "higher"), ("sciq: acc", "higher")]
        tables = section(report, "sciq").tables
        assert [(column.label, column.better) for column in tables["Quality"].columns] == [
            ("acc", "higher"),
            ("word_perplexity", "lower"),
        ]
        assert cells(tables["Difference from b"])["a"]["acc"].startswith("+0.875 [")
        assert ("lm-eval", "5 examples") in report.facts
        assert "Significantly better than b: a on sciq." in report.summary

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
        assert report.summary == "No references or labels, so no Rouge-L or accuracy."
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
            with pytest.raises(ValueError, match=f"b and {other}: .* on dolly .* 't' and 'u'"):
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
            with pytest.raises(ValueError, match=rf"{path}: invalid results of .* \(.*{message}.*\). Evaluate again"):
                read_evaluation("a", folder)

    def test_characters_that_some_take_for_line_breaks_are_read_as_they_were_written(self, tmp_path):
        text = "one\u2028two\u2029three\u0085four\x0bfive"
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]}, outputs=[[text, text]] * 2)
        assert [sample["outputs"] for sample in read_evaluation("a", folder).tasks["dolly"].samples] == [
            [text] * 2
        ] * 2

    def test_names_without_a_row_are_refused(self, tmp_path, capsys):
        assert main(["compare", str(tmp_path)]) == 2
        assert f"{tmp_path}: no results.json or TASK/results.json" in capsys.readouterr().err
        folder = str(write_results(tmp_path / "a", {"rouge_l": [1.0]}))
        assert main(["compare", folder, "--baseline", "sft"]) == 2
        assert "--baseline sft: " in capsys.readouterr().err
        assert main(["compare", folder, folder]) == 2
        assert "['a', 'a']" in capsys.readouterr().err
        for word in ("b=x", "a"):
            assert main(["compare", folder, "--training", word]) == 2
            assert f"--training {word}: expected NAME=OUTPUT_DIR with a name of a." in capsys.readouterr().err
