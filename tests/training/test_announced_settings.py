"""`ResumedSettings` on its own: what it compares, on which process, and what it announces."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from test_trainer import build_model, make_config
from transformers import TrainerState

from minillm_trl.errors import UserError
from minillm_trl.training.checkpoints import CheckpointError
from minillm_trl.training.resumed_settings import ResumedSettings, describe_inputs


def parts(rate: float = 0.1, decay: float = 0.0, kind: type = torch.optim.SGD):
    """An optimizer and its schedule, which halves the rate in each step."""
    optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=rate, weight_decay=decay)
    return optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


class Run:
    """A run that resumes from a checkpoint or not; `say` returns what it printed and warned."""

    def __init__(
        self, folder: Path, checkpoint: Path | None = None, *, inputs: dict | None = None, main: bool = True, **options
    ):
        self.printed: list[str] = []
        accelerator = SimpleNamespace(print=self.printed.append, is_main_process=main)
        self.settings = ResumedSettings(accelerator, make_config(folder, **options))
        self.settings.inputs = {"teacher": "one"}
        self.settings.compare(None if checkpoint is None else str(checkpoint), inputs or {})

    def say(self, caplog, step: int = 3, epoch: float | None = 1.5) -> list[str]:
        caplog.clear()
        self.settings.announce(TrainerState(global_step=step, max_steps=8, epoch=epoch))
        return [record.getMessage() for record in caplog.records]


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    """A checkpoint of a run with the rate 0.1, after a step."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    run, (optimizer, schedule) = Run(tmp_path, inputs={"train_dataset": "rows"}), parts()
    run.settings.note_hyperparameters(optimizer, schedule)
    run.settings.write(folder, optimizer, schedule)
    (folder / "optimizer.pt").touch()
    return folder


def resume(checkpoint: Path, rate: float = 0.1, decay: float = 0.0, **options) -> tuple[Run, float]:
    """A resumed run whose optimizer has the checkpoint's rate after a step, and the rate that it then has."""
    run, fresh = Run(checkpoint.parent, checkpoint, **options), parts(rate, decay)
    run.settings.note_hyperparameters(*fresh)
    loaded = parts()
    loaded[0].step()
    loaded[1].step()
    run.settings.take_over(*loaded)
    return run, loaded[0].param_groups[0]["lr"]


SAME = {"inputs": {"train_dataset": "rows"}}


class TestAnnouncement:
    def test_unchanged_run_says_where_it_resumes_alone(self, checkpoint, caplog):
        run, rate = resume(checkpoint, **SAME)
        assert run.say(caplog) == []
        assert run.printed == [f"Resuming from {checkpoint} at step 3 of 8."]
        assert rate == 0.05

    def test_changes_of_the_optimizer_come_before_those_of_settings(self, checkpoint, caplog):
        run, rate = resume(checkpoint, 0.2, 0.3, inputs={"train_dataset": "others"}, gamma=0.5)
        run.settings.inputs["teacher"] = "two"
        run.settings.compare(str(checkpoint), {"train_dataset": "others"})
        run.settings.note_hyperparameters(*parts(0.2, 0.3))
        run.settings.take_over(*parts())
        (said,) = run.say(caplog)
        changes = ["learning_rate: 0.1 -> 0.2", "weight_decay: 0.0 -> 0.3"]
        changes += ["gamma: 1.0 -> 0.5", "teacher: one -> two", "train_dataset: rows -> others"]
        assert [line.strip() for line in said.splitlines()[1:]] == changes
        assert rate == pytest.approx(0.1)

    def test_main_process_alone_warns(self, checkpoint, caplog):
        run, _ = resume(checkpoint, 0.2, main=False, ignore_data_skip=True)
        assert run.say(caplog) == []
        assert len(run.printed) == 1  # accelerate prints on the main process

    @pytest.mark.parametrize(("epoch", "number"), [(1.5, 1), (None, 0), (0.9, 0)])
    def test_data_that_restarts_is_announced(self, checkpoint, caplog, epoch: float | None, number: int):
        run, _ = resume(checkpoint, **SAME, ignore_data_skip=True)
        *_, said = run.say(caplog, epoch=epoch)
        assert f"the beginning of epoch {number}," in said

    def test_run_without_the_optimizers_state_says_what_is_lost(self, checkpoint, caplog):
        (checkpoint / "optimizer.pt").unlink()
        run, rate = resume(checkpoint, 0.2, **SAME)
        changed, lost = run.say(caplog)
        assert changed.splitlines()[1:] == ["  learning_rate: 0.1 -> 0.2"]
        assert "has no optimizer state" in lost
        assert "though 3 of 8 steps are done" in lost
        assert rate == 0.05  # its own schedule has begun again, which transformers sees to

    def test_second_training_forgets_the_changes_of_the_first(self, checkpoint, caplog):
        run, _ = resume(checkpoint, 0.2, **SAME)
        run.settings.compare(str(checkpoint), SAME["inputs"])
        assert run.say(caplog) == []

    def test_checkpoint_without_settings_is_compared_by_its_groups(self, checkpoint, caplog):
        (checkpoint / "run_settings.json").unlink()
        run, _ = resume(checkpoint, 0.2, inputs={"train_dataset": "others"})
        (said,) = run.say(caplog)
        assert said.splitlines()[1:] == ["  learning_rate: 0.1 -> 0.2"]
        (checkpoint / "optimizer.pt").unlink()
        run, _ = resume(checkpoint, 0.2)
        (said,) = run.say(caplog)
        assert "has no optimizer state" in said


