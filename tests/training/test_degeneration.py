"""What the rules flag and what not, in made-up series and in those of real runs, and what the watch does about it."""

import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import ClassVar

import pytest
from test_trainer import make_config, make_trainer
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainerCallback, TrainerControl, TrainerState

from minillm_trl import DegenerationWatch, MiniLLMTrainer
from minillm_trl.monitoring.degeneration import (
    EVALUATION,
    RULES,
    TRAINING,
    UNKNOWN,
    Diagnosis,
    Rollouts,
    diagnose,
    judge,
)
from minillm_trl.monitoring.degeneration_watch import keep_healthy

HEALTHY = {
    "completions/mean_terminated_length": 30.0,
    "completions/mean_length": 30.0,
    "rollout/eos_rate": 1.0,
    "rollout/repeated_4grams": 0.01,
    "entropy": 1.5,
    "importance_weight/effective_sample_size": 0.95,
    "objective/reverse_kl_per_token": 0.5,
    "rouge_l": 40.0,
}
# Each is well past the limit of its rule
DEGENERATE = dict(zip(HEALTHY, (15.0, 60.0, 0.5, 0.3, 0.3, 0.1, 1.5, 20.0), strict=True))
RESULTS = json.loads((Path(__file__).parents[2] / "benchmarks" / "results" / "degeneration.json").read_text())


def history_of(**series: list[float]) -> list[dict[str, float]]:
    """A log at each step 10, 20, ... with one value of every series; None leaves it out."""
    rows = zip(*series.values(), strict=True)
    return [{"step": 10 * i} | dict(zip(series, row, strict=True)) for i, row in enumerate(rows, start=1)]


def flagged(history: list[dict[str, float]], rollouts: Rollouts = UNKNOWN) -> dict[str, int]:
    """The step at which each kind is found first."""
    steps: dict[str, int] = {}
    for end in range(1, len(history) + 1):
        for found in diagnose(history[:end], rollouts=rollouts).found:
            steps.setdefault(found.kind, history[end - 1]["step"])
    return steps


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.metric)
class TestRule:
    def test_lasting_change_is_found_at_its_fourth_log(self, rule):
        good, bad = HEALTHY[rule.metric], DEGENERATE[rule.metric]
        assert flagged(history_of(**{rule.metric: [good] * 10 + [bad] * 5})) == {rule.kind: 140}

    def test_two_outliers_in_a_row_are_not_found(self, rule):
        good, bad = HEALTHY[rule.metric], DEGENERATE[rule.metric]
        series = ([good] * 5 + [bad] * 2) * 6
        assert flagged(history_of(**{rule.metric: series})) == {}

    def test_slow_drift_is_found_once_past_the_limit(self, rule):
        good, bad = HEALTHY[rule.metric], DEGENERATE[rule.metric]
        series = [good + (bad - good) * i / 60 for i in range(60)]
        limit = rule.limit(series[0])
        crossing = next(i for i, value in enumerate(series) if rule.is_beyond(value, limit))
        assert flagged(history_of(**{rule.metric: series})) == {rule.kind: 10 * (crossing + 4)}

    def test_half_of_the_way_is_not_found(self, rule):
        good = HEALTHY[rule.metric]
        near = (good + rule.limit(good)) / 2
        assert flagged(history_of(**{rule.metric: [good] * 5 + [near] * 20})) == {}

    def test_evaluation_counts_from_the_second_in_a_row(self, rule):
        good, bad = HEALTHY[rule.metric], DEGENERATE[rule.metric]
        for name in ("eval_", "eval_dolly_"):
            assert flagged(history_of(**{name + rule.metric: [good, bad, good, bad, bad]})) == {rule.kind: 50}


def test_a_change_within_the_noise_is_not_found():
    (rule,) = (rule for rule in RULES if rule.metric == "entropy")
    quiet = [1.0] * 6 + [0.4] * 6
    assert judge(quiet, rule).is_beyond
    noisy = [1.0, 2.0, 1.0, 0.2, 1.9, 0.1, 0.4, 1.5, 0.3, 0.4, 0.1, 1.4, 0.4]
    assert rule.is_beyond(judge(noisy, rule).value, judge(noisy, rule).limit)
    assert not judge(noisy, rule).is_beyond


