"""`ExactResume`: the state that transformers' checkpoints lack, saved and restored by the parts that have it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch.utils.data import DataLoader
from transformers import (
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.utils import logging

from .interruption import SafeStop
from .random_state import random_state, set_random_state
from .resumed_settings import ResumedSettings

logger = logging.get_logger(__name__)


class RunPart(Protocol):
    """A part of a trainer with state of its own, which an exact resume needs."""

    def reset(self) -> None:
        """Forget the state that an earlier call of `train()` left."""

    def state(self) -> dict[str, Any]:
        """Return the state as tensors and plain values, under names that no other part has."""

    def restore(self, saved: dict[str, Any]) -> None:
        """Take the state from what all parts returned, which older checkpoints may lack some names of."""


class ExactResume:
    """Save the state of all parts of a trainer in each checkpoint of a process, and restore it.

    Args:
        args ([`~transformers.TrainingArguments`]): arguments of the run.
        parts (`Sequence`): the parts; a trainer may append others.
    """

    def __init__(self, args: TrainingArguments, parts: Sequence[RunPart]):
        self.args = args
        self.parts = list(parts)
        self._saved: dict[str, Any] | None = None

    @property
    def _file(self) -> str:
        return f"run_state_{self.args.process_index}-of-{self.args.world_size}.pt"

    def begin(self, checkpoint: str | None) -> None:
        """Reset the parts, and read the state in the checkpoint to resume from."""
        self._saved = None if checkpoint is None else self._read(Path(checkpoint))
        for part in self.parts:
            part.reset()

    def _read(self, checkpoint: Path) -> dict[str, Any] | None:
        path = checkpoint / self._file
        if not path.is_file():
            logger.warning(
                f"{checkpoint} has no {path.name}: it was saved by another program, or by a different number of "
                "processes. Training resumes from it, but will differ from an uninterrupted run."
            )
            return None
        return torch.load(path, map_location="cpu", weights_only=True)

    def state(self) -> dict[str, Any]:
        """Return the state of all parts of this process."""
        return {name: value for part in self.parts for name, value in part.state().items()}

    def write(self, checkpoint: Path, state: dict[str, Any] | None = None) -> None:
        """Write the state that this process has now into a checkpoint, or the given one from an earlier moment."""
        torch.save(state or self.state(), checkpoint / self._file)

    def restore(self) -> None:
        """Restore the parts from the checkpoint that [`begin`] read; they stay as reset if it has no state."""
        if self._saved is not None:
            for part in self.parts:
                part.restore(self._saved)


class LoopState:
    """What transformers' training loop and TRL's metrics keep in attributes of the trainer.

    Args:
        trainer ([`~transformers.Trainer`]): a trainer of TRL.
        stop ([`SafeStop`]): tells whether SIGTERM stopped the run.
    """

    def __init__(self, trainer: Trainer, stop: SafeStop):
        self.trainer: Any = trainer
        self.stop = stop
        self.had_stopped = False  # in a resumed run: whether its checkpoint's run had stopped early

    def reset(self) -> None:
        """Drop the metrics that were not logged; transformers resets its loop itself."""
        self.had_stopped = False
        self.trainer._metrics["train"].clear()

    def state(self) -> dict[str, Any]:
        """Return the loss and the metrics since the last log, the counts, and whether the run stops here."""
        trainer = self.trainer
        unfinished = trainer.state.global_step < trainer.state.max_steps
        return {
            "loss_since_log": trainer._tr_loss.cpu(),
            "total_loss": trainer._total_loss_scalar,
            "last_logged_step": trainer._globalstep_last_logged,
            "first_step": trainer._initial_global_step,
            "metrics": {name: list(values) for name, values in trainer._metrics["train"].items()},
            "train_tokens": trainer._total_train_tokens,
            "stopped_early": trainer.control.should_training_stop and not self.stop.agreed and unfinished,
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Set the attributes, after transformers has reset them."""
        trainer = self.trainer
        trainer._tr_loss = saved["loss_since_log"].to(trainer.args.device)
        trainer._total_loss_scalar = saved["total_loss"]
        trainer._globalstep_last_logged = saved["last_logged_step"]
        trainer._initial_global_step = saved["first_step"]
        trainer._metrics["train"].update(saved["metrics"])
        trainer._total_train_tokens = saved["train_tokens"]
        self.had_stopped = saved["stopped_early"]


