"""Runs that are stopped, damaged or fed with numbers that are not finite: what is saved, skipped and said."""

import itertools
import json
import logging
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ENVIRONMENT, build_model, build_tokenizer, run_module
from datasets import Dataset
from killing import STEPS, make_inputs
from test_distributed import needs_deepspeed
from test_trainer import DATASET, make_trainer, weights
from transformers import EarlyStoppingCallback, TrainerCallback

from minillm_trl import MiniLLMTrainer
from minillm_trl.baselines import FineTuningConfig, FineTuningTrainer, KDConfig, KDTrainer
from minillm_trl.cli.launch import accelerate_config_path
from minillm_trl.cli.training import checkpoint_to_resume
from minillm_trl.training.checkpoints import CheckpointError, find_damage, finish_replacements, newest_whole_checkpoint
from minillm_trl.training.interruption import Terminated
from minillm_trl.training.nonfinite_rows import explain_empty_step

needs_float16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    reason="DeepSpeed trains in float16 on CPUs with AVX512-FP16 alone",
)
SAVED = {"save_strategy": "steps", "save_steps": 2, "max_steps": 8, "num_iterations": 2, "logging_steps": 3}
EVALUATED = {
    "eval_dataset": DATASET.select(range(4)),
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "eval_rouge_l",
}
KILLED_RUNS = Path(__file__).parents[1] / "tools" / "killing.py"


class AtStep(TrainerCallback):
    """Calls a function when an optimizer step begins."""

    def __init__(self, step: int, function):
        self.step, self.function = step, function

    def on_step_begin(self, args, state, control, **unused):
        if state.global_step == self.step:
            self.function()


def make_fine_tuning(tmp_path, kind: type = FineTuningTrainer, **options) -> FineTuningTrainer:
    rows = {"prompt": DATASET["prompt"][:16], "completion": [f" {i} cheap pubs" for i in range(16)]}
    settings = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "per_device_train_batch_size": 2}
    settings |= {"save_strategy": "no", "gradient_checkpointing": False}
    return kind(
        model=build_model("llama"),
        args=(KDConfig if kind is KDTrainer else FineTuningConfig)(str(tmp_path), **(settings | options)),
        train_dataset=Dataset.from_dict(rows),
        processing_class=build_tokenizer(),
        **({"teacher_model": build_model("llama", seed=1)} if kind is KDTrainer else {}),
    )


def history(trainer) -> list[dict]:
    """What was logged, but for what the clock decides."""
    return [
        {
            key: value
            for key, value in log.items()
            if not key.endswith(("runtime", "per_second", "step_time", "seconds"))
        }
        for log in trainer.state.log_history
    ]


def assert_same_run(one, other) -> None:
    assert torch.equal(weights(one), weights(other))
    assert history(one) == history(other)


