"""The demo with a handful of updates: it continues where it was stopped, and its report is complete."""

import html.parser
import json
from dataclasses import replace
from pathlib import Path

import pytest

import minillm_trl.demo.training
from minillm_trl.cli import main
from minillm_trl.demo import DemoSettings, run_demo
from minillm_trl.demo.pipeline import MODELS
from minillm_trl.demo.progress import StageProgress
from minillm_trl.demo.settings import Shape

TINY = DemoSettings(
    teacher=Shape(32, 1, 2),
    student=Shape(16, 1, 2),
    sft_batch_size=8,
    teacher_steps=10,
    student_steps=10,
    minillm_steps=8,
    minillm_batch_size=4,
    steps_per_generation=2,
    num_iterations=2,
    eval_steps=4,
    max_completion_length=8,
    sampling_seeds=(1, 2),
)


def run_until(folder: Path, stage: str, update: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that Ctrl-C stops at an update of a stage, after a checkpoint."""

    class Stopping(StageProgress):
        def on_step_end(self, args, state, control, **kwargs):
            super().on_step_end(args, state, control, **kwargs)
            if self.title == stage and state.global_step == update:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(minillm_trl.demo.training, "StageProgress", Stopping)
        with pytest.raises(KeyboardInterrupt):
            run_demo(folder, TINY)


class Started(StageProgress):
    """Records the update at which each stage's training began."""

    first: dict[str, int]

    def on_train_begin(self, args, state, control, **kwargs):
        super().on_train_begin(args, state, control, **kwargs)
        Started.first[self.title] = state.global_step


@pytest.mark.parametrize(
    ("words", "folder", "settings"),
    [
        ([], "runs/demo", DemoSettings().quick()),
        (["--quick"], "runs/demo", DemoSettings().quick()),
        (["--full"], "runs/demo-full", DemoSettings()),
        (["--full", "--output_dir", "here", "--seed", "3"], "here", DemoSettings(seed=3)),
    ],
)
def test_run_is_the_short_one_unless_the_full_one_is_wanted(monkeypatch, words, folder, settings):
    runs = []
    monkeypatch.setattr("minillm_trl.demo.run_demo", lambda *arguments: runs.append(arguments))
    assert main(["demo", *words]) == 0
    assert runs == [(Path(folder), settings)]


def test_short_run_trains_a_quarter_of_the_full_one_and_has_a_curve():
    full, quick = DemoSettings(), DemoSettings().quick()
    for name in ("teacher_steps", "student_steps", "minillm_steps"):
        assert 0.2 <= getattr(quick, name) / getattr(full, name) < 0.31
    assert quick.minillm_steps // quick.eval_steps >= 6


@pytest.mark.slow
def test_interrupted_run_continues_from_its_checkpoint_and_ends_with_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    run_until(tmp_path, "student", 7, monkeypatch)
    assert (tmp_path / "teacher" / "stage.json").is_file()
    assert not (tmp_path / "sft" / "stage.json").exists()
    with pytest.raises(ValueError, match=r"holds a run with seed=0; now it is 1\."):
        run_demo(tmp_path, replace(TINY, seed=1))
    run_until(tmp_path, "MiniLLM", 6, monkeypatch)
    (tmp_path / "minillm" / "checkpoints" / "checkpoint-6").mkdir()  # as a kill in the middle of saving leaves it
    Started.first = {}
    monkeypatch.setattr(minillm_trl.demo.training, "StageProgress", Started)
    run_demo(tmp_path, TINY)
    assert Started.first == {"MiniLLM": 4, "control": 0}  # nothing before was trained again

    output = capsys.readouterr().out
    for name in ("Teacher", "SFT student", "SFT continued (control)", "MiniLLM student"):
        assert name in output
    page = (tmp_path / "report.html").read_text()
    assert "--full" in page
    html.parser.HTMLParser().feed(page)
    assert page.count("<svg") == 6
    assert page.count("<article") == 10
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.count("figures/") == len(list((tmp_path / "figures").glob("*.png"))) == 6
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["stages"].keys() == set(MODELS)
    assert run["stages"]["minillm"]["seconds"] > 0
    steps = [entry["step"] for entry in run["stages"]["minillm"]["history"]]
    assert steps == [0, 4, 8]
    for name in MODELS:
        evaluation = json.loads((tmp_path / "evaluation" / f"{name}.json").read_text())
        assert len(evaluation["per_prompt"]) == 205

    Started.first = {}
    run_demo(tmp_path, TINY)
    assert Started.first == {}  # a finished run has nothing left to train
