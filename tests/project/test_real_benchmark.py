"""The benchmark on real models, with a tiny teacher: stages, every method, both tables; finished runs stay."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from chat_models import save_small_smollm2, write_small_dolly

REAL = Path(__file__).parents[2] / "benchmarks" / "real"
sys.path.insert(0, str(REAL))

import real_methods  # noqa: E402 - lies in a folder that is no package
import real_run  # noqa: E402
import real_summary  # noqa: E402

SMALL = replace(
    real_methods.SCALES["cpu"],
    batch=2,
    answer_tokens=4,
    seconds=0,
    validation_rows=3,
    test_rows=10,
    recipe={
        "dolly": {"validation_rows": 10, "test_rows": 10},
        "answers": {"max_completion_length": 4},
        "heal": {"max_steps": 1},
    },
)


@pytest.fixture
def benchmark(tmp_path, monkeypatch) -> real_run.Benchmark:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(real_methods.SCALES, "small", SMALL)
    monkeypatch.setattr(real_run, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(real_summary, "RESULTS", tmp_path / "results")
    for module in (real_run, real_summary):
        monkeypatch.setattr(module, "LEARNING_RATES", (1e-3,))
        monkeypatch.setattr(module, "SEEDS", (3, 4))
    monkeypatch.setattr(real_run, "PROBE_UPDATES", 1)
    teacher = save_small_smollm2(tmp_path / "teacher")
    folder = tmp_path / "runs"
    folder.mkdir()
    return real_run.Benchmark(folder, "small", str(teacher), write_small_dolly(tmp_path, 40))


def work_all(benchmark: real_run.Benchmark, methods: list[str]) -> None:
    real_run.work(lambda: real_run.jobs(benchmark, methods), benchmark.folder / "locks")


@pytest.mark.slow
def test_whole_benchmark(benchmark, capsys):
    real_run.run_stages(benchmark)
    work_all(benchmark, list(real_methods.METHODS))
    assert not list(real_run.jobs(benchmark, list(real_methods.METHODS)))
    assert set(benchmark.record("heal")["healing"]) == {"seconds", "forward_kl"}
    summary = real_summary.summarize("small")
    assert list(summary["rows"]) == ["teacher", "heal", *real_methods.METHODS]
    assert summary["rows"]["minillm"]["seeds"] == [3, 4]
    assert summary["rows"]["minillm"]["updates"] == real_methods.METHODS["minillm"].multiple
    start, student = (summary["rows"][name]["decodings"]["1.0"] for name in ("heal", "minillm"))
    gain = summary["rows"]["minillm"]["minus"]["heal"]["reverse_kl_per_token"][0]
    assert gain == pytest.approx(student["reverse_kl_per_token"][0] - start["reverse_kl_per_token"][0])
    greedy = summary["rows"]["sft"]["decodings"]["greedy"]
    assert greedy["teacher_logp"][0] == pytest.approx(-greedy["reverse_kl_per_token"][0])
    for table in (real_summary.main_table(summary), real_summary.differences_table(summary)):
        assert "MiniLLM (the paper's)" in table
    records = real_summary.read_records("small")
    answers = real_summary.answers_table(records, next(iter(real_summary.chosen_runs(records, "minillm").values())))
    assert answers.count("\n") == 1 + real_run.ANSWERS
    real_summary.plot(summary, benchmark.folder / "figure.png")


def test_best_rate_is_that_of_the_validation_prompts(benchmark, monkeypatch):
    monkeypatch.setattr(real_run, "LEARNING_RATES", (1e-4, 3e-4))
    for rate, score in ((1e-4, 20.0), (3e-4, 30.0)):
        assert real_run.best_rate(benchmark, "sft") is None
        run = real_run.Run("sft", rate, 3)
        found = {decoding: {"rouge_l": [score, score + 2]} for decoding in ("1.0", "greedy")}
        benchmark.write(run.name, {"identity": real_run.identity(benchmark, run), "validation": found})
    assert real_run.best_rate(benchmark, "sft") == 3e-4


def test_record_of_other_settings_is_not_taken(benchmark, monkeypatch):
    run = real_run.Run("minillm", 1e-3, 3)
    benchmark.write(run.name, {"identity": real_run.identity(benchmark, run), "validation": {}})
    assert real_run.trained(benchmark, run)
    changed = replace(real_methods.METHODS["minillm"], options={"teacher_mixed_alpha": 0.5})
    monkeypatch.setitem(real_methods.METHODS, "minillm", changed)
    assert not real_run.trained(benchmark, run)


def test_entropies_are_those_that_all_runs_reach():
    def run(*entropies: float) -> dict:
        values = zip(real_summary.SAMPLED, entropies, strict=True)
        return {"test": {decoding: {"entropy_per_token": [value, value]} for decoding, value in values}}

    entropies = real_summary.shared_entropies([run(3.0, 2.0, 1.0), run(2.5, 1.5, 0.5)])
    assert np.allclose([entropies[0], entropies[-1]], [1.0, 2.5])


def test_failed_job_does_not_stop_the_others(benchmark, monkeypatch, capsys):
    done = []

    def jobs(benchmark, methods):
        yield from ((name, partial(run, name)) for name in ("a", "b") if name not in done)

    def run(name):
        if name == "a":
            raise RuntimeError("no memory")
        done.append(name)

    monkeypatch.setattr(real_run, "jobs", jobs)
    with pytest.raises(SystemExit, match="failed: a"):
        work_all(benchmark, [])
    assert done == ["b"]
    assert "no memory" in capsys.readouterr().err


def test_pages_say_what_was_measured():
    root = REAL.parents[1]
    results = root / "benchmarks" / "results"
    healing = json.loads((results / "real" / "cpu" / "heal.json").read_text())["healing"]
    minutes = {stage: round(seconds / 60) for stage, seconds in healing["seconds"].items()}
    page = " ".join((root / "recipes" / "smollm2-64m" / "README.md").read_text().split())
    assert f"the answers took {minutes['answers']} minutes and the healing {minutes['heal']}." in page
    first, last = healing["forward_kl"][0], healing["forward_kl"][-1]
    assert f"from {first:.1f} nats a token in the first ten updates to {last:.1f} in the last ten" in page
    rows = json.loads((results / "real_cpu.json").read_text())["results"]["rows"]
    minus = rows["minillm"]["minus"]
    mean, low, high = minus["heal"]["reverse_kl_per_token"]
    front = " ".join((root / "README.md").read_text().split())
    assert f"lowers the reverse KL by {-mean:.2f} nats a token [{-high:.2f}, {-low:.2f}]" in front
    mean, low, high = minus["distillation_cool"]["reverse_kl_per_token"]
    assert f"{-mean:.2f} [{-high:.2f}, {-low:.2f}] more than `DistillationTrainer`" in front
    mean, low, high = minus["sft"]["greedy_rouge_l"]
    assert f"SFT leads by {-mean:.1f} [{-high:.1f}, {-low:.1f}] with greedy decoding" in front
    assert f"({minutes['heal']} minutes of a CPU core)" in front
