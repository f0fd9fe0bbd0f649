"""`ResumedSettings` on its own: what it compares with a checkpoint, what it refuses, sets and says."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import build_model
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from test_trainer import make_config
from torch.optim.lr_scheduler import LambdaLR, StepLR
from transformers import TrainerState

from minillm_trl.errors import UserError
from minillm_trl.training.checkpoints import CheckpointError
from minillm_trl.training.resumed_settings import ResumedSettings, describe_inputs

LISTED = "Settings differ from the checkpoint's run; the new ones are used:"


class Run:
    """A run at a learning rate that halves after each step: its settings, optimizer and schedule."""

    def __init__(self, folder: Path, rate: float = 0.1, kind: type = torch.optim.SGD, schedule: Any = None, **options):
        self.folder = folder
        self.settings = ResumedSettings(Accelerator(cpu=True), make_config(folder, **options))
        self.settings.inputs = {"lm_dataset": None}
        self.optimizer = kind([torch.nn.Parameter(torch.ones(2))], lr=rate)
        self.schedule = schedule(self.optimizer) if schedule else StepLR(self.optimizer, 1, gamma=0.5)

    def begin(self, checkpoint: Path | None, processes: int = 1, sharded: str | None = None) -> None:
        path = None if checkpoint is None else str(checkpoint)
        self.settings.compare(path, {"num_processes": processes}, sharded)
        self.settings.note_hyperparameters(self.optimizer, self.schedule)

    def save(self, *, settings: bool = True, optimizer: bool = True) -> Path:
        """Write a checkpoint after a step, with or without two of its files."""
        checkpoint = self.folder / "checkpoint-1"
        checkpoint.mkdir()
        self.begin(None)
        if settings:
            self.settings.write(checkpoint, self.optimizer, self.schedule)
        if optimizer:
            (checkpoint / "optimizer.pt").touch()
        return checkpoint

    def take_step(self) -> None:
        """Take a step, as loading a state that was saved after one does."""
        self.optimizer.step()
        self.schedule.step()

    @property
    def rates(self) -> tuple[float, float]:
        """The rate of now, and the schedule's base rate."""
        return self.optimizer.param_groups[0]["lr"], self.schedule.base_lrs[0]

    def said(self, caplog: pytest.LogCaptureFixture, **state) -> list[str]:
        """The messages about a run that resumes at its first step."""
        caplog.clear()
        self.settings.announce(TrainerState(global_step=1, max_steps=4, **state))
        return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize(("settings", "optimizer"), [(True, True), (False, True), (True, False), (False, False)])
def test_checkpoint_may_lack_settings_and_optimizer(tmp_path, caplog, capsys, settings: bool, optimizer: bool):
    """Without settings, the optimizer's state is compared. Without an optimizer, the schedule starts again."""
    checkpoint = Run(tmp_path).save(settings=settings, optimizer=optimizer)
    run = Run(tmp_path, 0.02, temperature=0.7)
    run.begin(checkpoint, processes=2)
    if optimizer:  # transformers loads it, with the checkpoint's rates
        run.optimizer.param_groups[0] |= {"lr": 0.1, "initial_lr": 0.1}
        run.schedule.base_lrs = [0.1]
        run.take_step()
    run.settings.take_over(run.optimizer, run.schedule)
    assert run.rates == pytest.approx((0.01, 0.02) if optimizer else (0.02, 0.02))
    changes = ["learning_rate: 0.1 -> 0.02"] if settings or optimizer else []
    changes += ["num_processes: 1 -> 2", "temperature: 1.0 -> 0.7"] if settings else []
    listed = ["\n  ".join([LISTED, *changes])] if changes else []
    lost = [] if optimizer else [f"{checkpoint} has no optimizer state (save_only_model=True)"]
    said = run.said(caplog)
    assert [message.partition(": the optimizer's")[0] for message in said] == [*listed, *lost]
    assert capsys.readouterr().out == f"Resuming from {checkpoint} at step 1 of 4.\n"


def test_names_in_a_checkpoint_are_those_of_earlier_releases(tmp_path):
    saved = json.loads((Run(tmp_path).save() / "run_settings.json").read_text())
    assert saved["kinds"] == {"optimizer": "torch.optim.sgd.SGD", "schedule": "torch.optim.lr_scheduler.StepLR"}
    assert [(group["initial_lr"], group["momentum"]) for group in saved["optimizer_groups"]] == [(0.1, 0)]
    assert (saved["temperature"], saved["num_processes"], saved["lm_dataset"]) == (1.0, 1, None)


