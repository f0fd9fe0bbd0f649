"""`ResumedSettings`: a resumed run uses its current settings, and reports what changed."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import Trainer, TrainerState
from transformers.utils import logging

from ..errors import UserError
from .checkpoints import CheckpointError, has_optimizer
from .hyperparameters import Groups, kind_of, list_changes, read_groups, take_over
from .run_settings import describe_arguments, describe_dataset, find_changes, plain, read_settings, write_settings

logger = logging.get_logger(__name__)

_GROUPS, _KINDS = "optimizer_groups", "kinds"
_FIELD_OF = {"optimizer": "optim", "schedule": "lr_scheduler_type"}
_CALLED = {"lr": "learning_rate"}


class ResumedSettings:
    """Use the current settings in a resumed run. transformers restores hyperparameters from the checkpoint instead.

    Learning rate, weight decay, betas and others are set in the optimizer, and the schedule continues at its step. One
    message lists all settings that differ from the checkpoint's run.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        args ([`~transformers.TrainingArguments`]): settings of this run.
    """

    def __init__(self, accelerator: Accelerator, args: Any):
        self.accelerator = accelerator
        self.args = args
        self.inputs: dict[str, Any] = {}  # descriptions of what the trainer was given besides `args`
        self._resumed_from: str | None = None
        self._settings: dict[str, Any] = {}
        self._settings_before: dict[str, Any] | None = None
        self._given_groups: Groups = []
        self._hyperparameter_changes: list[tuple[str, Any, Any]] = []

    def compare(self, checkpoint: str | None, inputs: dict[str, Any], sharded: str | None = None) -> None:
        """Store the settings of this run, and those of the checkpoint's run.

        Args:
            checkpoint (`str`, *optional*): folder to resume from.
            inputs (`dict`): settings besides `args` and [`inputs`], in the form of [`find_changes`].
            sharded (`str`, *optional*): "DeepSpeed" or "FSDP", if in use.

        Raises:
            CheckpointError: if the checkpoint has no optimizer state, under DeepSpeed or FSDP.
        """
        self._resumed_from, self._hyperparameter_changes = checkpoint, []
        before = None
        if self.args.should_save:
            self._settings = {**describe_arguments(self.args), **inputs, **self.inputs}
        if checkpoint is not None and self.args.process_index == 0:
            before = read_settings(Path(checkpoint))
        (self._settings_before,) = broadcast_object_list([before])
        if checkpoint is not None and sharded and not has_optimizer(Path(checkpoint)):
            raise CheckpointError(
                f"resume_from_checkpoint={checkpoint!r} has no optimizer state (save_only_model=True), which "
                f"{sharded} needs to resume. Start a new run from its weights (model_name_or_path={checkpoint}), or "
                "resume from a checkpoint saved with save_only_model=False."
            )

    def note_hyperparameters(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Store the hyperparameters of a new optimizer and schedule, before a checkpoint overrides them.

        Raises:
            UserError: if the checkpoint has the states of an optimizer or a schedule of another class.
        """
        self._given_groups = read_groups(optimizer)
        if self._resumed_from is None or not has_optimizer(Path(self._resumed_from)):
            return
        settings = self._settings_before or {}
        before = settings.get(_KINDS, {})
        for name, kind in kind_of(optimizer, scheduler).items():
            if before.get(name, kind) != kind:
                field = _FIELD_OF[name]
                raise UserError(
                    f"{field}={plain(getattr(self.args, field))}: {self._resumed_from} has the state of "
                    f"{before[name]}, from which {kind} cannot continue. Resume with {field}={settings.get(field)}, "
                    f"or start a new run from the checkpoint's weights (model_name_or_path={self._resumed_from})."
                )

    def take_over(self, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Set the hyperparameters of this run in an optimizer and a schedule that a checkpoint has overridden."""
        assert self._resumed_from is not None, "only a resumed run has a checkpoint"
        before = (self._settings_before or {}).get(_GROUPS)
        if has_optimizer(Path(self._resumed_from)):
            self._hyperparameter_changes = take_over(optimizer, scheduler, self._given_groups, before)
        else:
            self._hyperparameter_changes = list_changes(self._given_groups, before or self._given_groups)

    def write(self, checkpoint: Path, optimizer: torch.optim.Optimizer, scheduler: Any) -> None:
        """Write the settings of this run into a checkpoint."""
        kinds = kind_of(optimizer, scheduler)
        write_settings(checkpoint, {**self._settings, _GROUPS: self._given_groups, _KINDS: kinds})

    def announce(self, state: TrainerState) -> None:
        """Log where the run resumes, which settings have changed, and which state is lost."""
        assert self._resumed_from is not None, "only a resumed run is announced"
        self.accelerator.print(f"Resuming from {self._resumed_from} at step {state.global_step} of {state.max_steps}.")
        if not self.accelerator.is_main_process:
            return
        if changes := self._changes():
            listed = "".join(f"\n  {change}" for change in changes)
            logger.warning(f"Settings differ from the checkpoint's run; the new ones are used:{listed}")
        if not has_optimizer(Path(self._resumed_from)):
            logger.warning(
                f"{self._resumed_from} has no optimizer state (save_only_model=True): the optimizer's moments start "
                f"at zero and the learning-rate schedule restarts with its warm-up, though {state.global_step} of "
                f"{state.max_steps} steps are done. The random state is lost too."
            )
        if self.args.ignore_data_skip:
            logger.warning(
                f"ignore_data_skip=True: the data restarts at the beginning of epoch {int(state.epoch or 0)}, so the "
                "run sees the first examples of this epoch twice and differs from an uninterrupted run. Drop "
                "ignore_data_skip to resume exactly."
            )

    def _changes(self) -> list[str]:
        then, now = self._settings_before or {}, self._settings
        of_optimizer = [
            f"{_CALLED.get(name, name)}: {old} -> {new}" for name, old, new in self._hyperparameter_changes
        ]
        return of_optimizer + find_changes(then, now)


def describe_inputs(trainer: Trainer) -> dict[str, Any]:
    """Return the settings of a trainer besides `args` that change the training, in the form of [`find_changes`]."""
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    config = model.peft_config.get("default") if isinstance(model, PeftModel) else None
    adapter = {} if config is None else plain(config.to_dict())
    return {
        "train_dataset": describe_dataset(trainer.train_dataset),
        "eval_dataset": describe_dataset(trainer.eval_dataset),
        "num_processes": trainer.args.world_size,
        "peft_config": {name: adapter[name] for name in adapter if name != "base_model_name_or_path"},
    }
