"""Checkpoints of a run that was stopped."""

from pathlib import Path


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` in a run's folder that was written to its end, if there is one.

    The trainer's state is written last, so a checkpoint without it is torn: the run was killed while saving.
    """
    steps = {
        int(path.parent.name.removeprefix("checkpoint-")): path.parent
        for path in folder.glob("checkpoint-*/trainer_state.json")
        if path.parent.name.removeprefix("checkpoint-").isdecimal() and path.stat().st_size > 0
    }
    return str(steps[max(steps)]) if steps else None
