"""`ReliableTrainer`: a transformers `Trainer` with exact resume, atomic checkpoints, and no steps on NaN."""

import os
import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any, cast

import torch
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import broadcast_object_list, gather_object
from peft import PeftModel
from safetensors import SafetensorError
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import TrainOutput, rotate_checkpoints
from transformers.utils import logging

from ..hardware.processes import check_processes
from ..models.activation_checkpointing import ignore_old_names
from .checkpoints import (
    STATE,
    UNFINISHED,
    CheckpointError,
    find_damage,
    finish_replacements,
    newest_whole_checkpoint,
    record_files,
    replace_folder,
)
from .finite_steps import FiniteSteps
from .interruption import Terminated, note_sigterm
from .random_state import random_state, set_random_state
from .resumed_settings import ResumedSettings

logger = logging.get_logger(__name__)


class ReliableTrainer(ResumedSettings, FiniteSteps):
    """Add reliable runs to a TRL trainer. List it before the TRL trainer in the bases.

    - A run that was stopped at any moment and resumed from its newest checkpoint has the same weights and logged
      values as an uninterrupted run. [`_run_state`] returns the state that transformers' checkpoints lack for that.
      Changed settings take effect on resume, see [`ResumedSettings`].
    - Checkpoints are atomic, and a record of their files detects later damage.
    - SIGTERM saves a checkpoint at the end of the optimizer step and ends the process, see [`Terminated`].
    - An optimizer step with a NaN or infinite number on any process is skipped on all, counted and explained.
      `args.max_nonfinite_steps` skipped steps in a row end the run.
    - A process that does not know about the other processes of its launch is rejected, see [`check_processes`].
    """

    model: PreTrainedModel  # as in `FiniteSteps`
    optimizer: AcceleratedOptimizer
    _metrics: dict[str, defaultdict[str, list[float]]]  # TRL's, by mode and name

    def __init__(self, *args: Any, **kwargs: Any):
        check_processes()
        ignore_old_names()
        super().__init__(*args, **kwargs)
        self._unfinished: Path | None = None  # folder of the checkpoint that is being written
        self._resumed_state: dict[str, Any] | None = None
        self._epoch_random_state: dict[str, Any] | None = None

    # Resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> TrainOutput:
        """Train as transformers does. `True` resumes from the newest whole checkpoint, or starts if there is none.

        Raises:
            CheckpointError: if `output_dir` is not writable, or a checkpoint is damaged or cannot be written.
            UserError: if the checkpoint's optimizer or schedule is of another class.
            FloatingPointError: after `max_nonfinite_steps` skipped steps in a row.
            Terminated: after SIGTERM.
        """
        self._finish_replacements(resume_from_checkpoint)
        self._check_output_dir()
        checkpoint = self._checkpoint_to_resume(resume_from_checkpoint)
        self._compare_settings(checkpoint)
        self._resumed_state = None if checkpoint is None else self._read_run_state(Path(checkpoint))
        self._forget_last_run()
        restore = _OnTrainBegin(self)
        eval_on_start = self.args.eval_on_start
        self.args.eval_on_start = eval_on_start and checkpoint is None  # a resumed run has evaluated its start
        self.add_callback(restore)
        try:
            with note_sigterm() as self._sigterm:
                return super().train(checkpoint, *args, **kwargs)
        finally:
            self.remove_callback(restore)
            self.args.eval_on_start = eval_on_start

    def _finish_replacements(self, asked: str | bool | None) -> None:
        runs = {Path(self.args.output_dir)}
        if isinstance(asked, str | os.PathLike):
            runs.add(Path(asked).parent)
        if self.args.local_process_index == 0:
            for run in runs:
                finish_replacements(run)
        self.accelerator.wait_for_everyone()

    def _check_output_dir(self) -> None:
        if not self.args.should_save:
            return
        probe = Path(self.args.output_dir) / UNFINISHED
        try:
            probe.mkdir(parents=True, exist_ok=True)
            (probe / "probe").write_text("")
            shutil.rmtree(probe)  # including the remains of a killed run
        except OSError as error:
            raise CheckpointError(
                f"output_dir={self.args.output_dir!r} is not writable ({error}). Choose another folder."
            ) from error

    def _checkpoint_to_resume(self, asked: str | bool | None) -> str | None:
        if asked is None or asked is False:
            return None
        found: str | None = None
        damage: str | None = None
        if self.args.local_process_index == 0:
            if asked is True:
                found = newest_whole_checkpoint(Path(self.args.output_dir), checksums=True)
            else:
                found, damage = str(asked), find_damage(Path(asked))
        damages = [text for text in gather_object([damage]) if text is not None]
        if damages:
            other = newest_whole_checkpoint(Path(str(asked)).parent)
            raise CheckpointError(
                f"resume_from_checkpoint={str(asked)!r} is damaged: {damages[0]}. "
                + (f"Resume from {other}, the newest whole checkpoint." if other else "Its folder has no other one.")
            )
        (checkpoint,) = broadcast_object_list([found])
        if checkpoint is None:
            logger.warning(f"No checkpoint in {self.args.output_dir}: training starts from the beginning.")
        return checkpoint

    def _read_run_state(self, checkpoint: Path) -> dict[str, Any] | None:
        path = checkpoint / self._run_state_name
        if not path.is_file():
            logger.warning(
                f"{checkpoint} has no {path.name}: it was saved by another program, or by a different number of "
                "processes. Training resumes from it, but will differ from an uninterrupted run."
            )
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    @property
    def _run_state_name(self) -> str:
        return f"run_state_{self.args.process_index}-of-{self.args.world_size}.pt"

    def _run_state(self) -> dict[str, Any]:
        """Return the state that this process needs for an exact resume, as tensors and plain values."""
        return {
            "epoch_random_state": self._epoch_random_state,
            "loss_since_log": self._tr_loss.cpu(),
            "total_loss": self._total_loss_scalar,
            "last_logged_step": self._globalstep_last_logged,
            "first_step": self._initial_global_step,
            "metrics": {name: list(values) for name, values in self._metrics["train"].items()},
            "train_tokens": self._total_train_tokens,
            "nonfinite_steps": (self._nonfinite_steps, self._nonfinite_in_row),
            "stopped_early": self.control.should_training_stop
            and not self._sigterm_received
            and self.state.global_step < self.state.max_steps,
        }

    def _restore_run(self, state: TrainerState, control: TrainerControl) -> None:
        """Restore the state of a checkpoint when training begins, after transformers has restored its own part."""
        self._announce_resume(state)
        self._restore_callbacks(state)
        if state.best_global_step:  # the run's folder may have been renamed
            best = Path(self.args.output_dir) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else state.best_model_checkpoint
        saved = self._resumed_state
        if saved is not None:
            self._epoch_random_state = saved["epoch_random_state"]
            self._tr_loss = saved["loss_since_log"].to(self.args.device)
            self._total_loss_scalar = saved["total_loss"]
            self._globalstep_last_logged = saved["last_logged_step"]
            self._initial_global_step = saved["first_step"]
            for name, values in saved["metrics"].items():
                self._metrics["train"][name] = values
            self._total_train_tokens = saved["train_tokens"]
            self._nonfinite_steps, self._nonfinite_in_row = saved["nonfinite_steps"]
        stopped_early = saved is not None and saved["stopped_early"] and self._stays_stopped()
        if stopped_early or state.global_step >= state.max_steps:
            logger.warning(f"The run has already ended at step {state.global_step}: nothing is left to train.")
            control.should_training_stop = True

    def _restore_callbacks(self, state: TrainerState) -> None:
        """Restore the state of stateful callbacks, but not their arguments, which may have changed."""
        states: dict[str, Any] = cast(dict[str, Any], state.stateful_callbacks)  # as `TrainerState` makes it
        for callback in self.callback_handler.callbacks:  # new callbacks are saved from now on, too
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, callback.state())
        for name, saved in states.items():
            callbacks = [other for other in self.callback_handler.callbacks if type(other).__name__ == name]
            for callback, kept in zip(callbacks, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in kept.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as transformers does, except about tied weights, of which a checkpoint holds only one name."""
        names = defaultdict(set)
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names[id(parameter)].add(name)
        missing = set(load_result.missing_keys)
        loaded = {name for tied in names.values() if not tied <= missing for name in tied}
        keys = [name for name in load_result.missing_keys if name not in loaded]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=keys))

    def _stays_stopped(self) -> bool:
        """Return whether the run would stop again: not if the patience of early stopping was raised."""
        patient = [stop for stop in self.callback_handler.callbacks if isinstance(stop, EarlyStoppingCallback)]
        return not patient or any(
            stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in patient
        )

    def _run_epoch(self, **arguments: Any) -> None:  # type: ignore[override]  # transformers calls it by keywords
        if self.control.should_training_stop:  # a resumed run that had ended
            return
        epoch, checkpoint = arguments["epoch"], arguments["resume_from_checkpoint"]
        resumes = checkpoint is not None and epoch == arguments["epochs_trained"]
        if resumes and arguments["steps_trained_in_current_epoch"] == 0:
            self._load_rng_state(checkpoint)
        if resumes and arguments["steps_trained_in_current_epoch"] > 0 and self._epoch_random_state is not None:
            set_random_state(self._epoch_random_state)  # samplers draw the order of the epoch from it
        else:
            self._epoch_random_state = random_state()
        sampler = _innermost_sampler(arguments["train_dataloader"])
        if hasattr(sampler, "set_epoch"):  # accelerate does not unwrap the sampler of a resumed run
            sampler.set_epoch(epoch)
        super()._run_epoch(**arguments)

    # Checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._unfinished is None else str(self._unfinished)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._unfinished is None:  # uploads run in the background, so they wait for the final name
            super()._push_from_checkpoint(checkpoint_folder)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any, run_state: dict[str, Any] | None = None) -> None:
        """Save a checkpoint, with the state that this process has now, or the given one from an earlier moment."""
        run, name = Path(self._get_output_dir(trial)), f"checkpoint-{self.state.global_step}"
        unfinished = run / UNFINISHED
        leads_node = self.args.local_process_index == 0
        if leads_node:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._unfinished = unfinished
        try:
            super()._save_checkpoint(model, trial)
            torch.save(run_state or self._run_state(), unfinished / name / self._run_state_name)
            self.accelerator.wait_for_everyone()
            self._set_best_checkpoint(run, name)
            if self.args.should_save:
                self.state.save_to_json(str(unfinished / name / STATE))
                self._write_settings(unfinished / name)
                record_files(unfinished / name)
        except (OSError, RuntimeError, SafetensorError) as error:
            raise self._cannot_save(run, name, error) from error
        finally:
            self._unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            replace_folder(unfinished / name, run / name)
        self.accelerator.wait_for_everyone()
        if leads_node and (unfinished / name).is_dir():  # the node has a disk that the main process does not see
            replace_folder(unfinished / name, run / name)
        if leads_node:
            shutil.rmtree(unfinished, ignore_errors=True)
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(run / name))
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            rotate_checkpoints(str(run), self.args.save_total_limit, best, use_mtime=True)

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        model = self.accelerator.unwrap_model(self.model)
        if self.args.should_save and isinstance(model, PeftModel):  # PEFT does not save it, with the end tokens
            model.generation_config.save_pretrained(output_dir or self.args.output_dir)

    def save_whole_model(self) -> None:
        """Save the model to `output_dir`, every file atomically."""
        target = Path(self.args.output_dir)
        self.save_model(str(target / UNFINISHED))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            for path in sorted((target / UNFINISHED).iterdir()):
                os.replace(path, target / path.name)
            (target / UNFINISHED).rmdir()

    def _set_best_checkpoint(self, run: Path, name: str) -> None:
        """Set the final path of the best checkpoint, for which transformers has the unfinished folder."""
        best = f"checkpoint-{self.state.best_global_step}"
        if self.state.best_global_step and (best == name or (run / best).is_dir()):
            self.state.best_model_checkpoint = str(run / best)

    def _cannot_save(self, run: Path, name: str, error: Exception) -> CheckpointError:
        shutil.rmtree(run / UNFINISHED, ignore_errors=True)
        last = newest_whole_checkpoint(run)
        free = shutil.disk_usage(run).free / 2**30
        return CheckpointError(
            f"{run / name} could not be written: {error}. The disk has {free:.1f} GiB free. "
            + (f"The last checkpoint, {last}, is whole. " if last else "There is no earlier checkpoint. ")
            + "Free disk space (save_total_limit keeps fewer checkpoints) or make the folder writable, and resume "
            "with resume_from_checkpoint=True."
        )

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self._sigterm_received:
            checkpoint = str(Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}")
            self.accelerator.print(f"SIGTERM: saved {checkpoint}; resume_from_checkpoint=True resumes from it.")
            raise Terminated(checkpoint)
        return super()._finalize_training(*args, **kwargs)


class _OnTrainBegin(TrainerCallback):
    """Let the trainer restore its state after transformers has reset it, and stop at the end of a step."""

    def __init__(self, trainer: ReliableTrainer):
        self.trainer = trainer

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        if state.global_step > 0:
            self.trainer._restore_run(state, control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        if self.trainer._sigterm_received:
            control.should_save = control.should_training_stop = True

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        if self.trainer._sigterm_received:  # stopped within the epoch, whose end is not reached
            control.should_log = control.should_evaluate = control.should_save = False


def _innermost_sampler(dataloader: DataLoader) -> Any:
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)
