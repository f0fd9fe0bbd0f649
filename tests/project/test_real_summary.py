"""The summary of the real benchmark: measures, the chosen setting, tables, and pages that say what the records say."""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm_trl.evaluation.exposure_bias import excess_accumulated_error

REAL = Path(__file__).parents[2] / "benchmarks" / "real"
sys.path.insert(0, str(REAL))

import real_methods  # noqa: E402 - lies in a folder that is no package
import real_summary  # noqa: E402
import real_tables  # noqa: E402

RESULTS = REAL.parent / "results"
PROMPTS = 6
DECODINGS = ("1.0", "0.7", "0.4", "greedy")
METHODS = ("sft", "minillm", "low_variance_cool", "distillation", "single_step_cool")


def make_record(number: int, run: real_summary.Run | None = None) -> dict[str, Any]:
    """A record with random measures: with all of them, and a run with its identity."""
    random = np.random.default_rng(number)
    test = {}
    for decoding, entropy in zip(DECODINGS, (3.0, 2.0, 1.0, 0.0), strict=True):
        test[decoding] = {name: random.uniform(size=PROMPTS).round(3).tolist() for name in real_summary.MEASURES}
        test[decoding]["entropy_per_token"] = [entropy + number / 100] * PROMPTS if entropy else [0.0] * PROMPTS
    lengths = random.integers(2, 6, size=(2, PROMPTS // 2))
    errors = [[random.uniform(size=length).round(3).tolist() for length in row] for row in lengths]
    others = {
        task: {decoding: {"rouge_l": random.uniform(size=4).round(3).tolist()} for decoding in decodings}
        for task, decodings in real_summary.OTHERS.items()
    }
    return {
        "recipe": {"start": {}},
        "validation": {decoding: {"rouge_l": [float(number)] * 3} for decoding in DECODINGS},
        "test": test,
        "answers": [{"prompt": f"p{row}", "answer": f"answer {row} of {number}"} for row in range(10)],
        "distinct": {decoding: {str(n): 0.1 * n + number / 100 for n in (1, 2, 3)} for decoding in DECODINGS},
        "forward_errors": dict(zip(("on_model", "on_teacher"), errors, strict=True)),
        "other_prompts": others,
        "identity": {"run": run and run._asdict()},
        "updates": 16,
        "seconds": 480.0,
    }


@pytest.fixture
def records(tmp_path, monkeypatch) -> dict[str, dict[str, Any]]:
    """Records of two seeds of each method at one rate, and the files that hold them."""
    monkeypatch.setattr(real_summary, "RESULTS", tmp_path)
    monkeypatch.setattr(real_summary, "LEARNING_RATES", (1e-3,))
    monkeypatch.setattr(real_summary, "SEEDS", (3, 4))
    found = {"teacher": make_record(0), "heal": make_record(1)}
    del found["teacher"]["forward_errors"]
    for values in found["teacher"]["test"].values():
        del values["reverse_kl_per_token"]
    for number, method in enumerate(METHODS):
        for seed in (3, 4):
            run = real_summary.Run(method, 1e-3, seed)
            found[run.name] = make_record(10 * number + seed, run)
    write(tmp_path, found)
    return found


def write(folder: Path, records: dict[str, dict[str, Any]]) -> None:
    (folder / "cpu").mkdir(exist_ok=True)
    for name, record in records.items():
        (folder / "cpu" / f"{name}.json").write_text(json.dumps(record))


def test_every_measure_is_the_mean_of_the_records(records):
    summary = real_summary.summarize("cpu")
    assert list(summary["rows"]) == ["teacher", "heal", *METHODS]
    row, runs = summary["rows"]["minillm"], [records[f"minillm-0.001-{seed}"] for seed in (3, 4)]
    means = {
        "greedy_rouge_l": [np.mean(run["test"]["greedy"]["rouge_l"]) for run in runs],
        "reverse_kl_per_token": [np.mean(run["test"]["1.0"]["reverse_kl_per_token"]) for run in runs],
        "greedy_teacher_logp": [-np.mean(run["test"]["greedy"]["reverse_kl_per_token"]) for run in runs],
        "forward_kl_per_token": [np.mean([np.mean(v) for v in run["forward_errors"]["on_teacher"]]) for run in runs],
        "context_greedy_rouge_l": [np.mean(run["other_prompts"]["context"]["greedy"]["rouge_l"]) for run in runs],
        "vicuna_0.7_rouge_l": [np.mean(run["other_prompts"]["vicuna"]["0.7"]["rouge_l"]) for run in runs],
    }
    for name, by_seed in means.items():
        mean, low, high = row["measures"][name]
        assert mean == pytest.approx(np.mean(by_seed)), name
        assert low < mean < high
    assert list(row["minus"]) == ["heal", "sft", "distillation"]
    for rival, differences in row["minus"].items():
        assert differences.keys() == row["measures"].keys()
        for name, (difference, _, _) in differences.items():
            other = summary["rows"][rival]["measures"][name][0]
            assert difference == pytest.approx(row["measures"][name][0] - other), (rival, name)
    assert row["distinct"]["greedy"]["2"] == pytest.approx(0.2 + 0.135)
    assert "forward_kl_per_token" not in summary["rows"]["teacher"]["measures"]


def test_exposure_bias_is_that_of_the_package_for_every_draw_of_prompts():
    random, prompts = np.random.default_rng(0), 6
    lengths = {"on_model": (1, 4, 5, 3, 2, 6), "on_teacher": (3, 5, 2, 1, 6, 4)}
    errors = {name: [random.uniform(size=length).tolist() for length in row] for name, row in lengths.items()}
    found = real_summary.exposure_replicates(errors, 3)
    for draw in (0, 1, 7, 300):
        counts = np.rint(real_summary.prompt_weights(prompts)[draw] * prompts).astype(int)
        drawn = ([rows[row] for row in np.repeat(np.arange(prompts), counts)] for rows in errors.values())
        bias = excess_accumulated_error(*drawn)  # of the model's samples, then of the teacher's
        assert found[draw] == pytest.approx(bias.excess_error[2])


def test_position_is_the_last_that_half_of_the_samples_of_all_reach():
    def run(own: list[int], teachers: list[int]) -> dict[str, Any]:
        samples = {"on_model": own, "on_teacher": teachers}
        return {"forward_errors": {name: [[0.0] * length for length in lengths] for name, lengths in samples.items()}}

    runs = [{}, run([1, 2, 5, 9], [9, 9, 9, 9]), run([9, 9, 1, 1], [3, 4, 8])]
    assert real_summary.shared_position(runs) == 4
    assert real_summary.shared_position([{}]) is None


def test_student_of_the_answers_is_the_best_minillm_setting_on_the_validation_prompts(records, tmp_path):
    assert real_summary.best_setting(records) == "low_variance_cool"  # the single step alone scores higher
    summary = real_summary.summarize("cpu")
    assert summary["answers"]["seed"] == 3
    assert summary["answers"]["label"] == real_methods.METHODS["low_variance_cool"].label
    assert summary["answers"]["rows"][1] == {
        "prompt": "p1",
        "teacher": "answer 1 of 0",
        "start": "answer 1 of 1",
        "student": "answer 1 of 23",
    }
    for seed in (3, 4):
        del records[f"low_variance_cool-0.001-{seed}"]["test"]
    assert real_summary.best_setting(records) == "minillm"


def test_row_shows_the_best_rate_on_the_validation_prompts_of_those_with_a_test(records, tmp_path, monkeypatch):
    monkeypatch.setattr(real_summary, "LEARNING_RATES", (1e-3, 1e-4))
    run = real_summary.Run("minillm", 1e-4, 3)
    better = make_record(50, run)  # its number is its validation score
    without_test = {name: value for name, value in better.items() if name != "test"}
    for record, rate, note in (
        (without_test, 1e-3, "0.001 (2), the best is not tested yet"),
        (better, 1e-4, "0.0001 (2)"),
    ):
        write(tmp_path, records | {run.name: record})
        summary = real_summary.summarize("cpu")
        assert summary["rows"]["minillm"]["learning_rate"] == rate
        assert f"| 480 | 16 | {note} |" in real_tables.quality_table(summary)


def test_records_of_another_recipe_are_left_out(records, tmp_path):
    for seed in (3, 4):
        records[f"minillm-0.001-{seed}"]["recipe"] = {"start": {"num_layers": 3}}
    write(tmp_path, records)
    assert "minillm" not in real_summary.summarize("cpu")["rows"]


def test_measures_that_a_record_lacks_are_dashes(records, tmp_path):
    for part in ("forward_errors", "distinct", "other_prompts"):
        del records["minillm-0.001-4"][part]
    records["minillm-0.001-3"]["test"]["greedy"]["loss"] = [1.0] * PROMPTS
    write(tmp_path, records)
    summary = real_summary.summarize("cpu")
    label = real_methods.METHODS["minillm"].label

    def row(table: str) -> list[str]:
        (line,) = [line for line in table.splitlines() if line.startswith(f"| {label} | ")]
        return line.strip("| ").split(" | ")

    assert row(real_tables.quality_table(summary))[-3:] == ["–"] * 3
    divergence = row(real_tables.divergence_table(summary))
    assert [cell == "–" for cell in divergence] == [False, False, False, False, True, False, True]
    assert row(real_tables.text_table(summary))[4:7] == ["–"] * 3
    assert "| – |" in real_tables.differences_table(summary, real_tables.DIVERGENCE)


def test_tables_have_a_cell_for_every_title(records):
    summary = real_summary.summarize("cpu")
    for path, parts in real_tables.pages(summary, "cpu").items():
        for name, text in parts.items():
            lines = [line for line in text.splitlines() if line.startswith("|")]
            assert len({line.count(" | ") for line in lines if not line.startswith("|---")}) <= 1, (path, name)
            assert all(line.count("|") == lines[0].count("|") for line in lines), (path, name)


def test_list_has_every_difference_whose_interval_excludes_zero():
    label = {name: real_methods.METHODS[name].label for name in ("minillm", "sft")}
    minus = {
        "greedy_rouge_l": [2.0, 0.1, 3.0],
        "tuned_rouge_l": [-2.0, -3.0, -0.1],
        "vicuna_greedy_rouge_l": [1, -1, 2],
    }
    rows = {name: {"label": text, "minus": {}} for name, text in label.items()}
    rows["minillm"]["minus"] = {"sft": minus}
    assert real_tables.clear_differences({"rows": rows}).splitlines() == [
        "2 of these 3 differences have an interval that excludes 0. If there were no differences, about 0 would:",
        "",
        f"- {label['minillm']}: ahead of {label['sft']} (greedy +2.0 [+0.1, +3.0]); "
        f"behind {label['sft']} (best decoding -2.0 [-3.0, -0.1]).",
    ]


def test_answers_show_the_text_as_it_is(records):
    assert real_tables.escape("a | b\n<b> *c* `d` [e](f) $g$ _h_ & ~") == (
        r"a \| b &lt;b&gt; \*c\* \`d\` \[e\](f) \$g\$ \_h\_ &amp; \~"
    )
    summary = real_summary.summarize("cpu")
    folded = real_tables.answers_block(summary, 3)
    assert folded.index("answer 2 of 23") < folded.index("<details><summary>7 more") < folded.index("answer 3 of 23")
    assert folded.count("answer 0 of 23") == 1
    assert "<details>" not in real_tables.answers_block(summary)
    assert folded.index("words: off") < folded.index("answer 0 of 0") < folded.rindex("words: on")


def test_text_replaces_that_between_the_marks_of_a_notebook(tmp_path):
    cell = {
        "cell_type": "markdown",
        "source": ["a\n", "<!-- x: made by a script -->\n", "old\n", "<!-- end of x -->b"],
    }
    path = tmp_path / "n.ipynb"
    path.write_text(json.dumps({"cells": [{"cell_type": "code", "source": ["é"]}, cell]}))
    real_tables.insert_in_notebook(path, "x", "new\nlines")
    code, changed = json.loads(path.read_text())["cells"]
    assert code == {"cell_type": "code", "source": ["é"]}
    assert changed["source"] == ["a\n", "<!-- x: made by a script -->\n", "new\n", "lines\n", "<!-- end of x -->b"]


def between_marks(text: str, name: str) -> str:
    start, end = f"<!-- {name}: made by a script -->\n", f"\n<!-- end of {name} -->"
    return text.split(start)[1].split(end)[0]


def test_pages_show_what_the_records_have():
    summary = json.loads((RESULTS / "real_cpu.json").read_text())["results"]
    assert summary["answers"] == real_summary.answers_of(real_summary.read_records("cpu"), real_summary.task_of("cpu"))
    pages = real_tables.pages(summary, "cpu")
    assert pages.keys() == {real_tables.README, real_tables.FRONT_PAGE, real_tables.NOTEBOOK}
    for path, parts in pages.items():
        text = path.read_text()
        if path.suffix == ".ipynb":
            text = "\n".join("".join(cell["source"]) for cell in json.loads(text)["cells"])
        for name, part in parts.items():
            assert between_marks(text, name) == part, (path, name)
