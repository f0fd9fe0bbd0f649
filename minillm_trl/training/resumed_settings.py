"""`ResumedSettings`: a transformers `Trainer` that resumes with its current settings, and reports what changed."""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from peft import PeftModel
from transformers import PreTrainedModel, Trainer, TrainerState
from transformers.utils import logging

from ..errors import UserError
from .checkpoints import CheckpointError, has_optimizer
from .hyperparameters import Groups, kind_of, list_changes, read_groups, take_over
from .run_settings import describe_arguments, describe_dataset, find_changes, plain, read_settings, write_settings

logger = logging.get_logger(__name__)

_GROUPS, _KINDS = "optimizer_groups", "kinds"
_FIELD_OF = {"optimizer": "optim", "schedule": "lr_scheduler_type"}
_CALLED = {"lr": "learning_rate"}


class ResumedSettings(Trainer):
    """Use the current settings in a resumed run. transformers restores hyperparameters from the checkpoint instead.

    Learning rate, weight decay, betas and others are set in the optimizer, and the schedule continues at its step. One
    message lists all settings that differ from the checkpoint's run.
    """

    args: Any  # as in `FiniteSteps`
    model: PreTrainedModel
    optimizer: torch.optim.Optimizer

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self._resumed_from: str | None = None
        self._settings: dict[str, Any] = {}
        self._settings_before: dict[str, Any] | None = None
        self._given_groups: Groups = []
        self._hyperparameter_changes: list[tuple[str, Any, Any]] = []

    def _own_settings(self) -> dict[str, Any]:
        """Return the settings besides `args` that change the training, in the form of [`find_changes`]."""
        model = self.accelerator.unwrap_model(self.model)
        config = model.peft_config.get("default") if isinstance(model, PeftModel) else None
        adapter = {} if config is None else plain(config.to_dict())
        return {
            "train_dataset": describe_dataset(self.train_dataset),
            "eval_dataset": describe_dataset(self.eval_dataset),
            "num_processes": self.args.world_size,
            "peft_config": {name: adapter[name] for name in adapter if name != "base_model_name_or_path"},
        }

    def _compare_settings(self, checkpoint: str | None) -> None:
        """Store the settings of this run, and those of the checkpoint's run.

        Raises:
            CheckpointError: if the checkpoint has no optimizer state, under DeepSpeed or FSDP.
        """
        self._resumed_from, self._hyperparameter_changes = checkpoint, []
        before = None
        if self.args.should_save:
            self._settings = {**describe_arguments(self.args), **self._own_settings()}
        if checkpoint is not None and self.args.process_index == 0:
            before = read_settings(Path(checkpoint))
        (self._settings_before,) = broadcast_object_list([before])
        sharded = "DeepSpeed" if self.is_deepspeed_enabled else "FSDP" if self.is_fsdp_enabled else None
        if checkpoint is not None and sharded and not has_optimizer(Path(checkpoint)):
            raise CheckpointError(
                f"resume_from_checkpoint={checkpoint!r} has no optimizer state (save_only_model=True), which "
                f"{sharded} needs to resume. Start a new run from its weights (model_name_or_path={checkpoint}), or "
                "resume from a checkpoint saved with save_only_model=False."
            )

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Create the schedule, and store the hyperparameters before a checkpoint overrides them."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if hasattr(self.optimizer, "param_groups"):  # DeepSpeed creates its optimizer later and calls this again
            self._given_groups = read_groups(self.optimizer)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        settings, given = self._settings_before or {}, self._given_groups
        before = settings.get(_GROUPS)
        if checkpoint is None or not has_optimizer(Path(checkpoint)):
            super()._load_optimizer_and_scheduler(checkpoint)
            self._hyperparameter_changes = list_changes(given, before or given)
            return
        self._check_kinds(settings)
        super()._load_optimizer_and_scheduler(checkpoint)
        self._hyperparameter_changes = take_over(self.optimizer, self.lr_scheduler, given, before)

    def _check_kinds(self, settings: dict[str, Any]) -> None:
        """Check that optimizer and schedule are of the classes whose states the checkpoint holds."""
        before = settings.get(_KINDS, {})
        for name, kind in kind_of(self.optimizer, self.lr_scheduler).items():
            if before.get(name, kind) != kind:
                field = _FIELD_OF[name]
                raise UserError(
                    f"{field}={plain(getattr(self.args, field))}: {self._resumed_from} has the state of "
                    f"{before[name]}, from which {kind} cannot continue. Resume with {field}={settings.get(field)}, "
                    f"or start a new run from the checkpoint's weights (model_name_or_path={self._resumed_from})."
                )

    def _write_settings(self, checkpoint: Path) -> None:
        kinds = kind_of(self.optimizer, self.lr_scheduler)
        write_settings(checkpoint, {**self._settings, _GROUPS: self._given_groups, _KINDS: kinds})

    def _announce_resume(self, state: TrainerState) -> None:
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