class TestKilled:
    """The whole harness runs by `python tests/tools/killing.py`; here some kills of each kind of run."""

    @pytest.mark.cli
    def test_teacher_gives_the_answers_that_it_would_have_given(self, tmp_path):
        words = ["--command", "seqkd", "--kills", "6", "--options", "generate_only=true"]
        command = [sys.executable, str(KILLED_RUNS), "--work", str(tmp_path / "work"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["kills"] == 6
        assert found["answers_that_differ"] == 0

    @pytest.mark.cli
    @pytest.mark.parametrize(
        "words",
        [
            ["--command", "minillm", "--kills", "6", "--options", "use_peft=true", "lora_target_modules=all-linear"],
            ["--command", "kd", "--kills", "4"],
            pytest.param(["--command", "minillm", "--kills", "3", "--processes", "2"], marks=pytest.mark.distributed),
        ],
        ids=["lora", "kd", "two processes"],
    )
    def test_run_ends_with_the_weights_and_logs_of_one_that_was_left_alone(self, tmp_path, words: list[str]):
        command = [sys.executable, str(KILLED_RUNS), "--work", str(tmp_path / "work"), *words]
        done = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["kills"] == int(words[3])
        assert found["weights"] == 0.0
        assert found["logs_that_differ"] == 0
        assert found["logs"] > 5


class TestDeadProcess:
    @pytest.mark.cli
    @pytest.mark.distributed
    def test_of_two_ends_the_launch_and_the_same_command_goes_on(self, tmp_path):
        work = make_inputs(tmp_path / "work")
        output = tmp_path / "run"
        command = [
            *(sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch"),
            *("--config_file", str(accelerate_config_path("cpu")), "--num_processes", "2", "-m", "minillm_trl"),
            *("minillm", "--config", str(work / "minillm.yaml"), "--output_dir", str(output)),
        ]
        launch = subprocess.Popen(
            command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        while not (output / "checkpoint-8").is_dir() and launch.poll() is None:
            time.sleep(0.01)
        workers = Path(f"/proc/{launch.pid}/task/{launch.pid}/children").read_text().split()
        os.kill(int(workers[-1]), signal.SIGKILL)
        said, _ = launch.communicate(timeout=120)  # the other process does not wait for ever
        assert launch.returncode != 0, said[-2000:]
        again = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
        assert again.returncode == 0, again.stderr[-3000:]
        state = json.loads((Path(newest_whole_checkpoint(output)) / "trainer_state.json").read_text())
        assert state["global_step"] == STEPS
        assert [log["step"] for log in state["log_history"] if "loss" in log] == [1, *range(3, STEPS, 3)]


class TestResume:
    @pytest.mark.parametrize("step", [2, 4, 6])
    def test_within_a_buffer_and_within_a_logging_interval(self, tmp_path, step: int):
        whole = make_trainer(tmp_path, **SAVED)
        whole.train()
        resumed = make_trainer(tmp_path, **SAVED)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)

    @pytest.mark.parametrize("step", [2, 6])
    def test_of_a_stream_that_is_shorter_than_the_run(self, tmp_path, step: int):
        def stream():
            return DATASET.select(range(14)).select_columns(["prompt"]).to_iterable_dataset()

        whole = make_trainer(tmp_path, dataset=stream(), **SAVED)
        whole.train()
        resumed = make_trainer(tmp_path, dataset=stream(), **SAVED)
        resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
        assert_same_run(resumed, whole)

    def test_stream_without_a_row_is_refused(self, tmp_path):
        empty = DATASET.select(range(8)).to_iterable_dataset().filter(lambda row: False)
        with pytest.raises(ValueError, match="train_dataset is missing or empty"):
            make_trainer(tmp_path, dataset=empty)

    def test_buffer_is_in_the_checkpoint_only_where_it_is_not_used_up(self, tmp_path):
        make_trainer(tmp_path, **SAVED).train()
        states = {
            step: torch.load(tmp_path / f"checkpoint-{step}" / "run_state_0-of-1.pt", weights_only=True)
            for step in (2, 4)
        }
        assert states[4]["rollouts"] is None
        assert len(states[2]["rollouts"]) == 2
        assert states[2]["rollouts"][0]["teacher_hidden_states"].shape[0] == 4

    def test_checkpoint_without_the_state_of_this_process_resumes_and_says_so(self, tmp_path, caplog):
        """As one of another program, or of another number of processes."""
        make_trainer(tmp_path, **{**SAVED, "max_steps": 2}).train()
        for name in ("run_state_0-of-1.pt", "files.json"):
            (tmp_path / "checkpoint-2" / name).unlink()
        resumed = make_trainer(tmp_path, **{**SAVED, "max_steps": 4})
        with caplog.at_level(logging.WARNING):
            resumed.train(resume_from_checkpoint=True)
        assert "has no run_state_0-of-1.pt" in caplog.text
        assert resumed.state.global_step == 4

    def test_teacher_states_that_are_computed_anew_are_not_saved(self, tmp_path):
        options = {**SAVED, "teacher_hidden_states": "recompute"}
        whole = make_trainer(tmp_path, **options)
        whole.train()
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same_run(resumed, whole)
        state = torch.load(tmp_path / "checkpoint-2" / "run_state_0-of-1.pt", weights_only=True)
        assert "teacher_hidden_states" not in state["rollouts"][0]

    def test_in_a_later_epoch_with_dropout_and_logged_completions(self, tmp_path):
        options = {**SAVED, "dataset": DATASET.select(range(9)), "disable_dropout": False, "log_completions": True}
        runs = []
        for name in ("whole", "resumed"):
            student = build_model("gpt2")
            student.config.resid_pdrop = 0.5
            for module in student.modules():
                if isinstance(module, torch.nn.Dropout):
                    module.p = 0.5
            trainer = make_trainer(tmp_path, student=student, **options)
            trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6") if name == "resumed" else None)
            runs.append((trainer, (tmp_path / "completions" / "completions_00008.parquet")))
        assert runs[0][0].state.epoch > 1.5
        assert_same_run(runs[0][0], runs[1][0])

    def test_true_starts_where_nothing_is_saved_and_goes_on_where_something_is(self, tmp_path):
        whole = make_trainer(tmp_path / "a", **SAVED)
        whole.train(resume_from_checkpoint=True)
        make_trainer(tmp_path / "b", **{**SAVED, "max_steps": 4, "lr_scheduler_type": "constant"}).train()
        resumed = make_trainer(tmp_path / "b", **SAVED)
        resumed.train(resume_from_checkpoint=True)
        assert torch.equal(weights(resumed), weights(whole))

    def test_run_that_had_ended_does_not_train_on(self, tmp_path):
        whole = make_trainer(tmp_path, **SAVED)
        whole.train()
        again = make_trainer(tmp_path, **SAVED)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 8
        assert torch.equal(weights(again), weights(whole))

    def test_run_that_stopped_early_stays_stopped_unless_its_patience_is_raised(self, tmp_path):
        def train(patience: int, checkpoint=None):
            trainer = make_trainer(tmp_path, **{**SAVED, **EVALUATED, "max_steps": 10, "learning_rate": 1e-9})
            trainer.add_callback(EarlyStoppingCallback(patience))
            trainer.train(resume_from_checkpoint=checkpoint)
            return trainer

        stopped = train(2)
        assert stopped.state.global_step == 6  # the same Rouge-L three times
        assert train(2, True).state.global_step == 6
        assert train(9, True).state.global_step == 10

    def test_second_run_samples_from_the_first_step_on_as_one_of_its_own(self, tmp_path):
        """Neither the first one's buffer, whose rollouts are of other weights, nor what it had not logged is left."""
        options = {"max_steps": 5, "steps_per_generation": 3, "logging_steps": 3, "optim": "sgd"}  # Adam has a state
        trainer, other = (make_trainer(tmp_path, **options) for _ in range(2))
        trainer.train()
        trainer.guard.skipped = trainer.counts.left_out = 2
        other.model.load_state_dict(trainer.model.state_dict())
        for second_run in (trainer, other):
            second_run.train()
        assert_same_run(trainer, other)

    def test_evaluation_before_the_first_step_is_not_repeated(self, tmp_path):
        options = {**SAVED, **EVALUATED, "eval_on_start": True}
        whole = make_trainer(tmp_path, **options)
        whole.train()
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert_same_run(resumed, whole)
        assert resumed.args.eval_on_start

    def test_other_batches_drop_the_buffer_and_say_so(self, tmp_path, caplog):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 2}).train()
        resumed = make_trainer(tmp_path, **{**SAVED, "per_device_train_batch_size": 2})
        with caplog.at_level(logging.WARNING):
            resumed.train(resume_from_checkpoint=True)
        assert "were made with per_device_train_batch_size=4" in caplog.text
        assert resumed.state.global_step == 8

    @pytest.mark.parametrize("grouped", [False, True])
    def test_fine_tuning(self, tmp_path, grouped: bool):
        rows = DATASET.select(range(12)).map(lambda row: {"completion": row["references"][0]})
        runs = []
        for checkpoint in (None, str(tmp_path / "checkpoint-5")):
            args = FineTuningConfig(
                str(tmp_path),
                use_cpu=True,
                bf16=False,
                report_to="none",
                disable_tqdm=True,
                per_device_train_batch_size=2,
                gradient_accumulation_steps=2,
                max_steps=8,
                save_steps=5,
                logging_steps=3,
                train_sampling_strategy="group_by_length" if grouped else "random",
            )
            trainer = FineTuningTrainer(
                model=build_model("llama"),
                args=args,
                train_dataset=rows.select_columns(["prompt", "completion"]),
                processing_class=make_trainer(tmp_path).processing_class,
            )
            trainer.train(resume_from_checkpoint=checkpoint)
            runs.append(trainer)
        assert_same_run(*runs)


class TestCheckpoints:
    def damage(self, path: Path, how: str) -> None:
        content = bytearray(path.read_bytes())
        if how == "torn":
            path.write_bytes(content[: len(content) // 2])
        elif how == "missing":
            path.unlink()
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)

    @pytest.mark.parametrize("how", ["torn", "missing", "one bit"])
    @pytest.mark.parametrize(
        "name", ["model.safetensors", "optimizer.pt", "run_state_0-of-1.pt", "trainer_state.json"]
    )
    def test_damaged_one_is_passed_over_for_the_one_before(self, tmp_path, caplog, name: str, how: str):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 4}).train()
        self.damage(tmp_path / "checkpoint-4" / name, how)
        with caplog.at_level(logging.WARNING):
            assert newest_whole_checkpoint(tmp_path, checksums=True) == str(tmp_path / "checkpoint-2")
        assert "checkpoint-4 is damaged: " in caplog.text

    def test_run_resumed_from_the_one_before_ends_the_same(self, tmp_path, caplog):
        whole = make_trainer(tmp_path, **SAVED)
        whole.train()
        self.damage(tmp_path / "checkpoint-8" / "optimizer.pt", "one bit")
        resumed = make_trainer(tmp_path, **SAVED)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)
        assert find_damage(tmp_path / "checkpoint-8") is None

    def test_damaged_one_that_is_asked_for_is_refused_with_a_whole_one(self, tmp_path):
        make_trainer(tmp_path, **{**SAVED, "max_steps": 4}).train()
        self.damage(tmp_path / "checkpoint-4" / "model.safetensors", "torn")
        message = "model.safetensors has .* bytes instead of .*Resume from .*checkpoint-2"
        with pytest.raises(CheckpointError, match=message):
            make_trainer(tmp_path, **SAVED).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))

    def crash_between_renames(self, tmp_path, monkeypatch):
        """Take a run back to step 4, and end it while it replaces its checkpoint of step 6. Return the whole run."""
        options = {**SAVED, "max_steps": 6}
        whole = make_trainer(tmp_path, **options)
        whole.train()
        rename = os.rename

        def crash(source, target):
            if Path(source).parent.name == "unfinished":
                raise KeyboardInterrupt
            rename(source, target)

        again = make_trainer(tmp_path, **options)
        with monkeypatch.context() as patched:
            patched.setattr(os, "rename", crash)
            with pytest.raises(KeyboardInterrupt):
                again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
        assert not (tmp_path / "checkpoint-6").exists()
        return whole, options

    @pytest.mark.parametrize("asked", [True, "checkpoint-6", "checkpoint-4", None])
    def test_crash_while_one_is_replaced_loses_neither(self, tmp_path, monkeypatch, caplog, asked):
        whole, options = self.crash_between_renames(tmp_path, monkeypatch)
        again = make_trainer(tmp_path, **options)
        with monkeypatch.context() as patched:  # what is there before the first step
            patched.setattr(again, "_inner_training_loop", lambda *args, **kwargs: None)
            again.train(resume_from_checkpoint=str(tmp_path / asked) if isinstance(asked, str) else asked)
        assert find_damage(tmp_path / "checkpoint-6") is None
        assert "checkpoint-6 was being replaced when the run ended" in caplog.text
        resumed = make_trainer(tmp_path, **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)
        assert "The run has already ended at step 6" in caplog.text

    @pytest.mark.parametrize("how", ["torn", "missing", "one bit"])
    def test_crash_that_leaves_the_new_one_damaged_keeps_the_old_one(self, tmp_path, monkeypatch, how: str):
        self.crash_between_renames(tmp_path, monkeypatch)
        unfinished = tmp_path / "unfinished"
        old = (unfinished / "checkpoint-6.replaced" / "files.json").stat().st_ino
        self.damage(unfinished / "checkpoint-6" / "model.safetensors", how)
        finish_replacements(tmp_path)
        finish_replacements(tmp_path)
        assert find_damage(tmp_path / "checkpoint-6") is None
        assert (tmp_path / "checkpoint-6" / "files.json").stat().st_ino == old

    @pytest.mark.parametrize("asked", ["true", "false", "checkpoint-6"])
    def test_command_line_finishes_the_replacement_too(self, tmp_path, monkeypatch, asked: str):
        self.crash_between_renames(tmp_path, monkeypatch)
        shutil.rmtree(tmp_path / "checkpoint-2")
        shutil.rmtree(tmp_path / "checkpoint-4")
        if asked == "false":
            with pytest.raises(ValueError, match=r"holds a run that reached .*checkpoint-6"):
                checkpoint_to_resume(asked, str(tmp_path))
        elif asked == "true":
            assert checkpoint_to_resume(asked, str(tmp_path)) is True
        else:
            assert checkpoint_to_resume(str(tmp_path / asked), str(tmp_path / "other")) == str(tmp_path / asked)
        assert find_damage(tmp_path / "checkpoint-6") is None

    def test_name_comes_when_all_is_written(self, tmp_path):
        seen = []
        trainer = make_trainer(tmp_path, **{**SAVED, "max_steps": 2})
        save = trainer._save_rng_state
        trainer._save_rng_state = lambda folder: (seen.append((folder, os.listdir(tmp_path))), save(folder))
        trainer.train()
        ((folder, names),) = seen
        assert Path(folder) == tmp_path / "unfinished" / "checkpoint-2"
        assert "checkpoint-2" not in names
        assert (tmp_path / "checkpoint-2" / "files.json").is_file()
        assert not (tmp_path / "unfinished").exists()

    def test_limit_keeps_the_best_and_its_path_holds(self, tmp_path):
        options = {**SAVED, **EVALUATED, "max_steps": 10, "save_total_limit": 1, "learning_rate": 1e-9}
        make_trainer(tmp_path / "run", **options).train()
        assert sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*")) == ["checkpoint-2"]
        best = str(tmp_path / "run" / "checkpoint-2")
        assert json.loads((Path(best) / "trainer_state.json").read_text())["best_model_checkpoint"] == best

    def test_best_one_is_found_in_a_folder_that_was_moved(self, tmp_path):
        options = {**SAVED, **EVALUATED, "save_total_limit": 2, "learning_rate": 1e-9}
        make_trainer(tmp_path / "run", **{**options, "max_steps": 4}).train()
        shutil.move(tmp_path / "run", tmp_path / "moved")
        resumed = make_trainer(tmp_path / "moved", **options)
        resumed.train(resume_from_checkpoint=True)
        assert resumed.state.best_model_checkpoint == str(tmp_path / "moved" / "checkpoint-2")


