"""`compare` of models evaluated at several temperatures: what is chosen, interpolated, drawn and refused."""

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
from comparisons import cells, compare, section
from evaluation_results import SEEDS, write_results

from minillm_trl.cli import main
from minillm_trl.evaluation.decodings import Decoding
from minillm_trl.evaluation.plots import Curve
from minillm_trl.evaluation.results import read_evaluation
from minillm_trl.evaluation.statistics import bootstrap_interval

USE, COVERAGE = "Where people decode", "Coverage and diversity where people decode"
EQUAL = "Difference from sft at equal entropy"
ENTROPY = "entropy_per_token"
OFFSETS = (-0.2, 0.0, 0.2)  # of the three prompts

Values = Mapping[float | None, Mapping[str, Sequence[float]]]


def write_decodings(folder: Path, values: Values, **settings) -> None:
    """Results of three prompts by temperature, None for greedy decoding."""
    for temperature, per_prompt in values.items():
        decoding = Decoding(temperature)
        own = {"decoding": decoding.folder, "temperature": temperature or 1.0, "teacher_temperature": 1.0}
        if temperature is None:
            own |= {"greedy": True, "seeds": []}
        write_results(folder / decoding.folder, dict(per_prompt), **{**own, **settings})


def write_validation(folder: Path, values: Values, **settings) -> None:
    write_decodings(folder / "validation", values, **{"split": "validation", "data_sha256": "2e", **settings})


def line(slope: float, intercept: float, entropies: Mapping[float | None, float], **measures: float) -> Values:
    """Rouge-L on a line over entropy, for every prompt; reverse KL is 10 less a tenth of it."""
    found = {}
    for temperature, entropy in entropies.items():
        by_prompt = [entropy + offset if entropy else 0.0 for offset in OFFSETS]
        rouge = [intercept + slope * value for value in by_prompt]
        found[temperature] = {"rouge_l": rouge, "reverse_kl": [10 - value / 10 for value in rouge]}
        found[temperature] |= {ENTROPY: by_prompt} if temperature else {}
        found[temperature] |= {name: [value] * 3 for name, value in measures.items()}
    return found


def constant(rouge: Mapping[float | None, float]) -> Values:
    return {temperature: {"rouge_l": [value] * 3} for temperature, value in rouge.items()}


ENTROPIES = {1.0: 1.6, 0.7: 0.8, 0.5: 0.4, None: 0.0}


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """`sft` on a line of slope -10 from 70, `minillm` 2 above it and sharper; validation chooses 0.7 and 0.5."""
    write_decodings(tmp_path / "sft", line(-10, 70, ENTROPIES))
    write_validation(tmp_path / "sft", constant({1.0: 50, 0.7: 66, 0.5: 64, None: 90}))
    sharper = {1.0: 1.2, 0.7: 0.6, 0.5: 0.3, None: 0.0}
    write_decodings(tmp_path / "minillm", line(-10, 72, sharper))
    write_validation(tmp_path / "minillm", constant({1.0: 50, 0.7: 60, 0.5: 65, None: 10}))
    return tmp_path


