"""What `compare` says in words: who leads, who beats the baseline, the settings, and how to read the numbers."""

import pytest
from comparisons import compare, section
from evaluation_results import write_results
from test_compare_temperatures import ENTROPIES, line, write_decodings

from minillm_trl.evaluation.comparison import compare_models

BENCHMARK = {"kind": "lm_eval", "num_fewshot": 5, "definition_sha256": "2e", "limit": None, "seeds": []}


def write_benchmark(folder, measure: str, value: float, higher: bool) -> None:
    """A benchmark of ten documents."""
    better = {"main_measure": measure, "higher_is_better": {measure: higher}}
    write_results(folder, {measure: [value + 0.01 * row for row in range(10)]}, **BENCHMARK, **better)


class TestSummary:
    def test_better_than_the_baseline_is_lower_where_lower_is_better(self, tmp_path):
        gains = {"a": (-1.0, -1.0), "base": (0.0, 0.0), "c": (1.0, 1.0)}
        for name, (loss, accuracy) in gains.items():
            write_benchmark(tmp_path / name / "lambada", "ppl", 5.0 + loss, higher=False)
            write_benchmark(tmp_path / name / "sciq", "acc", 5.0 + accuracy, higher=True)
        report = compare(tmp_path, *gains, baseline="base")
        assert report.summary == (
            "Highest ppl or acc among the students: a on lambada; c on sciq. "
            "Significantly better than base: a on lambada; c on sciq."
        )

    def test_no_student_may_be_better(self, tmp_path):
        for name, rouge in (("a", 49.0), ("b", 50.0)):
            write_results(tmp_path / name, {"rouge_l": [rouge + 0.01 * row for row in range(10)]})
        report = compare(tmp_path, "a", "b", baseline="b")
        assert report.summary.endswith("students: b on dolly. Significantly better than b: no student.")
        # better in each prompt, but there are two ways in eight to choose their signs
        for name, rouge in (("few", 1.0), ("base", 0.0)):
            write_results(tmp_path / name, {"rouge_l": [rouge] * 3})
        report = compare(tmp_path, "few", "base", baseline="base")
        assert report.summary.endswith("students: few on dolly. Significantly better than base: no student.")

    def test_tasks_of_a_student_are_listed_and_those_without_a_quality_left_out(self, tmp_path):
        for name, rouge in (("a", 5.0), ("b", 4.0), ("big", 9.0)):
            for task in ("dolly", "vicuna"):
                write_results(tmp_path / name / task, {"rouge_l": [rouge + 0.01 * row for row in range(10)]})
            write_results(tmp_path / name / "free", {"length": [1.0] * 10})
        report = compare(tmp_path, "a", "b", "big", baseline="b", teacher="big")
        assert report.summary == (
            "Highest Rouge-L among the students: a on dolly, vicuna. Significantly better than b: a on dolly, vicuna."
        )
        assert [each.heading for each in report.sections] == [
            *("All tasks", "How to read the numbers", "dolly", "free", "vicuna"),
            *("Answers: dolly", "Answers: free", "Answers: vicuna"),
        ]

    def test_one_task_comes_before_the_notes(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]})
        report = compare(tmp_path, "a")
        assert [each.heading for each in report.sections] == ["dolly", "How to read the numbers", "Answers: dolly"]
        assert report.title == "Comparison of models"


class TestFacts:
    def test_settings_that_tasks_share_are_named_once(self, tmp_path):
        texts = {"rouge_l": [1.0, 2.0]}
        write_results(tmp_path / "a" / "dolly", texts)
        write_results(tmp_path / "a" / "short", texts, max_new_tokens=4, no_repeat_ngram_size=None, temperature=0.5)
        write_results(tmp_path / "a" / "sst2", {"accuracy": [0.0]}, label_words=["no", "yes"], outputs=[[]])
        write_benchmark(tmp_path / "a" / "sciq", "acc", 0.5, higher=True)
        report = compare(tmp_path, "a")
        prompts = {"dolly": 2, "sciq": 10, "short": 2, "sst2": 1}
        assert report.facts[:4] == [(task, f"{number} prompts") for task, number in prompts.items()]
        assert report.facts[4:] == [
            ("Decoding of dolly", "sampled at temperature 1.0; no 6-gram twice (no_repeat_ngram_size 6)"),
            ("Decoding of short", "sampled at temperature 0.5; no n-gram blocked (no_repeat_ngram_size 0)"),
            ("Sampling seeds", "1, 2"),
            ("Length limit of dolly", "8 tokens"),
            ("Length limit of short", "4 tokens"),
            ("lm-eval", "5 examples"),
            ("Label words", "no, yes"),
        ]

    def test_decodings_of_all_models_are_named_warmest_first(self, tmp_path):
        write_decodings(tmp_path / "a", line(-10, 70, {1.0: 1.6, 0.5: 0.4, None: 0.0}))
        write_decodings(tmp_path / "b", line(-10, 70, {1.0: 1.6, 1.3: 2.0, 0.7: 0.8}))
        found = dict(compare(tmp_path, "a", "b").facts)
        assert found["Also decoded with"] == (
            "temperature 1.3, temperature 1, temperature 0.7, temperature 0.5, greedy decoding"
        )