def test_well_until_is_the_value_in_the_middle_of_the_last_good_median():
    (rule,) = (rule for rule in RULES if rule.metric == "entropy")
    # median 1.0 up to index 11: the window 7..11 has three good values; its middle is 9
    assert judge([1.0] * 10 + [0.1] * 6, rule, TRAINING).well_until == 9
    assert judge([1.0] * 10 + [0.6] * 6, rule, TRAINING).well_until == 9  # the limit is 0.5, half way to it 0.75
    assert judge([1.0, 1.0, 0.1], rule, EVALUATION).well_until == 1
    assert judge([0.1, 0.1], rule, EVALUATION).is_well  # a baseline of its own


def test_limits_of_a_healthy_run():
    found = {rule.metric: rule.limit(HEALTHY[rule.metric]) for rule in RULES}
    assert found == pytest.approx(dict(zip(HEALTHY, (21.0, 45.0, 0.8, 0.065, 0.75, 0.3, 0.85, 36.0), strict=True)))


def test_series_is_well_by_its_last_median_alone():
    (rule,) = (rule for rule in RULES if rule.metric == "entropy")
    verdict = judge([1.0] * 10 + [0.6] * 6, rule)  # between half of the way, 0.75, and the limit, 0.5
    assert (verdict.is_well, verdict.is_beyond) == (False, False)
    assert judge([1.0] * 10 + [0.6] * 6 + [0.9] * 6, rule).is_well


def test_value_beyond_a_fixed_limit_is_not_well_however_bad_the_baseline_is():
    (rule,) = (rule for rule in RULES if rule.metric.endswith("effective_sample_size"))
    verdict = judge([0.2] + [0.27] * 9, rule)  # the limit is 0.3, half way to it 0.25
    assert verdict.is_beyond
    assert verdict.well_until == -1
    assert judge([0.2] + [0.35] * 9, rule).well_until == 7


def test_metrics_of_other_names_are_no_entropy():
    assert flagged(history_of(**{"eval_objective/lm_cross_entropy": [2.0] * 5 + [0.1] * 9})) == {}


class TestLengths:
    def test_a_student_that_learns_to_end_has_not_collapsed(self):
        history = history_of(
            **{
                "completions/mean_length": [54.0] * 5 + [28.0] * 9,
                "completions/mean_terminated_length": [28.0] * 14,
                "rollout/eos_rate": [0.5] * 5 + [1.0] * 9,
            }
        )
        assert flagged(history) == {}

    def test_no_completion_that_ends_is_no_short_one(self):
        history = history_of(
            **{
                "completions/mean_terminated_length": [28.0] * 5 + [0.0] * 9,
                "rollout/eos_rate": [1.0] * 5 + [0.0] * 9,
            }
        )
        assert flagged(history) == {"length_inflation": 90}

    LENGTHS = [60.0] * 5 + [30.0] * 15  # beyond the limit from step 60 on

    def run(self, rouge_l: list[float | None]) -> dict[str, int]:
        return flagged(history_of(**{"completions/mean_terminated_length": self.LENGTHS, "eval_rouge_l": rouge_l}))

    def test_shortening_is_spared_while_rouge_l_holds(self):
        assert self.run(([40.0] + [None] * 4 + [42.0] + [None] * 4 + [41.0]) + [None] * 9) == {}

    def test_shortening_is_found_when_rouge_l_falls(self):
        assert self.run([40.0] + [None] * 9 + [35.0] + [None] * 9) == {
            "length_collapse": 110
        }  # though not by a tenth in two evaluations

    def test_shortening_is_found_without_rouge_l(self):
        assert self.run([None] * 20) == {"length_collapse": 90}

    def test_where_no_evaluation_follows_none_is_waited_for(self):
        rouge_l = [40.0] + [None] * 19
        history = history_of(**{"completions/mean_terminated_length": self.LENGTHS, "eval_rouge_l": rouge_l})
        assert diagnose(history, is_evaluated=True).found == []
        (found,) = diagnose(history, is_evaluated=False).found
        assert found == ("length_collapse", "completions/mean_terminated_length", 30.0, 60.0, 42.0)


