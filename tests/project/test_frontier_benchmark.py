"""The comparison on the frontier, with a tiny task: the family trains, records stay, and tables follow them."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import build_model, build_tokenizer
from datasets import Dataset, DatasetDict

FRONTIER = Path(__file__).parents[2] / "benchmarks" / "frontier"
sys.path.insert(0, str(FRONTIER))

import frontier_methods  # noqa: E402 - lies in a folder that is no package
import frontier_run  # noqa: E402
import frontier_sizes  # noqa: E402
import frontier_summary  # noqa: E402
from methods import train  # noqa: E402
from resumable_jobs import Run, work  # noqa: E402
from tasks import TASKS, Task  # noqa: E402


class SmallTask(Task):
    def load_data(self, folder: Path) -> DatasetDict:
        rows = [
            {"prompt": f"the mill {i}\n", "completion": f"is a pub {i}", "references": [f"is a pub {i}"]}
            for i in range(160)
        ]
        parts = {"train": rows, "validation": rows[:6], "test": rows[6:16]}
        return DatasetDict({name: Dataset.from_list(part) for name, part in parts.items()})


SMALL = SmallTask(**{**vars(TASKS["e2e"]), "name": "small", "max_completion_length": 8, "seqkd_samples": 1})


@pytest.fixture
def benchmark(tmp_path, monkeypatch) -> frontier_run.Benchmark:
    """Two methods of the main table, two of the family and one ablation, with two updates each."""
    monkeypatch.setitem(TASKS, "small", SMALL)
    for name in ("sft", "single_step_cool", "tip_cool", "gkd_cool", "expected-0"):
        monkeypatch.setitem(frontier_methods.METHODS, name, replace(frontier_methods.METHODS[name], updates=2))
    for module in (frontier_run, frontier_summary):
        monkeypatch.setattr(module, "LEARNING_RATES", (1e-3, 1e-2))
        monkeypatch.setattr(module, "SEEDS", (3, 4))
        monkeypatch.setattr(module, "STARTS", ("teacher", "sft-3", "sft-4"))
    monkeypatch.setattr(frontier_run, "FIRST_RATES", slice(0, 1))
    folder = tmp_path / "runs"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    for seed, name in enumerate(frontier_run.STARTS):
        build_model("llama", len(tokenizer), seed).float().save_pretrained(folder / name / "model")
    return frontier_run.Benchmark("small", folder, tmp_path / "results")


@pytest.mark.slow
def test_jobs_end_in_a_table_and_are_not_repeated(benchmark, monkeypatch):
    methods = ["sft", "single_step_cool", "tip_cool", "gkd_cool", "expected-0"]
    list_jobs = partial(frontier_run.jobs, benchmark, methods)
    assert [name for name, _ in list_jobs()][:2] == ["sft-0.001-3", "single_step_cool-0.001-3"]
    work(list_jobs, benchmark.folder / "locks")
    assert not list(list_jobs())
    summary = frontier_summary.summarize(benchmark)
    assert list(summary["rows"]) == ["teacher", "sft_student", "sft", "single_step_cool", "gkd_cool", "tip_cool"]
    assert summary["prompts"] == 10
    assert list(summary["ablations"]) == ["expected-0"]
    record = benchmark.record("tip_cool-0.001-3")
    assert len(record["test"]["0.7"]["rouge_l"]) == 10
    assert json.dumps(record["test"]["1.0"]["reverse_kl"][0]) == f"{record['test']['1.0']['reverse_kl'][0]:.5g}"
    minus = summary["rows"]["tip_cool"]["minus"]["single_step_cool"]["rouge_l"]
    means = [summary["rows"][name]["decodings"]["1.0"]["rouge_l"][0] for name in ("tip_cool", "single_step_cool")]
    assert minus[0] == pytest.approx(means[0] - means[1])

    lines = frontier_summary.family_table(with_times(summary)).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:]] == [
        *("| SFT continued", "| OPD (single step alone)", "| GKD", "| TIP")
    ]


def with_times(summary: dict) -> dict:
    """The times are relative to MiniLLM, which this summary lacks."""
    return {"rows": {name: {**row, "cpu_time_over_minillm": 1.0} for name, row in summary["rows"].items()}}


@pytest.mark.parametrize("name", frontier_methods.FAMILY)
def test_every_method_of_the_family_trains(tmp_path, name):
    tokenizer = build_tokenizer()
    student, teacher = (build_model("llama", len(tokenizer), seed).float() for seed in (0, 1))
    before = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    method = replace(frontier_methods.FAMILY[name], updates=2)
    train(method, SMALL, tmp_path / "run", student, teacher, tokenizer, 1e-2, 0)
    after = torch.cat([parameter.detach().flatten() for parameter in student.parameters()])
    assert after.isfinite().all()
    assert not torch.equal(after, before)


def test_rates_follow_the_first_search_or_the_records(tmp_path):
    row = {"learning_rate": 1e-3, "validation_at_equal_entropy": {"0.0003": 60.0, "0.001": 61.0, "0.003": 60.5}}
    (tmp_path / "frontier_e2e_first.json").write_text(json.dumps({"results": {"rows": {"kd": row}}}))
    benchmark = frontier_run.Benchmark("e2e", tmp_path / "runs", tmp_path)
    assert frontier_run.best_rate(benchmark, "kd") == 1e-3
    assert frontier_run.best_rate(benchmark, "tip_cool") is None
    scores = {1e-3: 61.0, 3e-3: 60.5, 3e-4: 60.0}
    for rate, score in scores.items():
        run = Run("tip_cool", rate, 3)
        identity = frontier_run.identity(benchmark, run)
        benchmark.write(run.name, {"identity": identity, "at_equal_entropy": score, "validation": {}})
    assert frontier_run.scores_by_rate(benchmark, "tip_cool") == scores
    assert frontier_run.best_rate(benchmark, "tip_cool") == 1e-3
    benchmark.write(run.name, {"identity": {**identity, "method": {}}, "at_equal_entropy": 60.0, "validation": {}})
    assert frontier_run.rates_to_try("tip_cool", frontier_run.scores_by_rate(benchmark, "tip_cool")) == [3e-4]


@pytest.mark.parametrize("name", ["main", "differences"])
def test_tables_of_dolly_are_those_of_the_results(name):
    results = json.loads((FRONTIER.parent / "results" / "frontier_dolly.json").read_text())["results"]
    mark = "dolly" if name == "main" else "dolly differences"
    start, end = f"<!-- {mark}: made by a script -->\n", f"\n<!-- end of {mark} -->"
    table = getattr(frontier_summary, f"{name}_table")(results)
    assert frontier_summary.README.read_text().split(start)[1].split(end)[0] == table


@pytest.mark.parametrize("name", ["main", "diversity", "differences", "ablations", "family", "first"])
def test_tables_are_those_of_the_results(name):
    page = frontier_summary.FAMILY_PAGE if name == "family" else frontier_summary.README
    file = "frontier_e2e_first.json" if name == "first" else "frontier_e2e.json"
    results = json.loads((FRONTIER.parent / "results" / file).read_text())["results"]
    start, end = f"<!-- {name}: made by a script -->\n", f"\n<!-- end of {name} -->"
    table = getattr(frontier_summary, f"{'main' if name == 'first' else name}_table")(results)
    assert page.read_text().split(start)[1].split(end)[0] == table


def test_pages_say_what_a_gap_of_172_does():
    rows = json.loads((FRONTIER.parent / "results" / "frontier_e2e_w8.json").read_text())["results"]["rows"]
    page = " ".join(frontier_summary.FAMILY_PAGE.read_text().split())
    front = (FRONTIER.parents[1] / "README.md").read_text()
    low, skewed = (rows[name]["minus"]["sft"]["tuned_rouge_l"] for name in ("low_variance_cool", "distillm_cool"))
    fall = f"falls by {-low[0]:.1f} [{-low[2]:.1f}, {-low[1]:.1f}]"
    gain = "{:.1f} [{:.1f}, {:.1f}]".format(*skewed)
    assert fall in page
    assert fall in front
    assert f"{gain} Rouge-L at a ratio of 172" in page
    assert f"gains {gain}" in front
    reverse_kl = rows["low_variance_cool"]["minus"]["sft"]["equal_entropy_reverse_kl"][0]
    assert f"by {-reverse_kl:.1f} nats" in page
    assert f"shrink to {rows['low_variance_cool']['decodings']['1.0']['length'][0]:.0f} tokens" in page
    forward = [rows[name]["decodings"]["1.0"]["forward_kl"][0] for name in ("distillm_cool", "sft")]
    assert "a forward KL of {:.0f} nats at temperature 1, against {:.0f}".format(*forward) in page
    assert rows["distillm_cool"]["learning_rate"] == 0.03
    others = [row["minus"]["sft"]["tuned_rouge_l"][1] for name, row in rows.items() if "sft" in row.get("minus", {})]
    assert sum(lowest > 0 for lowest in others) == 1  # of DistiLLM: "every other method is level ... or behind"


def test_pages_say_that_fine_tuning_leads_on_dolly():
    rows = json.loads((FRONTIER.parent / "results" / "frontier_dolly.json").read_text())["results"]["rows"]
    page = " ".join(frontier_summary.README.read_text().split())
    leads = []
    for name in ("minillm", "low_variance_cool"):
        middle, low, high = rows[name]["minus"]["sft"]["tuned_rouge_l"]
        leads.append((f"{-middle:.1f}", f"[{-high:.1f}, {-low:.1f}]"))
    assert "by {} Rouge-L {} at the best decoding".format(*leads[0]) in page
    assert "leads on E2E by {} {}".format(*leads[1]) in page
    front = (FRONTIER.parents[1] / "README.md").read_text()
    assert "leads the setting that wins on E2E by {} Rouge-L {}".format(*leads[1]) in front
    assert "and the paper's MiniLLM by {} Rouge-L {}".format(*leads[0]) in front
    falls = [-rows[name]["minus"]["sft"]["reverse_kl"][0] for name in ("minillm", "low_variance_cool")]
    assert "by {:.0f} and {:.0f} nats".format(*falls) in page
    cool = [row["decodings"]["0.4"]["entropy_per_token"][0] for name, row in rows.items() if name != "teacher"]
    assert min(cool) > 0.6


def test_pages_say_what_a_gap_of_34_does():
    rows = json.loads((FRONTIER.parent / "results" / "frontier_e2e_w32.json").read_text())["results"]["rows"]
    gains = rows["low_variance_cool"]["minus"]["sft"]
    best, equal = ("{:.1f} [{:.1f}, {:.1f}]".format(*gains[key]) for key in ("tuned_rouge_l", "equal_entropy_rouge_l"))
    page = " ".join(frontier_summary.FAMILY_PAGE.read_text().split())
    assert f"{best} Rouge-L at the best decoding and {equal} at equal entropy" in page
    assert f"leads SFT continued by {best}" in (FRONTIER.parents[1] / "README.md").read_text()


def test_table_of_the_sizes_has_the_methods_that_several_sizes_have():
    results = json.loads((FRONTIER.parent / "results" / "frontier_e2e.json").read_text())["results"]
    small = {
        "teacher_over_student": 172.2,
        "rows": {name: results["rows"][name] for name in ("teacher", "sft", "tip_cool")},
    }
    lines = frontier_sizes.sizes_table({"e2e_w8": small, "e2e": results}).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [
        [f"| {gap}", label] for gap in (172, 14) for label in ("SFT continued", "TIP")
    ]
    minus = results["rows"]["tip_cool"]["minus"]["sft"]
    for row in (lines[3], lines[5]):
        for key in ("tuned_rouge_l", "equal_entropy_rouge_l", "equal_entropy_reverse_kl"):
            assert "{:+.1f} [{:+.1f}, {:+.1f}]".format(*minus[key]) in row
    # the page has a place for it
    assert "<!-- sizes: made by a script -->\n" in frontier_summary.FAMILY_PAGE.read_text()