class TestReading:
    def test_tables_of_one_decoding_show_temperature_1_or_the_highest(self, tmp_path):
        write_decodings(tmp_path / "a", constant({0.7: 60, 1.0: 50, 2.0: 30, None: 70}))
        write_decodings(tmp_path / "b" / "dolly", constant({0.4: 60, 0.7: 50, None: 70}))
        write_decodings(tmp_path / "b" / "vicuna", constant({None: 70}))
        (a, b) = (read_evaluation(name, tmp_path / name) for name in "ab")
        assert a.tasks["dolly"].settings["temperature"] == 1.0
        assert list(a.decodings["dolly"].test) == [Decoding(value) for value in (2.0, 1.0, 0.7, None)]
        assert b.tasks["dolly"].settings["temperature"] == 0.7
        assert b.tasks["vicuna"].settings["greedy"] is True

    def test_task_may_have_the_name_of_a_decoding(self, tmp_path):
        for task in ("greedy", "validation", "temperature_1"):
            write_results(tmp_path / "a" / task, {"rouge_l": [1.0]})
        model = read_evaluation("a", tmp_path / "a")
        assert sorted(model.tasks) == ["greedy", "temperature_1", "validation"]
        assert not model.decodings

    def test_benchmarks_next_to_tasks_with_decodings(self, tmp_path):
        write_decodings(tmp_path / "a" / "dolly", constant({1.0: 50, None: 70}))
        write_results(tmp_path / "a" / "vicuna", {"rouge_l": [1.0]})
        model = read_evaluation("a", tmp_path / "a")
        assert (sorted(model.tasks), list(model.decodings)) == (["dolly", "vicuna"], ["dolly"])

    def test_validation_alone_is_no_result(self, tmp_path):
        write_validation(tmp_path / "a", constant({1.0: 50}))
        with pytest.raises(ValueError, match=f"{tmp_path / 'a'}: no results.json"):
            read_evaluation("a", tmp_path / "a")

    def test_results_with_and_without_temperatures_in_one_folder_are_refused(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0]})
        write_decodings(tmp_path / "a", constant({0.7: 60}))
        with pytest.raises(ValueError, match=f"{tmp_path / 'a'} has results of --temperatures and "):
            read_evaluation("a", tmp_path / "a")


class TestChoice:
    def test_temperature_is_chosen_on_validation_and_applied_to_the_test_set(self, models):
        report = compare(models, "sft", "minillm")
        table = section(report, "dolly").tables[USE]
        assert [column.key for column in table.columns] == [
            *("paper:rouge_l", "paper:reverse_kl", "chosen_temperature"),
            *("chosen:rouge_l", "chosen:reverse_kl", "chosen:entropy_per_token", "greedy:rouge_l"),
        ]
        found = cells(table)
        assert {name: row["chosen_temperature"] for name, row in found.items()} == {"sft": "0.7", "minillm": "0.5"}
        means = {
            name: [cell.mean for cell in row.values() if not isinstance(cell, str)] for name, row in found.items()
        }
        assert means["sft"] == pytest.approx([54, 4.6, 62, 3.8, 0.8, 70])
        assert means["minillm"] == pytest.approx([60, 4, 69, 3.1, 0.3, 72])
        assert report.summary.endswith(" Highest Rouge-L at temperatures chosen on validation: minillm on dolly.")
        assert "split validation" in table.note

    @pytest.mark.parametrize(
        ("validation", "chosen"),
        [
            ({1.0: 50, 0.7: 66, 0.5: 66}, "0.7"),  # a tie: the more diverse one
            ({1.0: 50, 0.5: 40, None: 99}, "1"),  # greedy decoding is no candidate
            ({1.0: 50, 0.9: 99}, "1"),  # not evaluated on the test set
        ],
    )
    def test_candidates(self, tmp_path, validation: dict, chosen: str):
        write_decodings(tmp_path / "a", line(-10, 70, ENTROPIES))
        write_validation(tmp_path / "a", constant(validation))
        table = section(compare(tmp_path, "a"), "dolly").tables[USE]
        assert cells(table)["a"]["chosen_temperature"] == chosen

    def test_without_a_validation_split_nothing_is_chosen(self, tmp_path):
        write_decodings(tmp_path / "a", line(-10, 70, ENTROPIES))
        report = compare(tmp_path, "a")
        table = section(report, "dolly").tables[USE]
        assert [column.key for column in table.columns] == ["paper:rouge_l", "paper:reverse_kl", "greedy:rouge_l"]
        assert "--validation_split" in table.note
        assert "validation" not in report.summary

    def test_models_without_one_are_named(self, models):
        write_decodings(models / "kd", line(-10, 70, ENTROPIES))
        write_results(models / "plain", {"rouge_l": [1.0, 2.0, 3.0]})
        table = section(compare(models, "sft", "kd", "plain"), "dolly").tables[USE]
        assert "None for kd: " in table.note
        assert cells(table)["plain"].keys() == {"paper:rouge_l"}
        assert "chosen_temperature" not in cells(table)["kd"]

    def test_other_temperatures_are_not_shown_as_temperature_1(self, tmp_path):
        write_decodings(tmp_path / "a", line(-10, 70, {0.7: 0.8, None: 0.0}))
        table = section(compare(tmp_path, "a"), "dolly").tables[USE]
        assert [column.key for column in table.columns] == ["greedy:rouge_l"]

    def test_diversity_and_coverage(self, tmp_path):
        measures = {"best_rouge_l": 75.0, "distinct_4grams": 0.5, "self_bleu": 30.0, "forward_kl": 8.0}
        write_decodings(tmp_path / "a", line(-10, 70, {1.0: 1.6, None: 0.0}, **measures))
        half = {name: value / 2 for name, value in measures.items()}
        write_decodings(tmp_path / "a", line(-10, 70, {0.7: 0.8}, **half))
        write_validation(tmp_path / "a", constant({1.0: 1, 0.7: 2}))
        found = cells(section(compare(tmp_path, "a"), "dolly").tables[COVERAGE])["a"]
        assert {key: cell.mean for key, cell in found.items()} == {
            **{f"paper:{name}": value for name, value in measures.items()},
            **{f"chosen:{name}": value for name, value in half.items()},
        }

    def test_one_temperature_has_none_of_this(self, tmp_path):
        write_results(tmp_path / "a", {"rouge_l": [1.0, 2.0]})
        report = compare(tmp_path, "a", baseline="a")
        assert not {USE, COVERAGE} & section(report, "dolly").tables.keys()
        assert not any("entropy" in note.lower() for note in section(report, "How to read the numbers").notes)