def test_checkpoint_of_an_older_release_may_have_neither_groups_nor_classes(tmp_path, caplog):
    checkpoint = Run(tmp_path).save()
    (checkpoint / "run_settings.json").write_text('{"temperature": 0.5}')
    run = Run(tmp_path, 0.1, torch.optim.AdamW)
    run.begin(checkpoint)
    run.settings.take_over(run.optimizer, run.schedule)
    assert run.said(caplog) == [f"{LISTED}\n  temperature: 0.5 -> 1.0"]


def test_run_with_the_same_settings_says_nothing_and_keeps_its_rates(tmp_path, caplog):
    checkpoint = Run(tmp_path).save()
    run = Run(tmp_path)
    run.begin(checkpoint)
    run.take_step()
    run.settings.take_over(run.optimizer, run.schedule)
    assert run.rates == (0.05, 0.1)
    assert run.said(caplog) == []
    run.settings.accelerator = SimpleNamespace(is_main_process=False, print=print)
    run.begin(checkpoint, processes=2)
    assert run.said(caplog) == []  # by another process than the first


def test_changes_are_those_of_the_last_resumed_run(tmp_path, caplog):
    checkpoint = Run(tmp_path).save()
    run = Run(tmp_path, 0.02)
    run.begin(checkpoint)
    run.settings.take_over(run.optimizer, run.schedule)
    assert len(run.said(caplog)) == 1
    run.begin(checkpoint)
    assert run.said(caplog) == []


@pytest.mark.parametrize(("epoch", "read"), [(1.75, 1), (None, 0)])
def test_data_that_is_not_passed_over_is_announced_with_its_epoch(tmp_path, caplog, epoch: float | None, read: int):
    checkpoint = Run(tmp_path).save()
    run = Run(tmp_path, ignore_data_skip=True)
    run.begin(checkpoint)
    (message,) = run.said(caplog, epoch=epoch)
    assert f"the data restarts at the beginning of epoch {read}," in message


@pytest.mark.parametrize(("settings", "optimizer"), [(True, True), (False, True), (True, False)])
@pytest.mark.parametrize(
    ("other", "field", "then"),
    [
        ({"kind": torch.optim.AdamW}, "optim", "torch.optim.sgd.SGD"),
        (
            {"schedule": lambda optimizer: LambdaLR(optimizer, lambda step: 1.0)},
            "lr_scheduler_type",
            "torch.optim.lr_scheduler.StepLR",
        ),
    ],
    ids=["optimizer", "schedule"],
)
def test_state_of_another_class_is_refused(tmp_path, settings: bool, optimizer: bool, other, field: str, then: str):
    """As far as a checkpoint has a state, and says of which class."""
    checkpoint = Run(tmp_path, optim="sgd", lr_scheduler_type="cosine").save(settings=settings, optimizer=optimizer)
    run = Run(tmp_path, optim="adafactor", lr_scheduler_type="linear", **other)
    if not (settings and optimizer):
        run.begin(checkpoint)
        return
    now, before = {"optim": ("adafactor", "sgd"), "lr_scheduler_type": ("linear", "cosine")}[field]
    with pytest.raises(UserError, match=f"^{field}={now}: .*checkpoint-1 has the state of {then}") as raised:
        run.begin(checkpoint)
    assert f"Resume with {field}={before}," in str(raised.value)


@pytest.mark.parametrize("optimizer", [True, False])
@pytest.mark.parametrize("sharded", ["FSDP", None])
def test_sharded_run_needs_an_optimizer_to_resume(tmp_path, optimizer: bool, sharded: str | None):
    checkpoint = Run(tmp_path).save(optimizer=optimizer)
    run = Run(tmp_path)
    run.begin(None, sharded=sharded)
    if optimizer or not sharded:
        run.begin(checkpoint, sharded=sharded)
        return
    with pytest.raises(CheckpointError, match=r"checkpoint-1' has no optimizer state .*, which FSDP needs to resume"):
        run.begin(checkpoint, sharded=sharded)


@pytest.mark.parametrize("adapter", [None, "default", "other"])
def test_inputs_of_a_trainer(adapter: str | None):
    """The name of an adapter's base may change; adapters besides the trained one are not the run's."""
    model = build_model("llama")
    if adapter is not None:
        model = get_peft_model(model, LoraConfig(r=3), adapter_name=adapter)
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(unwrap_model=lambda wrapped: wrapped.inside),
        model=SimpleNamespace(inside=model),
        args=SimpleNamespace(world_size=3),
        train_dataset=rows,
        eval_dataset={"one": rows.select([1])},
    )
    found = describe_inputs(trainer)
    assert found["num_processes"] == 3
    assert found["train_dataset"]["is"] == "2 rows of prompt"
    assert found["eval_dataset"]["one"]["is"] == "1 rows of prompt"
    assert found["peft_config"].get("r") == (3 if adapter == "default" else None)
    assert "base_model_name_or_path" not in found["peft_config"]