class TestKinds:
    def test_state_of_another_class_is_refused(self, checkpoint):
        run = Run(checkpoint.parent, checkpoint)
        with pytest.raises(
            UserError, match=r"^optim=adamw_torch.*torch.optim.sgd.SGD, from which torch.optim.adamw.AdamW"
        ):
            run.settings.note_hyperparameters(*parts(kind=torch.optim.AdamW))
        optimizer, _ = parts()
        with pytest.raises(UserError, match=r"^lr_scheduler_type=constant: .*StepLR, from which .*ExponentialLR"):
            run.settings.note_hyperparameters(optimizer, torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5))

    @pytest.mark.parametrize("lost", ["run_settings.json", "optimizer.pt"])
    def test_without_such_a_state_any_class_is_new(self, checkpoint, lost: str):
        Run(checkpoint.parent).settings.note_hyperparameters(*parts(kind=torch.optim.AdamW))
        (checkpoint / lost).unlink()
        Run(checkpoint.parent, checkpoint).settings.note_hyperparameters(*parts(kind=torch.optim.AdamW))

    @pytest.mark.parametrize(
        ("sharded", "has_state", "refused"), [("FSDP", False, True), ("FSDP", True, False), (None, False, False)]
    )
    def test_sharded_run_needs_an_optimizers_state(self, checkpoint, sharded, has_state: bool, refused: bool):
        if not has_state:
            (checkpoint / "optimizer.pt").unlink()
        settings = ResumedSettings(Accelerator(cpu=True), make_config(checkpoint.parent))
        settings.compare(None, {}, sharded)
        if not refused:
            settings.compare(str(checkpoint), {}, sharded)
            return
        with pytest.raises(CheckpointError, match="FSDP needs to resume"):
            settings.compare(str(checkpoint), {}, sharded)


def test_inputs_that_change_a_training_are_described(tmp_path):
    def described(model, **changes) -> dict:
        config = {"train_dataset": None, "eval_dataset": None, "processes": 2, **changes}
        trainer = SimpleNamespace(
            model=model,
            accelerator=SimpleNamespace(unwrap_model=lambda model: model),
            train_dataset=config["train_dataset"],
            eval_dataset=config["eval_dataset"],
            args=SimpleNamespace(world_size=config["processes"]),
        )
        return describe_inputs(trainer)

    plain = described(build_model("gpt2"))
    assert plain == {"train_dataset": None, "eval_dataset": None, "num_processes": 2, "peft_config": {}}
    adapted = get_peft_model(build_model("gpt2"), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True))
    adapter = described(adapted)["peft_config"]
    assert (adapter["r"], adapter["target_modules"]) == (3, ["c_attn"])
    assert "base_model_name_or_path" not in adapter  # a folder may have been renamed
    named = get_peft_model(
        build_model("gpt2"), LoraConfig(r=3, target_modules=["c_attn"], fan_in_fan_out=True), adapter_name="other"
    )
    assert described(named)["peft_config"] == {}
