"""SIGTERM, with which schedulers announce that they will kill a process: saves a checkpoint after the current step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

EXIT_STATUS = 128 + signal.SIGTERM  # 143, the status that shells report for SIGTERM


class Terminated(SystemExit):
    """End the process with [`EXIT_STATUS`] after saving a checkpoint.

    Args:
        checkpoint (`str`): folder of the checkpoint.
    """

    def __init__(self, checkpoint: str):
        super().__init__(EXIT_STATUS)
        self.checkpoint = checkpoint


class SafeStop(TrainerCallback):
    """After SIGTERM on any process, save a checkpoint at the end of the optimizer step, and end all processes.

    The trainer reads [`requested`] before each optimizer step, and sets `agreed` if it is True on any process.
    """

    def __init__(self) -> None:
        self.agreed = False
        self._received = threading.Event()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let SIGTERM request a stop within the block, and do nothing else."""
        self.agreed = False
        with note_sigterm() as self._received:
            yield

    @property
    def requested(self) -> bool:
        """Return whether this process has received SIGTERM."""
        return self._received.is_set()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Stop the training, after a checkpoint."""
        if self.agreed:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        """End the process.

        Raises:
            Terminated: if a stop was agreed.
        """
        if self.agreed:
            checkpoint = str(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}")
            if state.is_world_process_zero:
                print(f"SIGTERM: saved {checkpoint}; resume_from_checkpoint=True resumes from it.")
            raise Terminated(checkpoint)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Save here if an evaluation withdrew the checkpoint at the end of the step (`save_strategy="best"`)."""
        if self.agreed:  # stopped within the epoch, whose end is not reached
            control.should_log = control.should_evaluate = False
            control.should_save = True


@contextmanager
def note_sigterm() -> Iterator[threading.Event]:
    """Make SIGTERM set the yielded event and do nothing else. Only works in the main thread."""
    received = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield received
        return
    previous = signal.signal(signal.SIGTERM, lambda *_: received.set())
    try:
        yield received
    finally:
        signal.signal(signal.SIGTERM, previous)