class TestEqualEntropy:
    def test_difference_is_at_the_entropy_of_the_baseline_s_chosen_temperature(self, models):
        report = compare(models, "sft", "minillm", baseline="sft")
        table = section(report, "dolly").tables[EQUAL]
        # at temperature 1, minillm is 6 above: sharper as well as better. At every entropy it is 2 above
        assert cells(table) == {
            "minillm": {
                "rouge_l:at": "+2.0 [+2.0, +2.0]",
                "rouge_l:mean": "+2.0 [+2.0, +2.0]",
                "reverse_kl:at": "-0.2 [-0.2, -0.2]",
                "reverse_kl:mean": "-0.2 [-0.2, -0.2]",
                "shared": "0.00–1.20",
            }
        }
        assert table.columns[0].label == "Rouge-L at 0.80 nats/token"
        assert "sft at temperature 0.7" in table.note
        records = {
            record.decoding: record for record in report.records if record.difference and record.measure == "rouge_l"
        }
        # 72 - 10 h at h = 0.8, and at 0.6 on average
        assert (records["entropy_0.8"].mean, records["entropy_0.8"].difference) == pytest.approx((64, 2))
        assert (records["shared_entropies"].mean, records["shared_entropies"].difference) == pytest.approx((66, 2))
        assert records["temperature_1.0"].difference == pytest.approx(6)

    def test_prompts_are_paired(self, tmp_path):
        """The same noise in both models cancels; in one of them it widens the interval."""
        noise = [-9.0, 0.0, 9.0]
        values = line(-10, 70, ENTROPIES)
        noisy = {
            temperature: {**row, "rouge_l": [value + more for value, more in zip(row["rouge_l"], noise, strict=True)]}
            for temperature, row in values.items()
        }
        for name, written in (("sft", noisy), ("same", noisy), ("calm", values)):
            write_decodings(tmp_path / name, written)
        records = {
            record.model: record
            for record in compare(tmp_path, "sft", "same", "calm", baseline="sft").records
            if record.decoding == "shared_entropies" and record.measure == "rouge_l"
        }
        assert (records["same"].difference_low, records["same"].difference_high) == (0, 0)
        assert records["calm"].difference_high > 5

    def test_without_a_choice_it_is_at_temperature_1_and_only_where_both_curves_are(self, tmp_path):
        write_decodings(tmp_path / "sft", line(-10, 70, {1.2: 2.0, 1.0: 1.6, 0.7: 0.8}))
        write_decodings(tmp_path / "minillm", line(-10, 72, {1.0: 1.2, 0.5: 0.4}))
        write_decodings(tmp_path / "sharp", line(-10, 72, {1.0: 0.6, 0.5: 0.4}))
        write_decodings(tmp_path / "flat", line(-10, 73, {1.0: 1.6, 0.5: 0.4}))
        report = compare(tmp_path, "sft", "minillm", "sharp", "flat", baseline="sft")
        table = section(report, "dolly").tables[EQUAL]
        found = cells(table)
        assert table.columns[0].label == "Rouge-L at 1.60 nats/token"
        assert found["minillm"].keys() == {"rouge_l:mean", "reverse_kl:mean", "shared"}
        assert found["minillm"]["shared"] == "0.80–1.20"
        assert found["sharp"] == {}
        assert found["flat"]["rouge_l:at"] == "+3.0 [+3.0, +3.0]"
        assert "missing" in table.note

    def test_baseline_of_one_temperature_has_no_such_table(self, models):
        write_results(models / "plain", {"rouge_l": [1.0, 2.0, 3.0]})
        report = compare(models, "plain", "minillm", baseline="plain")
        assert "Difference from plain at equal entropy" not in section(report, "dolly").tables