class TestNotes:
    def notes(self, folder, *names: str, **options) -> list[str]:
        return section(compare(folder, *names, **options), "How to read the numbers").notes

    def test_notes_are_of_what_the_report_has(self, tmp_path):
        write_results(tmp_path / "plain", {"rouge_l": [1.0, 2.0, 3.0]})
        write_decodings(tmp_path / "warm", line(-10, 70, ENTROPIES))
        general = self.notes(tmp_path, "plain")
        assert [note.split(" ")[0] for note in general] == ["Means", "Reverse", "Length,"]
        paired = self.notes(tmp_path, "plain", baseline="plain")
        assert paired[:3] == general
        assert [note.split(" are")[0] for note in paired[3:]] == ["Differences from plain"]
        assert [note[:19] for note in self.notes(tmp_path, "plain", "warm")[3:]] == ["A lower temperature"]
        assert len(self.notes(tmp_path, "plain", "warm", baseline="warm")) == 5


class TestAnswers:
    @pytest.mark.parametrize(("tasks", "count"), [(["dolly"], 5), (["dolly", "vicuna"], 3)])
    def test_several_tasks_show_fewer_of_each(self, tmp_path, tasks: list[str], count: int):
        for name, gain in (("a", 0.0), ("b", 1.0), ("big", 9.0)):
            for task in tasks:
                write_results(tmp_path / name / task, {"rouge_l": [1.0 + gain * row for row in range(20)]})
        report = compare(tmp_path, "a", "b", "big", teacher="big")
        for task in tasks:
            groups = section(report, f"Answers: {task}").samples
            assert list(groups) == [
                "Drawn at random (seed 0)",
                "Where the students differ most in Rouge-L, mean over seeds",
            ]
            assert [len(samples) for samples in groups.values()] == [count, count]


class TestRecords:
    def test_each_number_has_its_difference_from_the_baseline(self, tmp_path):
        for name, gain in (("base", 0.0), ("a", 2.0)):
            values = {"rouge_l": [5.0 + gain, 7.0 + gain], "length": [3.0, 4.0 + gain]}
            write_results(tmp_path / name, values, corpus={"distinct_4grams": 0.5}, excess_error=[None, 6.0 + gain])
        report = compare(tmp_path, "base", "a", baseline="base")
        records = {(record.model, record.measure): record for record in report.records}
        assert len(records) == len(report.records)
        assert records["a", "excess_error"].mean == 8.0
        found = records["a", "length"]
        assert (found.task, found.decoding, found.mean, found.n) == ("dolly", "temperature_1.0", 4.5, 2)
        assert (found.difference, found.difference_low, found.difference_high) == (1.0, 0.0, 2.0)
        assert (found.p, found.p_holm) == (1.0, 1.0)
        for key in (("base", "length"), ("a", "corpus_distinct_4grams"), ("a", "excess_error")):
            assert records[key].difference is records[key].p is None

    def test_without_texts_there_is_no_decoding(self, tmp_path):
        write_benchmark(tmp_path / "a", "acc", 0.5, higher=True)
        assert [record.decoding for record in compare(tmp_path, "a").records] == [None]


def test_names_must_be_models_and_differ(tmp_path):
    write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]})
    for option in ("baseline", "teacher"):
        with pytest.raises(ValueError, match=f"--{option} b: no such model. Choose one of a"):
            compare(tmp_path, "a", **{option: "b"})
    with pytest.raises(ValueError, match=r"Cannot compare \['a', 'a'\]"):
        compare(tmp_path, "a", "a")
    with pytest.raises(ValueError, match=r"Cannot compare \[\]"):
        compare_models([])
