"""The rest of what `compare` writes: figures, curves of the training, answers, and the files."""

import csv
import logging
import math
import re
import shutil
from pathlib import Path

import pytest
from comparisons import ENTRIES, compare, section, write_training
from evaluation_results import SEEDS, write_results
from test_report import Page

from minillm_trl.cli import main
from minillm_trl.evaluation.calibration import CalibrationBin
from minillm_trl.evaluation.comparison_tables import COLUMNS
from minillm_trl.evaluation.plots import Curve, Intervals, Reliability
from minillm_trl.evaluation.report import Report, format_cell
from minillm_trl.evaluation.statistics import MeanInterval
from minillm_trl.evaluation.training_history import training_folder


class TestFigures:
    def test_rouge_l_of_all_tasks_is_one_figure(self, tmp_path):
        for name, gain in (("a", 0.0), ("b", 2.0)):
            for task in ("dolly", "vicuna"):
                write_results(tmp_path / name / task, {"rouge_l": [1.0 + gain, 3.0 + gain]})
        shutil.rmtree(tmp_path / "b" / "vicuna")
        (plot,) = section(compare(tmp_path, "a", "b"), "All tasks").figures
        assert isinstance(plot, Intervals)
        assert plot.categories == ["dolly", "vicuna"]
        means = {name: [interval and interval.mean for interval in series] for name, series in plot.series.items()}
        assert means == {"a": [2.0, 2.0], "b": [4.0, None]}

    def test_buckets_without_prompts_are_left_out(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 3.0, 8.0]}, bucket_of=[0, 0, 2])
        (plot,) = section(compare(tmp_path, "a"), "dolly").figures
        assert plot.categories == ["all", "0–5 tokens\n(n = 2)", "11 or more tokens\n(n = 1)"]
        assert [interval.mean for interval in plot.series["a"]] == [4.0, 2.0, 8.0]

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


class TestTraining:
    def curves(self, folder: Path, *arguments: str) -> list[str]:
        """Figures of the training in the report of `compare`."""
        assert main(["compare", *arguments, "--output_dir", str(folder / "report")]) == 0
        _, _, training = (folder / "report" / "report.md").read_text().partition("## Training")
        return re.findall(r"!\[([^\]]+)\]", training)

    def test_evaluations_during_training_are_curves(self, tmp_path):
        training = write_training(tmp_path / "run", list(ENTRIES))
        write_training(training, [{"step": 10, "eval_rouge_l": 1.0}], step=10)  # an older one
        folder = write_results(tmp_path / "a", {"rouge_l": [1.0]}, model=str(training))
        titles = ["Rouge-L on validation prompts", "Reverse KL on validation prompts", "Length on validation prompts"]
        assert self.curves(tmp_path, str(folder)) == titles
        (tmp_path / "torn" / "checkpoint-30").mkdir(parents=True)
        other = write_training(tmp_path / "torn", list(ENTRIES)[:1])
        assert self.curves(tmp_path, str(folder), "--training", f"a={other}") == titles

    def test_curves_have_the_evaluations_by_step(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0]})
        write_results(tmp_path / "b", {"rouge_l": [1.0]})
        history = {"eval_rouge_l": {10: 20.0, 20: 22.0}}
        (plot,) = section(compare(tmp_path, "a", "b", histories={"b": history}), "Training").figures
        assert plot.series == {"b": ([10.0, 20.0], [20.0, 22.0])}
        assert list(plot.order) == ["a", "b"]

    def test_folder_of_the_training_is_found_by_the_model_its_checkpoint_or_adapter(self, tmp_path):
        training = write_training(tmp_path / "run", list(ENTRIES))
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
        assert f"{tmp_path}: no complete checkpoint" in capsys.readouterr().err
        state = training / "checkpoint-20" / "trainer_state.json"
        state.write_text('{"log_history": [{"eval_rouge_l"')
        with caplog.at_level(logging.WARNING):
            assert main(["compare", str(folder)]) == 0
        assert f"{state}: cannot be used" in caplog.text
        assert main(["compare", str(folder), "--training", f"a={training}"]) == 2
        assert f"{training}: no complete checkpoint" in capsys.readouterr().err


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

    def test_a_single_student_is_compared_with_the_other_models(self, tmp_path):
        for name in ("teacher", "sft"):
            rouge = [10.0 + 50.0 * (name == "teacher" and row == 3) for row in range(40)]
            write_results(tmp_path / name, {"rouge_l": rouge})
        groups = self.samples(tmp_path, "teacher", "sft", teacher="teacher")
        (differing,) = groups.pop("Where the models differ most in Rouge-L, mean over seeds")
        assert differing.prompt.endswith("3")
        assert list(groups) == ["Drawn at random (seed 0)"]

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
            values = {key: [base + number + offset for offset in spread] for key, base in measures.items()}
            curve = [3.0, 4.0 + number]
            more = {"bucket_of": [0, 1, 2, 2] * 2, "excess_error": curve, "corpus": {"distinct_4grams": 0.75}}
            write_results(folder / name / task, values, **more)
        labels = {"label_words": ["yes", "no"], "calibration": {"ece": 0.3, "bins": bins}, "outputs": [[]] * 8}
        write_results(folder / name / "sst2", {"accuracy": [0.0, 100.0] * 4}, **labels)
    write_training(folder / "run", list(ENTRIES))
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
        table = section(report, "vicuna").tables["Difference from sft"]
        for row in table.rows:
            found = rows[row.name, "vicuna", "rouge_l"]
            numbers = [float(found[f"difference{end}"]) for end in ("", "_low", "_high")]
            mean, low, high = (f"{number:+z.1f}" for number in numbers)
            assert row.cells["rouge_l"] == f"{mean} [{low}, {high}]"
            assert row.cells["rouge_l_p"] == f"{float(found['p_holm']):.3f}"
            assert float(found["p"]) <= float(found["p_holm"])
        assert rows["sft", "vicuna", "rouge_l"]["difference"] == ""
        assert rows["kd", "vicuna", "length"]["p"]  # of every measure, also those whose differences no table shows