class TestFigures:
    def test_lines_over_entropy_have_the_intervals_of_the_results(self, models):
        write_results(models / "plain", {"rouge_l": [1.0, 2.0, 3.0]})
        figures = section(compare(models, "plain", "sft", "minillm"), "dolly").figures
        titles = ["dolly: Rouge-L over entropy", "dolly: Reverse KL (nats) over entropy"]
        assert [plot.title for plot in figures] == titles
        rouge = figures[0]
        assert isinstance(rouge, Curve)
        assert list(rouge.order) == ["plain", "sft", "minillm"]
        assert rouge.series.keys() == {"sft", "minillm"}
        entropies, means = rouge.series["sft"]
        assert entropies == pytest.approx([0.0, 0.4, 0.8, 1.6])
        assert means == pytest.approx([70, 66, 62, 54])
        expected = bootstrap_interval([70 - 10 * (0.4 + offset) for offset in OFFSETS], resamples=200)
        low, high = rouge.intervals["sft"]
        assert (low[1], high[1]) == pytest.approx((expected.low, expected.high))
        assert (low[0], high[0]) == (70, 70)

    def test_decoding_without_a_measured_entropy_is_no_point(self, tmp_path):
        values = line(-10, 70, ENTROPIES)
        write_decodings(tmp_path / "a", {**values, 0.7: {"rouge_l": [1.0] * 3}})
        rouge = section(compare(tmp_path, "a"), "dolly").figures[0]
        assert rouge.series["a"][0] == pytest.approx([0.0, 0.4, 1.6])


