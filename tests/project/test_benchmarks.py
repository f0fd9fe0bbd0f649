"""The table of the benchmarks is that of their results, and each result says where it comes from."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
# Records of single runs, from which a result of their task is made
FRONTIER_RUNS = sorted((BENCHMARKS / "results" / "frontier").rglob("*.json"))
RESULTS = sorted({*(BENCHMARKS / "results").rglob("*.json")} - {*FRONTIER_RUNS})
sys.path.insert(0, str(BENCHMARKS))

import degeneration  # noqa: E402 - lies in benchmarks/, which is no package
import demo_seeds  # noqa: E402
import measurement  # noqa: E402
import report  # noqa: E402


def test_tables_are_those_of_the_results():
    text = (BENCHMARKS / "README.md").read_text()
    for name, expected in report.tables().items():
        start, end = report.marks(name)
        assert text.split(start)[1].split(end)[0] == expected


def test_table_of_the_demo_is_that_of_the_results():
    result = json.loads(demo_seeds.RESULTS.read_text())
    assert demo_seeds.markdown_table(result) in (BENCHMARKS / "README.md").read_text()
    for seed in result["seeds"].values():  # what the text below the table says
        for gain in seed["minillm_minus"].values():
            assert gain["rouge_l"]["low"] > 0
            assert gain["reverse_kl"]["high"] < 0


def test_table_of_the_degeneration_page_is_that_of_the_results():
    results = json.loads((BENCHMARKS / "results" / "degeneration.json").read_text())["results"]
    assert degeneration.markdown_table(results) in (BENCHMARKS.parent / "docs" / "degeneration.md").read_text()


def test_page_on_reliable_runs_says_what_was_counted():
    results = json.loads((BENCHMARKS / "results" / "killed_runs.json").read_text())["results"]
    text = " ".join((BENCHMARKS.parent / "docs" / "reliable_runs.md").read_text().split())
    assert f" {sum(result['kills'] for result in results)} kills " in text
    lost = [result.get("weights", 0) + result.get("logs_that_differ", 0) for result in results]
    assert {*lost, *(result.get("answers_that_differ", 0) for result in results)} == {0}


def test_page_on_speed_says_what_compiled_steps_measured():
    results = json.loads((BENCHMARKS / "results" / "compiled_steps.json").read_text())["results"]
    text = " ".join((BENCHMARKS.parent / "docs" / "memory_and_speed.md").read_text().split())
    share = results["calls"]["compiled_share"]
    assert share >= 0.99
    small, small_mixed, large, large_mixed = (row["speedup"][1] for row in results["speed"])
    assert f"{100 * share:.1f} % of the calls after the prompts ran compiled" in text
    assert f"a rollout takes {1 / small:.2f} of the time without mixing and {1 / small_mixed:.2f} with" in text
    assert 0.9 < large < 1.15  # "gains nothing"
    assert large_mixed < 0.8  # "loses"
    assert all(row["equal_completions"] == 16 for row in results["speed"])


def test_page_on_the_method_says_how_variance_falls():
    rows = json.loads((BENCHMARKS / "results" / "term_variance.json").read_text())["results"]["rows"]
    text = " ".join((BENCHMARKS.parent / "docs" / "method.md").read_text().split())
    plain, normalised = (
        100 * rows[group]["both"]["long_term_variance"][0] / rows[group]["sampled rewards"]["long_term_variance"][0]
        for group in ("not normalised", "length-normalised")
    )
    assert f"falls to {plain:.0f} % with both, and with length normalisation to {normalised:.0f} %" in text
    rest = rows["not normalised"]["both"]
    times = rest["long_term_variance"][0] / rest["single_step_variance"][0]
    assert f"still is {times:.0f} times that of the single step" in text
    for name, row in rows["not normalised"].items():  # "only with a baseline"
        signal, error = row["long_term_signal"]
        assert (signal > 3 * error) == (name in ("baseline", "both"))


def test_auto_is_never_slower_than_shared_coins_by_more_than_5_percent():
    rows = json.loads((BENCHMARKS / "results" / "speculative_small.json").read_text())["results"]
    assert max(row["auto_over_shared_coins"][1] for row in rows) <= 1.05
    chosen = [row["speedup_over_shared_coins"][1] for row in rows if row["auto"] == "speculative"]
    text = " ".join((BENCHMARKS / "README.md").read_text().split())
    assert f"and the most is {max(chosen):.2f}x" in text
    own = [row["speedup_over_own_coins"][1] for row in rows if row["batch_size"] == 8]
    assert f"{min(own):.1f} to {max(own):.1f} times as fast as coins of each row at batch 8" in text


def test_page_on_speed_says_what_merged_adapters_save():
    results = json.loads((BENCHMARKS / "results" / "merged_rollouts.json").read_text())["results"]
    text = (BENCHMARKS.parent / "docs" / "memory_and_speed.md").read_text()
    assert f"samples {results['speedup'][1]:.2f}x as fast, merging included" in text


def test_page_on_speed_says_what_slots_save():
    results = json.loads((BENCHMARKS / "results" / "slots_small.json").read_text())["results"]
    text = " ".join((BENCHMARKS.parent / "docs" / "memory_and_speed.md").read_text().split())
    few, many = (row for row in results if row["alpha"] == 0)
    assert (few["slots"], many["slots"]) == (8, 32)
    assert (
        f"with a median of {few['lengths']['median']}, 8 slots take {few['passes']['refilled']} forward passes" in text
    )
    assert f"where batches take {few['passes']['batches']:,}, and 32 slots" in text
    assert f"take {many['passes']['refilled']} where batches take {many['passes']['batches']}." in text
    assert f"sample {few['speedup'][1]:.2f}x and {many['speedup'][1]:.2f}x as fast" in text


def test_page_on_speed_says_what_overlap_gains_and_costs():
    results = json.loads((BENCHMARKS / "results" / "overlap.json").read_text())["results"]
    text = " ".join((BENCHMARKS.parent / "docs" / "memory_and_speed.md").read_text().split())
    assert results["cores"][1] > 1.75  # otherwise the speed-ups say nothing
    assert f"an iteration of two passes is {results['speedup_over_two_threads'][1]:.2f}x as fast as in turn" in text
    assert f"it is {results['speedup'][1]:.2f}x as fast as in turn on one core" in text
    assert f"at most {results['bound'][1]:.2f}x" in text

    def mean(way: str, measure: str, *passes: int) -> float:
        rows = [row[way] for row in results["reverse_kl"] if row["passes"] in passes]
        return sum(row[measure] for row in rows) / len(rows)

    after = [mean(way, "after", passes) for passes in (1, 4) for way in ("in turn", "overlapped")]
    assert f"from {mean('in turn', 'before', 1, 4):.1f} nats" in text
    assert (
        f"is {after[0]:.1f} in turn and {after[1]:.1f} overlapped with one pass, {after[2]:.1f} and {after[3]:.1f}"
        in text
    )
    drift = [mean(way, "clip_ratio/drift", 4) for way in ("in turn", "overlapped")]
    assert f"`clip_ratio/drift` rises from {drift[0]:.2f} to {drift[1]:.2f}" in text


def test_memory_estimate_is_near_what_training_took_on_a_gpu():
    found = list(report.memory_errors())
    assert len(found) == 12
    for case, phase, measured, estimated in found:
        assert 0.9 < estimated / measured < 1.15, f"{case}, {phase}"


def test_command_of_a_record_is_the_one_given_without_its_paths(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/home/me/benchmarks/a.py", "--student", "/home/me/b", "--teacher=/home/me/c", "--repeats", "3"]
    )
    expected = "python benchmarks/a.py --student PATH --teacher=PATH --repeats 3"
    assert measurement.given_command(("student", "teacher", "prompts")) == expected
    monkeypatch.setattr(sys, "argv", ["benchmarks/a.py", "--student", "b"])
    assert measurement.given_command(()) == "python benchmarks/a.py --student b"


@pytest.mark.parametrize(
    ("name", "option", "rounds"),
    [("overlap", "rounds", None), ("iteration_real", "repeats", 2), ("rollouts_real", "repeats", 2)],
)
def test_command_of_a_record_has_the_number_of_its_rounds(name: str, option: str, rounds: int | None):
    record = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    words = record["command"].split()
    given = int(words[words.index(f"--{option}") + 1]) if f"--{option}" in words else rounds
    settings = record["settings"]
    assert given == (settings["rounds"] if "rounds" in settings else len(settings["seeds"]))


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_result_names_its_command_commit_machine_and_versions(path: Path):
    record = json.loads(path.read_text())
    script = record["command"].split()[1]
    assert (BENCHMARKS.parent / script).exists()
    assert not any(Path(word).is_absolute() for word in record["command"].split())
    assert len(record["commit"]) == 40
    assert record["machine"]
    runs = record.get("seeds", {}).values()  # of the demo, each with an environment of its own
    found = [record[name] for name in ("versions",) if name in record] + [run["environment"] for run in runs]
    assert found
    # torch, but for what tokenizers do alone
    assert all(versions.get("torch") or versions.get("tokenizers") for versions in found)


def test_records_of_the_frontier_name_their_run_and_commit():
    assert FRONTIER_RUNS
    for path in FRONTIER_RUNS:
        record = json.loads(path.read_text())
        assert record["validation"], path
        if path.stem.startswith(("teacher", "sft-")):  # models from which the runs start
            continue
        run = record["identity"]["run"]
        assert path.stem == f"{run['method']}-{run['learning_rate']}-{run['seed']}"
        assert record["identity"]["task"]["name"] == path.parent.name
        assert len(record["commit"]) == 40


def test_aim_is_reached_on_the_right_side():
    faster = report.Measured("a", "b", "c", [1.0, 2.0, 3.0], aim=2.0)
    assert faster.reached
    assert not report.Measured("a", "b", "c", [1.0, 1.9, 3.0], aim=2.0).reached
    smaller = report.Measured("a", "b", "c", [0.11], aim=0.125, at_least=False, unit="%")
    assert smaller.reached
    assert not report.Measured("a", "b", "c", [0.13], aim=0.125, at_least=False).reached
    assert "| 2.00x (1.00x to 3.00x) | at least 2.00x | yes |" in faster.row("results")
    assert "| 11 % | at most 12 % | yes |" in smaller.row("results")