class TestDisk:
    def run_with_limit(self, trainer, limit: int) -> None:
        """Let the system refuse to write beyond a size, as it does on a disk that is full."""
        old = resource.getrlimit(resource.RLIMIT_FSIZE)
        ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        trainer.add_callback(AtStep(3, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))))
        try:
            trainer.train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, old)
            signal.signal(signal.SIGXFSZ, ignored)

    @pytest.mark.parametrize("limit", [20_000, 150_000], ids=["within the weights", "within the optimizer's state"])
    def test_that_takes_no_more_ends_the_run_with_the_last_checkpoint_whole(self, tmp_path, limit: int):
        whole = make_trainer(tmp_path / "whole", **SAVED)
        whole.train()
        with pytest.raises(CheckpointError, match=r"checkpoint-4 could not be written: .*checkpoint-2, is whole"):
            self.run_with_limit(make_trainer(tmp_path / "run", **SAVED), limit)
        assert [path.name for path in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-2"]
        assert not (tmp_path / "run" / "unfinished").exists()
        resumed = make_trainer(tmp_path / "run", **SAVED)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)

    def test_that_is_small_is_said(self, tmp_path):
        """A real file system of 500 KiB, where this user may mount one."""
        mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=500k", "none", str(tmp_path)], capture_output=True)
        if mount.returncode:
            pytest.skip("only root mounts a file system")
        try:
            with pytest.raises(CheckpointError, match=r"No space left on device|could not be written"):
                make_trainer(tmp_path, **SAVED).train()
            trainer = make_trainer(tmp_path, **SAVED)
            subprocess.run(["mount", "-o", "remount,ro", str(tmp_path)], check=True)
            with pytest.raises(CheckpointError, match=r"output_dir=.* is not writable .*Choose another folder"):
                trainer.train()
        finally:
            subprocess.run(["umount", "-l", str(tmp_path)], check=True)

    def test_output_folder_that_cannot_be_is_refused_before_training(self, tmp_path):
        (tmp_path / "file").write_text("")
        trainer = make_trainer(tmp_path, **SAVED)
        trainer.args.output_dir = str(tmp_path / "file" / "run")
        with pytest.raises(CheckpointError, match="output_dir="):
            trainer.train()
        assert trainer.state.global_step == 0