class TestStart:
    """What a run is compared with: the first rollout, before any update."""

    COLLAPSE: ClassVar = {  # 16 completions of at most 64 tokens at rate 1e-4, a rollout every 3 updates
        "rollout/eos_rate": [0.81, 0.06, 0.0],
        "completions/mean_length": [40.0, 62.0, 64.0],
    }

    def test_student_that_stops_ending_at_once_is_found_at_the_third_log(self):
        found = diagnose(history_of(**self.COLLAPSE), rollouts=Rollouts(completions=16, updates=3)).found
        assert found == [("length_inflation", "rollout/eos_rate", 0.06, 0.81, pytest.approx(0.61))]

    @pytest.mark.parametrize("completions", [None, 2, 4])
    def test_few_completions_are_no_evidence(self, completions: int | None):
        assert flagged(history_of(**self.COLLAPSE), Rollouts(completions)) == {}

    @pytest.mark.parametrize("shares", [[1.0, 0.75, 0.7], [0.8, 0.1, 0.7], [0.3, 0.0, 0.2], [0.0, 0.0, 0.0]])
    def test_smaller_changes_are_not_found_as_early(self, shares: list[float]):
        assert flagged(history_of(**{"rollout/eos_rate": shares}), Rollouts(16)) == {}

    @pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.metric)
    def test_collapse_right_after_the_first_value_is_found(self, rule):
        good, bad = HEALTHY[rule.metric], DEGENERATE[rule.metric]
        assert flagged(history_of(**{rule.metric: [good] + [bad] * 7})) == {rule.kind: 60}

    def test_first_value_of_fewer_tokens_counts_as_noisier(self):
        (rule,) = (rule for rule in RULES if rule.metric == "entropy")
        values = [1.3, 0.5, 0.7, 0.55, 0.65, 0.6, 0.5, 0.6, 0.55]
        assert judge(values, rule).is_beyond
        assert not judge(values, rule, baseline_variance=40.0).is_beyond
        steps = [1, *range(40, 321, 40)]
        history = [{"step": step, "entropy": value} for step, value in zip(steps, values, strict=True)]
        assert flagged(history) == {}  # a log of 40 updates against one
        history[0]["step"] = 40
        assert flagged(history) == {"entropy_collapse": 240}


class TestReverseKL:
    def test_is_judged_per_token(self):
        history = history_of(
            **{
                "objective/reverse_kl": [110.0, 115.0, 120.0, 125.0, 130.0, 133.0, 170.0, 200.0],
                "objective/reverse_kl_per_token": [2.78, 2.5, 2.2, 2.0, 1.8, 1.49, 1.5, 1.5],
            }
        )
        assert flagged(history) == {}

    def test_rise_is_found(self):
        values = [0.4, 0.45, 0.9, 1.6, 2.2, 2.9, 3.4, 3.3]
        assert flagged(history_of(**{"objective/reverse_kl_per_token": values})) == {"rising_kl": 80}


class TestRealRuns:
    """Logged by `benchmarks/degeneration.py`."""

    @pytest.mark.parametrize("name", RESULTS["results"]["healthy"])
    def test_healthy_run_is_not_flagged(self, name: str):
        run = RESULTS["results"]["healthy"][name]
        assert flagged(run["history"], Rollouts(**run["rollouts"])) == {}

    @pytest.mark.parametrize("name", RESULTS["results"]["degenerate"])
    def test_degenerate_run_is_flagged_by_its_kind(self, name: str):
        run = RESULTS["results"]["degenerate"][name]
        found = flagged(run["history"], Rollouts(**run["rollouts"]))
        assert found == run["found"]
        assert run["expected"] in found