class EpochOrder:
    """The random state at the beginning of an epoch, from which samplers draw its order."""

    def __init__(self) -> None:
        self._random_state: dict[str, Any] | None = None

    def reset(self) -> None:
        """Do nothing: each epoch sets the state."""

    def state(self) -> dict[str, Any]:
        """Return the random state at the beginning of the current epoch."""
        return {"epoch_random_state": self._random_state}

    def restore(self, saved: dict[str, Any]) -> None:
        """Take the random state at the beginning of the epoch in which the run resumes."""
        self._random_state = saved["epoch_random_state"]

    def begin(self, dataloader: DataLoader, epoch: int, *, within: bool) -> None:
        """Begin an epoch with the order that it has in an uninterrupted run.

        Args:
            dataloader ([`~torch.utils.data.DataLoader`]): yields the batches of the epoch.
            epoch (`int`): its number.
            within (`bool`): whether a resumed run begins within this epoch.
        """
        if within and self._random_state is not None:
            set_random_state(self._random_state)
        else:
            self._random_state = random_state()
        sampler = _innermost_sampler(dataloader)
        if hasattr(sampler, "set_epoch"):  # accelerate does not unwrap the sampler of a resumed run
            sampler.set_epoch(epoch)


def _innermost_sampler(dataloader: DataLoader) -> Any:
    sampler: Any = getattr(dataloader, "batch_sampler", None)
    while hasattr(sampler, "batch_sampler"):
        sampler = sampler.batch_sampler
    return getattr(sampler, "sampler", None)


class RestoreOnTrainBegin(TrainerCallback):
    """Restore a resumed run after transformers has restored its own part, and stop it if it had ended.

    Args:
        resume ([`ExactResume`]), loop ([`LoopState`]), settings ([`ResumedSettings`]): parts of the trainer.
        callbacks: the trainer's callbacks.
    """

    def __init__(self, resume: ExactResume, loop: LoopState, settings: ResumedSettings, callbacks: CallbackHandler):
        self.resume = resume
        self.loop = loop
        self.settings = settings
        self.callbacks = callbacks

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **found: Any
    ) -> None:
        """Restore hyperparameters, callbacks, the best checkpoint's path, and the parts."""
        if state.global_step == 0:
            return
        self.settings.take_over(found["optimizer"], found["lr_scheduler"])
        self.settings.announce(state)
        self._restore_callbacks(state)
        if state.best_global_step:  # the run's folder may have been renamed
            best = Path(str(args.output_dir)) / f"checkpoint-{state.best_global_step}"
            state.best_model_checkpoint = str(best) if best.is_dir() else state.best_model_checkpoint
        self.resume.restore()
        if (self.loop.had_stopped and self._stays_stopped()) or state.global_step >= state.max_steps:
            logger.warning(f"The run has already ended at step {state.global_step}: nothing is left to train.")
            control.should_training_stop = True

    def _restore_callbacks(self, state: TrainerState) -> None:
        """Restore the state of stateful callbacks, but not their arguments, which may have changed."""
        states: dict[str, Any] = cast(dict[str, Any], state.stateful_callbacks)  # as `TrainerState` makes it
        for callback in self.callbacks.callbacks:  # new callbacks are saved from now on, too
            if isinstance(callback, ExportableState):
                states.setdefault(type(callback).__name__, callback.state())
        for name, saved in states.items():
            callbacks = [other for other in self.callbacks.callbacks if type(other).__name__ == name]
            for callback, kept in zip(callbacks, saved if isinstance(saved, list) else [saved], strict=False):
                for attribute, value in kept.get("attributes", {}).items():
                    setattr(callback, attribute, value)

    def _stays_stopped(self) -> bool:
        """Return whether the run would stop again: not if the patience of early stopping was raised."""
        patient = [stop for stop in self.callbacks.callbacks if isinstance(stop, EarlyStoppingCallback)]
        return not patient or any(
            stop.early_stopping_patience_counter >= stop.early_stopping_patience for stop in patient
        )