class TestRefusals:
    def write(self, folder: Path, change: dict, where: str) -> None:
        for name in ("a", "b"):
            changed = change if name == "b" else {}
            write_decodings(folder / name, line(-10, 70, {1.0: 1.6, 0.7: 0.8}))
            part = constant({0.5: 66})
            if where == "test":
                write_decodings(folder / name, line(-10, 70, {0.5: 0.4}), **changed)
            else:
                write_decodings(folder / name, line(-10, 70, {0.5: 0.4}))
                write_validation(folder / name, part, **changed)

    def test_other_temperatures_are_no_obstacle(self, tmp_path):
        write_decodings(tmp_path / "a", line(-10, 70, {1.0: 1.6, 0.7: 0.8}))
        write_decodings(tmp_path / "b", line(-10, 70, {1.0: 1.6, 0.55: 0.5, None: 0.0}))
        table = section(compare(tmp_path, "a", "b", baseline="a"), "dolly").tables
        assert cells(table["Difference from a at equal entropy"])["b"]["shared"] == "0.80–1.60"

    @pytest.mark.parametrize(
        ("change", "where", "message"),
        [
            ({"seeds": [1]}, "test", r"dolly by b: seeds is \[1, 2\] and \[1\]"),
            ({"max_new_tokens": 9}, "test", "dolly by b: max_new_tokens is 8 and 9"),
            ({"data_sha256": "3f"}, "test", "dolly by b: data_sha256 is '1f' and '3f'"),
            ({"teacher": "u"}, "test", "temperature 0.7 and temperature 0.5: .* dolly by b .* 't' and 'u'"),
            ({"teacher_temperature": 0.5}, "test", "dolly by b .* teacher_temperature 1 and 0.5"),
            ({"seeds": [1]}, "validation", r"dolly, validation \(temperature 0.5\): seeds is \[1, 2\] and \[1\]"),
            ({"data_sha256": "3f"}, "validation", r"different data of dolly, validation \(temperature 0.5\)"),
        ],
    )
    def test_decodings_that_differ_in_more_than_temperature(self, tmp_path, change, where, message):
        self.write(tmp_path, change, where)
        with pytest.raises(ValueError, match=message):
            compare(tmp_path, "a", "b")

    def test_models_at_the_same_temperature_are_compared_as_at_temperature_1(self, tmp_path):
        write_decodings(tmp_path / "a", line(-10, 70, {0.7: 0.8}))
        write_decodings(tmp_path / "b", line(-10, 70, {0.7: 0.8}), seeds=[3, 4])
        with pytest.raises(ValueError, match=r"a and b .* dolly: seeds is \[1, 2\] and \[3, 4\]"):
            compare(tmp_path, "a", "b")

    def test_temperatures_chosen_on_different_data(self, tmp_path):
        for name, temperature, digest in (("a", 0.7, "2e"), ("b", 0.5, "3f")):
            write_decodings(tmp_path / name, line(-10, 70, ENTROPIES))
            write_validation(tmp_path / name, constant({temperature: 60}), data_sha256=digest)
        with pytest.raises(ValueError, match=r"a and b .* dolly, validation: data_sha256 is '2e' and '3f'"):
            compare(tmp_path, "a", "b")

    def test_divergences_at_another_temperature_of_the_teacher(self, tmp_path):
        """Without the setting, the teacher had the temperature of the samples."""
        plain = {"rouge_l": [1.0] * 3, "reverse_kl": [1.0] * 3}
        write_results(tmp_path / "a", plain)
        write_decodings(tmp_path / "b", {1.0: plain})
        compare(tmp_path, "a", "b")
        write_results(tmp_path / "c", plain, teacher_temperature=0.7)
        with pytest.raises(ValueError, match=r"b and c: .* teacher_temperature 1 and 0.7"):
            compare(tmp_path, "b", "c")


def test_files_have_the_numbers_of_every_decoding(models, capsys):
    words = [str(models / name) for name in ("sft", "minillm")]
    assert main(["compare", *words, "--baseline", "sft", "--output_dir", str(models / "report")]) == 0
    printed = capsys.readouterr().out
    page = (models / "report" / "report.md").read_text()
    for heading in (USE, EQUAL):
        assert f"### {heading}\n" in page
        assert f"<h3>{heading}</h3>" in (models / "report" / "report.html").read_text()
        assert f"dolly: {heading}" in printed
    assert "![dolly: Rouge-L over entropy](figures/" in page
    assert "Also decoded with | temperature 1, temperature 0.7, temperature 0.5, greedy decoding" in page
    with open(models / "report" / "comparison.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    found = {
        (row["model"], row["decoding"]): float(row["mean"])
        for row in rows
        if row["measure"] in ("rouge_l", "chosen_temperature")
    }
    expected = {"temperature_1.0": 54, "temperature_0.5": 66, "greedy": 70, "validation/greedy": 90}
    assert {place: found["sft", place] for place in expected} == pytest.approx(expected)
    chosen = {row["model"]: float(row["mean"]) for row in rows if row["measure"] == "chosen_temperature"}
    assert chosen == {"sft": 0.7, "minillm": 0.5}
    keys = [(row["model"], row["task"], row["measure"], row["decoding"]) for row in rows]
    assert len(keys) == len(set(keys))


def test_wrong_decoding_in_a_file_is_named(tmp_path):
    write_decodings(tmp_path / "a", constant({1.0: 50}))
    path = tmp_path / "a" / "temperature_1.0" / "results.json"
    results = json.loads(path.read_text())
    results["settings"]["decoding"] = 1
    path.write_text(json.dumps(results))
    with pytest.raises(ValueError, match=f"{path}: invalid results"):
        read_evaluation("a", tmp_path / "a")
    assert results["settings"]["seeds"] == SEEDS