class TestSigterm:
    @pytest.mark.parametrize("step", [2, 3, 5])
    def test_saves_ends_with_143_and_the_run_goes_on(self, tmp_path, step: int):
        options = {**SAVED, **EVALUATED, "save_steps": 4, "eval_steps": 4, "num_train_epochs": 5}
        whole = make_trainer(tmp_path / "whole", **options)
        whole.train()
        stopped = make_trainer(tmp_path / "run", **options)
        stopped.add_callback(AtStep(step, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Terminated) as ended:
            stopped.train()
        assert ended.value.code == 143
        assert ended.value.checkpoint == str(tmp_path / "run" / f"checkpoint-{step + 1}")
        assert find_damage(Path(ended.value.checkpoint)) is None
        assert signal.getsignal(signal.SIGTERM) is before
        resumed = make_trainer(tmp_path / "run", **options)
        resumed.train(resume_from_checkpoint=True)
        assert_same_run(resumed, whole)

    def test_saves_where_an_evaluation_at_the_same_step_wants_no_checkpoint(self, tmp_path):
        """With `save_strategy="best"`, an evaluation that is not the best one withdraws the checkpoint."""
        options = {**SAVED, **EVALUATED, "save_strategy": "best", "learning_rate": 1e-9}  # none beats the first one
        trainer = make_trainer(tmp_path, **options)
        trainer.add_callback(AtStep(3, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        with pytest.raises(Terminated) as ended:
            trainer.train()
        assert ended.value.checkpoint == str(tmp_path / "checkpoint-4")
        assert find_damage(tmp_path / "checkpoint-4") is None


class TestNotFinite:
    def watched(self, tmp_path, **options):
        """A trainer that notes its weights after each optimizer step."""
        trainer = make_trainer(tmp_path, **{"max_steps": 6, "steps_per_generation": 2, **options})
        seen = [weights(trainer)]

        class Note(TrainerCallback):
            def on_step_end(self, args, state, control, **unused):
                seen.append(weights(trainer))

        trainer.add_callback(Note())
        return trainer, seen

    def moved(self, seen: list[torch.Tensor]) -> list[bool]:
        return [not torch.equal(one, other) for one, other in itertools.pairwise(seen)]

    def break_row(self, trainer, step: int, value: float = torch.nan, rows: tuple[int, ...] = (1,)) -> list[str]:
        """Let the teacher's log-prob of a token be `value` in rows of the rollout of a step; returns their prompts."""
        score, faulty = trainer.scoring.of_rollout, []

        def broken(model, batch, sampled):
            scores = score(model, batch, sampled)
            if trainer.state.global_step == step and trainer.model.training:
                for row in rows:
                    scores.teacher_kd_logps[row, 3] = value
                    faulty.append(trainer._tokenizer.decode(batch["prompt_ids"][row], skip_special_tokens=True))
            return scores

        trainer.scoring.of_rollout = broken
        return faulty

    @pytest.mark.parametrize("value", [torch.nan, -torch.inf])
    def test_log_prob_of_one_completion_leaves_it_out_and_names_its_prompt(self, tmp_path, caplog, value: float):
        trainer, seen = self.watched(tmp_path, whiten_advantages="tokens", per_device_train_batch_size=2)
        faulty = self.break_row(trainer, 2, value)
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert all(self.moved(seen))
        assert seen[-1].isfinite().all()
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert [log["nonfinite_completions"] for log in logs] == [0, 0, 1, 1, 1, 1]
        assert logs[-1]["nonfinite_steps"] == 0
        assert all(math.isfinite(value) for log in trainer.state.log_history for value in log.values())
        index = DATASET["prompt"][:].index(faulty[0])
        named = "probability zero" if value == -torch.inf else "the teacher's log-prob is nan"
        assert f"Prompt {index} {faulty[0]!r}: the teacher" in caplog.text
        assert named in caplog.text
        assert "1 of 4 completions are left out of the update" in caplog.text

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"loss_reduction": "sequence_sum"},
            {"whiten_advantages": "tokens"},
            {"whiten_advantages": "padding"},
            {"teacher_hidden_states": "recompute"},
        ],
        ids=str,
    )
    def test_step_without_a_row_is_that_of_the_other_rows(self, tmp_path, options: dict):
        """Loss and gradient of a step of four rows, of which one is left out, against those of three rows alone."""
        trainer = make_trainer(
            tmp_path, steps_per_generation=1, max_steps=1, optim="sgd", max_grad_norm=0.0, learning_rate=1.0, **options
        )
        self.break_row(trainer, 0)
        batches, before = [], weights(trainer)
        compute = trainer._compute_loss
        trainer._compute_loss = lambda model, batch: batches.append(batch) or compute(model, batch)
        trainer.train()
        (batch,) = batches
        kept = (~batch["faulty"]).nonzero().squeeze(1)
        assert len(kept) == 3
        names = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_per_token_logps")
        rows = {name: batch[name][kept] for name in names}
        alone = make_trainer(tmp_path, steps_per_generation=1, max_grad_norm=0.0, **options)
        alone.model.train()
        # mixed sampling has another behavior policy where tokens are the teacher's than where scores are anew
        loss = alone.compute_loss(alone.model, alone.score_rollouts(*rows.values()))
        loss.backward()
        gradient = torch.cat([parameter.grad.flatten() for parameter in alone.model.parameters()])
        torch.testing.assert_close(before - weights(trainer), gradient, rtol=1e-3, atol=1e-6)
        assert trainer.state.log_history[0]["loss"] == pytest.approx(loss.item(), abs=1e-5)

    @pytest.mark.parametrize("cut", [(4, 1), (2, 2), (1, 4)], ids=str)
    def test_cut_into_micro_batches_does_not_matter_where_rows_are_left_out(self, tmp_path, cut: tuple[int, int]):
        """Also where a micro-batch has no row left, and rows of which even the forward pass is not finite."""
        found = []
        for size, accumulation in ((4, 1), cut):
            trainer = make_trainer(
                tmp_path,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
                steps_per_generation=accumulation,
                max_steps=2,
                optim="sgd",
            )
            self.break_row(trainer, 1, rows=(0, 2))
            trainer.train()
            found.append((weights(trainer), history(trainer)))
        torch.testing.assert_close(found[0][0], found[1][0], rtol=1e-4, atol=1e-6)
        for one, other in zip(found[0][1], found[1][1], strict=True):
            assert {name: one[name] for name in one if "/" in name and "completions" not in name} == pytest.approx(
                {name: other[name] for name in one if "/" in name and "completions" not in name}, rel=1e-4, abs=1e-6
            )

    def test_row_whose_forward_pass_is_not_finite_does_not_reach_the_gradient(self, tmp_path, caplog):
        """A student that has NaN for a token of one prompt: even a loss of 0 would have a gradient of NaN."""
        prompts = [*DATASET["prompt"][:3], "Z"]
        student = build_model("llama")
        row = make_trainer(tmp_path)._tokenizer("Z")["input_ids"][0]
        with torch.no_grad():
            student.model.embed_tokens.weight[row] = torch.nan
        options = {"student": student, "family": "llama", "dataset": Dataset.from_dict({"prompt": prompts})}
        trainer = make_trainer(tmp_path, max_steps=2, steps_per_generation=1, **options)
        head = trainer.model.lm_head.weight.detach().clone()
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert "Prompt 3 'Z': the student's log-prob is nan" in caplog.text
        assert not torch.equal(trainer.model.lm_head.weight, head)
        bad = {name: (~parameter.isfinite()).sum().item() for name, parameter in trainer.model.named_parameters()}
        assert {name: count for name, count in bad.items() if count} == {"model.embed_tokens.weight": 32}
        assert 1 <= trainer.state.log_history[0]["nonfinite_completions"] < 4  # the token may be sampled too

    def test_batch_of_given_rollouts_whose_loss_is_not_finite_names_its_rows(self, tmp_path):
        trainer = make_trainer(tmp_path)
        ids = torch.tensor([[5, 6, 7]] * 2)
        batch = trainer.score_rollouts(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
        trainer.model.train()
        trainer.compute_loss(trainer.model, batch)
        assert trainer.guard.faults == []
        batch["old_per_token_logps"][1, 2] = -torch.inf
        assert trainer.compute_loss(trainer.model, batch).isnan()
        assert trainer.guard.faults == ["the loss is not finite for the rows [1] of the batch"]
        trainer.guard.faults.clear()
        with torch.no_grad():
            next(trainer.model.parameters()).fill_(torch.nan)
        trainer.compute_loss(trainer.model, batch)
        assert trainer.guard.faults == ["the loss is not finite for the rows [0, 1] of the batch"]

    def test_fault_breaks_the_loss_of_a_training_step_and_no_evaluation(self, tmp_path):
        trainer = make_trainer(tmp_path)
        ids = torch.tensor([[5, 6, 7]] * 2)
        batch = trainer.score_rollouts(ids, torch.ones_like(ids), ids, torch.ones_like(ids))
        trainer.guard.faults.append("another micro-batch has a fault")
        for training in (True, False):
            trainer.model.train(training)
            assert trainer.compute_loss(trainer.model, batch).isnan() == training

    @pytest.mark.parametrize(("tokens", "number"), [(0, 1), (1, 0)])
    def test_step_with_a_single_token_left_is_not_empty(self, tokens: int, number: int):
        batch = {"faulty": torch.tensor([True, False]), "window_tokens": torch.tensor(tokens)}
        assert len(explain_empty_step(batch)) == number

    def test_step_that_has_lost_all_its_rows_is_skipped_as_if_the_optimizer_had_not_been_called(self, tmp_path):
        trainer, seen = self.watched(tmp_path, steps_per_generation=1, weight_decay=0.1)
        self.break_row(trainer, 3, rows=(0, 1, 2, 3))
        trainer.train()
        assert self.moved(seen) == [True, True, True, False, True, True]
        assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 5
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert (logs[-1]["nonfinite_steps"], logs[-1]["nonfinite_completions"]) == (1, 4)
        finite = [value for log in logs for name, value in log.items() if name != "grad_norm"]
        assert all(map(math.isfinite, finite))

    def test_counts_go_on_in_a_resumed_run(self, tmp_path):
        trainer = make_trainer(tmp_path, **SAVED)
        self.break_row(trainer, 0)
        trainer.train()
        resumed = make_trainer(tmp_path, **SAVED)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same_run(resumed, trainer)
        assert resumed.state.log_history[-2]["nonfinite_completions"] == 1

    @pytest.mark.parametrize("kind", [MiniLLMTrainer, FineTuningTrainer, KDTrainer])
    @pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
    def test_loss_that_is_not_finite_keeps_the_loss_scale(
        self, tmp_path, monkeypatch: pytest.MonkeyPatch, kind: type, max_grad_norm: float
    ):
        options = {"max_steps": 6, "max_grad_norm": max_grad_norm, "logging_steps": 1}
        trainer, seen = make_trainer(tmp_path, **options), []
        if kind is not MiniLLMTrainer:
            trainer = make_fine_tuning(tmp_path, kind, **options)

        def broken(module, inputs, output):
            """NaN in what the head gives, in the forward passes of two steps."""
            if trainer.model.training and trainer.state.global_step in (1, 2):
                output.mul_(torch.nan)

        trainer.model.get_decoder().register_forward_hook(lambda m, i, output: broken(m, i, output.last_hidden_state))

        class Note(TrainerCallback):
            def on_step_end(self, args, state, control, **unused):
                seen.append((trainer.accelerator.scaler.get_scale(), weights(trainer)))

        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)
        trainer.add_callback(Note())
        trainer.train()
        assert [scale for scale, _ in seen] == [2.0**10] * 5 + [2.0**11]  # four steps were taken by then
        assert self.moved([weights for _, weights in seen]) == [False, False, True, True, True]
        assert trainer.optimizer.state[next(trainer.model.parameters())]["step"] == 4
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert logs[-1]["nonfinite_steps"] == 2
        assert all(math.isfinite(value) for log in logs for name, value in log.items() if name != "grad_norm")

    def test_skipped_step_leaves_the_others_as_they_are(self, tmp_path):
        """A step whose gradient is not finite is as if the optimizer had not been called."""
        trainer, seen = self.watched(tmp_path)
        parameter = next(trainer.model.parameters())

        def spoil(gradient):
            return gradient * torch.nan if trainer.state.global_step == 3 else gradient

        parameter.register_hook(spoil)
        trainer.train()
        assert self.moved(seen) == [True, True, True, False, True, True]
        assert trainer.optimizer.state[parameter]["step"] == 5

    @pytest.mark.cli
    @pytest.mark.distributed
    @pytest.mark.parametrize(
        ("config", "precision"),
        [
            ("ddp_bf16", "no"),
            pytest.param("zero2_bf16", "bf16", marks=needs_deepspeed),
            pytest.param("v100_zero2_fp16", "fp16", marks=[needs_deepspeed, needs_float16]),
            pytest.param("v100_zero3_fp16", "no", marks=needs_deepspeed),
        ],
    )
    def test_on_one_process_of_two_leaves_out_the_row_or_skips_the_step_on_both(
        self, tmp_path, config: str, precision: str
    ):
        script = Path(__file__).parents[1].joinpath("nonfinite_run.py")
        launch = ("accelerate.commands.launch", "--config_file", accelerate_config_path(config), "--num_processes", 2)
        options = json.dumps({name: True for name in ("bf16", "fp16") if name == precision})
        done = run_module(*launch, "--mixed_precision", precision, script, tmp_path, options)
        assert done.returncode == 0, done.stderr[-3000:]
        facts = [json.loads((tmp_path / f"facts-{rank}.json").read_text()) for rank in range(2)]
        assert facts[0]["moved"] == [True, True, False, False, True]
        assert [(fact["left_out"], fact["skipped"]) for fact in facts] == [(1, 2)] * 2
        assert len(set(facts[0]["scales"])) == 1  # DeepSpeed lowers its scale at the second overflow
        assert facts[0]["overflows"] in (None, 0)
        if "zero3" not in config:  # whose weights are gathered on the first process
            assert facts[0] == facts[1]
        assert "1 of 8 completions are left out of the update" in done.stderr
        assert "Optimizer step 2 is skipped: the loss is nan for the prompts [" in done.stderr

    def test_teacher_that_is_nan_everywhere_ends_the_run_with_a_diagnosis(self, tmp_path, caplog):
        trainer, seen = self.watched(tmp_path, max_nonfinite_steps=3)
        with torch.no_grad():
            next(trainer.teacher_model.parameters()).fill_(torch.nan)
        with pytest.raises(FloatingPointError, match=r"3 optimizer steps in a row .*prompts \[.*Check the teacher"):
            trainer.train()
        assert not any(self.moved(seen))
        assert caplog.text.count("the teacher's log-prob is nan at token") == 2 * 4  # two rollouts, of each the first
        assert "4 more completions have NaN or infinite" in caplog.text

    @pytest.mark.parametrize("scale_rewards", ["group", "batch"])
    @pytest.mark.parametrize("num_generations", [1, 2])
    def test_reward_that_is_not_finite_leaves_its_completion_out(
        self, tmp_path, caplog, num_generations: int, scale_rewards: str
    ):
        def endless(completions, **unused):
            return [float("inf") if i == 3 else float(i) for i in range(len(completions))]

        trainer, seen = self.watched(
            tmp_path,
            reward_funcs=endless,
            max_steps=2,
            num_generations=num_generations,
            scale_rewards=scale_rewards,
        )
        with caplog.at_level(logging.WARNING):
            trainer.train()
        assert self.moved(seen) == [True, True]
        assert seen[-1].isfinite().all()
        assert "reward function endless returned inf" in caplog.text
        logs = [log for log in trainer.state.log_history if "loss" in log]
        assert logs[-1]["nonfinite_completions"] == 1
        assert all(math.isfinite(value) for log in logs for value in log.values())
        mean = 25 / 7 if num_generations == 1 else 27 / 8  # the third of a group of two stands for the other
        assert logs[0]["rewards/endless/mean"] == pytest.approx(mean)

    def test_faults_apart_do_not_end_the_run(self, tmp_path):
        trainer, _ = self.watched(tmp_path, max_nonfinite_steps=2, max_steps=8, steps_per_generation=1)
        of_teacher = trainer.advantages.of_teacher

        def broken(*args):
            advantages, explained = of_teacher(*args)
            return advantages + (torch.nan if trainer.state.global_step % 2 else 0.0), explained

        trainer.advantages.of_teacher = broken
        trainer.train()
        assert trainer.state.log_history[-2]["nonfinite_steps"] == 4

    def test_loss_scale_that_falls_to_nothing_ends_the_run(self, tmp_path):
        trainer, _ = self.watched(tmp_path, max_nonfinite_steps=2)
        trainer.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=0.25)
        with pytest.raises(FloatingPointError, match=r"the loss scale fell to 0\.25"):
            trainer.train()

    @pytest.mark.parametrize("value", [0, -1])
    def test_limit_that_is_none_is_refused(self, tmp_path, value: int):
        with pytest.raises(ValueError, match="max_nonfinite_steps must be"):
            make_trainer(tmp_path, max_nonfinite_steps=value)

    def test_prompt_without_room_is_refused_before_the_first_rollout(self, tmp_path):
        prompts = [prompt * (40 if i == 5 else 1) for i, prompt in enumerate(DATASET["prompt"][:8])]
        long = Dataset.from_dict({"prompt": prompts})
        trainer = make_trainer(tmp_path, dataset=long)
        trainer._generate_and_score_completions = None
        with pytest.raises(ValueError, match="context of 128"):
            trainer.train()
