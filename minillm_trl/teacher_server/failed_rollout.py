"""A run whose teacher servers fail: it saves the last optimizer step, and resumes exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ..training.random_state import random_state, set_random_state
from .identity import TeacherServerError

if TYPE_CHECKING:
    from ..training.reliable_trainer import ReliableTrainer


@contextmanager
def saving_checkpoint(trainer: "ReliableTrainer") -> Iterator[None]:
    """Save a checkpoint of the last optimizer step if the servers fail in a rollout of training.

    The rollout has already added metrics and drawn random numbers, so the state that is saved is the one from before.
    All processes fail together, see [`~minillm_trl.teacher_server.remote_teacher.RemoteTeacher`].

    Raises:
        TeacherServerError: with the checkpoint in its message.
    """
    before, generators = trainer.resume.state(), random_state()
    tokens = trainer.state.num_input_tokens_seen
    try:
        yield
    except TeacherServerError as error:
        step = trainer.state.global_step
        if step == 0:
            raise
        checkpoint = Path(trainer.args.output_dir or ".") / f"checkpoint-{step}"
        if not checkpoint.is_dir():
            trainer.state.num_input_tokens_seen = tokens
            set_random_state(generators)
            trainer._save_checkpoint(trainer.model, None, before)
        raise TeacherServerError(
            f"{error} Nothing is lost: resume_from_checkpoint=True continues from {checkpoint}."
        ) from error
