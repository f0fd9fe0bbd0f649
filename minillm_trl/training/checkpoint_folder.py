"""`CheckpointFolder`: finds the checkpoint to resume from, and writes checkpoints atomically."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.utils import logging

from .checkpoints import (
    UNFINISHED,
    CheckpointError,
    find_damage,
    finish_replacements,
    newest_whole_checkpoint,
    replace_folder,
)

logger = logging.get_logger(__name__)


class CheckpointFolder:
    """The checkpoints in a run's `output_dir`. A checkpoint gets its final name once all its files are written.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        args ([`~transformers.TrainingArguments`]): with the output folder.
    """

    def __init__(self, accelerator: Accelerator, args: TrainingArguments):
        self.accelerator = accelerator
        self.args = args
        self.unfinished: Path | None = None  # parent of the checkpoint that is being written

    def find(self, asked: str | bool | None) -> str | None:
        """Return the checkpoint to resume from, the same on all processes: `asked`, or if it is True the newest one.

        Raises:
            CheckpointError: if `output_dir` is not writable, or the checkpoint is damaged.
        """
        self._finish_replacements(asked)
        self._check_writable()
        if asked is None or asked is False:
            return None
        found: str | None = None
        damage: str | None = None
        if self.args.local_process_index == 0:
            if asked is True:
                found = newest_whole_checkpoint(Path(str(self.args.output_dir)), checksums=True)
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

    def _finish_replacements(self, asked: str | bool | None) -> None:
        runs = {Path(str(self.args.output_dir))}
        if isinstance(asked, str | os.PathLike):
            runs.add(Path(asked).parent)
        if self.args.local_process_index == 0:
            for run in runs:
                finish_replacements(run)
        self.accelerator.wait_for_everyone()

    def _check_writable(self) -> None:
        if not self.args.should_save:
            return
        probe = Path(str(self.args.output_dir)) / UNFINISHED
        try:
            probe.mkdir(parents=True, exist_ok=True)
            (probe / "probe").write_text("")
            shutil.rmtree(probe)  # including the remains of a killed run
        except OSError as error:
            raise CheckpointError(
                f"output_dir={self.args.output_dir!r} is not writable ({error}). Choose another folder."
            ) from error

    @contextmanager
    def replacing(self, run: Path, name: str) -> Iterator[Path]:
        """Yield the folder to write a checkpoint to, and give it its name `run / name` at the end of the block.

        Raises:
            CheckpointError: if the checkpoint cannot be written; nothing of it is left.
        """
        unfinished = run / UNFINISHED
        leads_node = self.args.local_process_index == 0
        if leads_node:
            shutil.rmtree(unfinished, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.unfinished = unfinished
        try:
            yield unfinished / name
        except (OSError, RuntimeError, SafetensorError) as error:
            raise _cannot_save(run, name, error) from error
        finally:
            self.unfinished = None
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            replace_folder(unfinished / name, run / name)
        self.accelerator.wait_for_everyone()
        if leads_node and (unfinished / name).is_dir():  # the node has a disk that the main process does not see
            replace_folder(unfinished / name, run / name)
        if leads_node:
            shutil.rmtree(unfinished, ignore_errors=True)


def _cannot_save(run: Path, name: str, error: Exception) -> CheckpointError:
    shutil.rmtree(run / UNFINISHED, ignore_errors=True)
    last = newest_whole_checkpoint(run)
    free = shutil.disk_usage(run).free / 2**30
    return CheckpointError(
        f"{run / name} could not be written: {error}. The disk has {free:.1f} GiB free. "
        + (f"The last checkpoint, {last}, is whole. " if last else "There is no earlier checkpoint. ")
        + "Free disk space (save_total_limit keeps fewer checkpoints) or make the folder writable, and resume "
        "with resume_from_checkpoint=True."
    )