class Scripted(MiniLLMTrainer):
    """Logs a made-up entropy at each step, and nothing else of the student."""

    entropy = [1.0] * 8 + [0.1] * 8

    def log(self, logs, start_time=None):
        self.means.take(self.mode)
        self._metrics["train"].clear()
        if "loss" in logs:
            self._metrics["train"]["entropy"] = [self.entropy[self.state.global_step - 1]]
        super().log(logs, start_time)


class Report(TrainerCallback):
    """What a callback that reports to somewhere is given."""

    def __init__(self):
        self.seen: list[int] = []

    def on_log(self, args, state, control, logs, **kwargs):
        if "degeneration/entropy_collapse" in logs:
            self.seen.append(state.global_step)


def train(folder: Path, monkeypatch, resume: Path | None = None, stop: bool = False, **options) -> Scripted:
    report = Report()
    with_callbacks = partial(Scripted, callbacks=[report, DegenerationWatch(stop=stop)])
    monkeypatch.setattr("test_trainer.MiniLLMTrainer", with_callbacks)
    settings = {"max_steps": 14, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1} | options
    trainer = make_trainer(folder, **settings)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    trainer.report = report
    return trainer


def flags(trainer: Scripted) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if "degeneration/entropy_collapse" in entry]


class TestWatch:
    def test_it_warns_once_logs_each_time_and_keeps_the_last_healthy_checkpoint(self, tmp_path, monkeypatch, caplog):
        with caplog.at_level(logging.WARNING, logger="minillm_trl.monitoring.degeneration_watch"):
            trainer = train(tmp_path, monkeypatch)
        assert trainer.state.global_step == 14
        assert flags(trainer) == trainer.report.seen == [12, 13, 14]
        # besides the first log, which names the untrained student as far from its teacher
        (message,) = (
            record.message
            for record in caplog.records
            if record.name == "minillm_trl.monitoring.degeneration_watch" and "(entropy_collapse)" in record.message
        )
        # medians of five values are good up to step 10, so step 8 is known to be
        healthy = tmp_path / "healthy" / "checkpoint-8"
        assert "step 12: the student's distribution collapses (entropy_collapse): entropy is 0.1, below" in message
        assert "at the start it was 1" in message
        assert "lower learning_rate" in message
        assert "learning_rate=0.01" in message
        assert f"--resume_from_checkpoint {healthy}" in message
        assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-14"]
        assert [path.name for path in (tmp_path / "healthy").iterdir()] == ["checkpoint-8"]

        resumed = train(tmp_path, monkeypatch, resume=healthy)
        assert flags(resumed) == [12, 13, 14]

    def test_it_stops_and_says_why(self, tmp_path, monkeypatch, caplog):
        trainer = train(tmp_path, monkeypatch, stop=True)
        assert trainer.state.global_step == 12
        (watch,) = (
            callback for callback in trainer.callback_handler.callbacks if isinstance(callback, DegenerationWatch)
        )
        assert [found.kind for found in watch.stopped_for] == ["entropy_collapse"]
        assert caplog.text.count("Training stops here.") == 1
        resumed = train(tmp_path, monkeypatch, resume=tmp_path / "checkpoint-12", stop=True)
        assert resumed.state.global_step == 12
        assert caplog.text.count("Training stops here.") == 2

    def test_a_killed_and_resumed_run_warns_as_one_that_was_not(self, tmp_path, monkeypatch):
        train(tmp_path, monkeypatch, max_steps=11)
        trainer = train(tmp_path, monkeypatch, resume=tmp_path / "checkpoint-11")
        assert flags(trainer) == [12, 13, 14]
        assert [path.name for path in (tmp_path / "healthy").iterdir()] == ["checkpoint-8"]

    def test_all_checkpoints_stay_without_a_limit_and_none_is_kept_twice(self, tmp_path, monkeypatch, caplog):
        train(tmp_path, monkeypatch, save_total_limit=None)
        assert f"--resume_from_checkpoint {tmp_path / 'checkpoint-8'}" in caplog.text
        assert not (tmp_path / "healthy").exists()

    @pytest.mark.parametrize(("first", "number"), [(0.05, 1), (0.1, 0)])
    def test_a_student_that_never_ends_is_told_of_at_the_first_log_alone(self, tmp_path, caplog, first, number):
        args, watch = make_config(tmp_path), DegenerationWatch()
        history = [{"step": 0, "eval_loss": 1.0}]
        for share in (first, 0.0, 0.0):
            history.append({"step": len(history), "rollout/eos_rate": share})
            watch.on_log(args, TrainerState(log_history=list(history)), TrainerControl(), logs={})
        assert caplog.text.count("of the first completions end with EOS") == number
        assert ("Only 5%" in caplog.text) == (number == 1)

    def test_first_step_is_logged_whatever_the_interval(self, tmp_path, monkeypatch):
        trainer = train(tmp_path, monkeypatch, max_steps=4, logging_steps=3)
        assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [1, 3]
        silent = train(tmp_path / "silent", monkeypatch, max_steps=2, logging_strategy="no")
        assert [entry for entry in silent.state.log_history if "loss" in entry] == []

    @pytest.mark.parametrize(
        ("entropy", "kl", "number"),
        [
            pytest.param(5.0, 2.6, 1, id="cut of SmolLM2, short SFT"),
            pytest.param(4.67, 8.08, 1, id="cut of SmolLM2"),
            pytest.param(4.31, 6.76, 1, id="the same after an update"),
            pytest.param(7.08, 3.89, 1, id="after 40 updates of SFT"),
            pytest.param(6.54, 3.58, 1, id="after 80 updates of SFT"),
            pytest.param(2.57, 0.0, 0, id="SmolLM2 itself"),
            pytest.param(1.0, 4.4, 1, id="sure of its nonsense"),
            pytest.param(3.0, 2.8, 0, id="sure"),
            pytest.param(5.0, 0.3, 0, id="as the teacher"),
        ],
    )
    def test_barely_healed_student_is_told_of_at_the_first_log_alone(
        self, tmp_path, caplog, entropy: float, kl: float, number: int
    ):
        args, watch = make_config(tmp_path), DegenerationWatch()
        model = GPT2LMHeadModel(GPT2Config(vocab_size=49152, n_embd=2, n_layer=1, n_head=1))
        history = []
        for _ in range(3):
            history.append({"step": len(history) + 1, "rollout/eos_rate": 0.8, "entropy": entropy})
            history[-1]["objective/reverse_kl_per_token"] = kl
            watch.on_log(args, TrainerState(log_history=list(history)), TrainerControl(), logs={}, model=model)
        assert caplog.text.count("close to noise") == number
        if number:
            share = entropy / math.log(49152)
            assert f"entropy is {entropy:.2f} nats per token, {share:.0%} of" in caplog.text
            assert "minillm-trl sft" in caplog.text

    def test_checkpoints_of_another_run_are_not_named(self, tmp_path, monkeypatch, caplog):
        train(tmp_path, monkeypatch, save_total_limit=None, max_steps=8, seed=1)
        train(tmp_path, monkeypatch, save_strategy="no")
        assert "There is no checkpoint from before this began" in caplog.text


def test_a_checkpoint_saved_under_suspicion_is_not_kept_and_a_kept_one_is_linked(tmp_path):
    checkpoint = tmp_path / "checkpoint-3"
    checkpoint.mkdir()
    (checkpoint / "trainer_state.json").write_text('{"log_history": []}')
    kept = tmp_path / "healthy" / "checkpoint-3" / "trainer_state.json"
    keep_healthy(tmp_path, [], Diagnosis(found=[], is_well=False, well_until=0))
    assert not kept.exists()
    keep_healthy(tmp_path, [], Diagnosis(found=[], is_well=True, well_until=0))
    assert kept.samefile(checkpoint / "trainer_state.json")
