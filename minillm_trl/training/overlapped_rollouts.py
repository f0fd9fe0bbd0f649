"""`OverlappedRollouts`: the next rollout is sampled in a thread, while the student trains on the current one."""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel
from transformers.utils import logging

from ..errors import UserError
from ..models.student_copy import RolloutCopy
from ..rollouts.rollout_sampler import SampledTurn, ScoredRows
from ..rollouts.scores import RolloutScores
from .logged_metrics import Fraction
from .rollout_buffer import RolloutBuffer, pack
from .turns import Turn

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer

logger = logging.get_logger(__name__)


class _Stopped(Exception):
    """Ends a rollout that is not needed any more."""


@dataclass
class _Ahead:
    """A rollout that is sampled ahead of its use.

    Attributes:
        turn ([`Turn`]): its prompts and random numbers.
        sampled (`Future`): its completions and scores.
        thread (`threading.Thread`, *optional*): samples it; None for one of a checkpoint.
    """

    turn: Turn
    sampled: "Future[SampledTurn]"
    thread: threading.Thread | None = None


class OverlappedRollouts:
    r"""Sample rollout k + 1 while the student trains on rollout k.

    When rollout k has been scored, its updates have not begun. Their weights are copied, and a thread samples rollout
    k + 1 from the copy. So the policy that samples rollout k + 1 is

    $$ \mu = \alpha p + (1 - \alpha) q_{\theta_k}, $$

    where $\theta_k$ are the weights before the updates on rollout k: one buffer stale. The thread also scores its
    samples, under the copy and under the teacher. So all constants of the loss are those of $q_{\theta_k}$: the
    log-probs $\log \mu$ of the ratio, rewards, expected rewards and entropies.

    With `rollout_device`, copy and teacher are on a device of their own, and the thread computes there alone. Each
    sampled rollout is moved to the device of the updates in the main thread, where it is due.

    The samples depend on the copy and on the keys of their random numbers, not on how long the updates take. The
    thread draws from no generator and makes no collective call. What else samples or reads the teacher (evaluation),
    and every checkpoint, waits for it. A checkpoint stores its samples. So a resumed run continues with them, and is
    the uninterrupted run.

    An error in the thread is raised where its rollout is waited for, with the traceback of the thread.

    Args:
        copy ([`RolloutCopy`]): has weights of its own for all that is trained.
        buffer ([`RolloutBuffer`]): the trainer's, which knows whether rollouts of a checkpoint can be used.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        teachers (`Sequence[PreTrainedModel]`, *optional*): the teachers that the thread calls.
    """

    def __init__(
        self,
        copy: RolloutCopy,
        buffer: RolloutBuffer,
        accelerator: Accelerator,
        teachers: Sequence[PreTrainedModel] = (),
    ):
        self.copy = copy
        self._buffer = buffer
        self._accelerator = accelerator
        self._ahead: _Ahead | None = None
        self._stop = threading.Event()
        self._stream: torch.cuda.Stream | None = None  # of the thread, on the device of the copy
        self._counts = [0, 0]  # rollouts since the last log, and those of them that were sampled ahead
        self._seconds = 0.0  # of waiting for them
        self._models = (copy.model, *teachers)

    @contextmanager
    def _stoppable(self) -> Iterator[None]:
        """Let a stop end the block at the next forward pass of the copy or a teacher.

        The hooks go with the block: a teacher may belong to the caller, and would keep this object and its copy.
        """

        def end_if_stopped(*unused: Any) -> None:
            if self._stop.is_set():
                raise _Stopped

        hooks = [model.base_model.register_forward_pre_hook(end_if_stopped) for model in self._models]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def start(
        self, student: PreTrainedModel, turn: Turn, sample: Callable[[PreTrainedModel, Turn], SampledTurn]
    ) -> None:
        """Copy the current weights, and start to sample from them.

        Args:
            student ([`~transformers.PreTrainedModel`]): the trained model, not wrapped.
            turn ([`Turn`]): prompts and random numbers of the rollout.
            sample (`Callable[[PreTrainedModel, Turn], SampledTurn]`): samples from the copy; runs in the thread.
        """
        self.copy.refresh(student)
        sampled: Future[SampledTurn] = Future()
        stream = self._own_stream()

        def run() -> None:
            try:  # autocast, the current stream and its device belong to a thread
                with self._stoppable(), torch.cuda.stream(stream), self.copy.precision(self._accelerator):
                    found = sample(self.copy.model, turn)
                if stream is not None:
                    stream.synchronize()
            except BaseException as error:
                sampled.set_exception(error)
            else:
                sampled.set_result(found)

        thread = threading.Thread(target=run, name="next rollout", daemon=True)
        self._ahead = _Ahead(turn, sampled, thread)
        thread.start()

    def _own_stream(self) -> torch.cuda.Stream | None:
        """Return a CUDA stream that runs after the work so far; None on other devices.

        The copy's device waits for copies from another device by itself, in its current stream.
        """
        device = self.copy.model.device
        if device.type != "cuda":
            return None
        if self._stream is None:  # one for all rollouts, since memory that is freed serves its own stream alone
            self._stream = torch.cuda.Stream(device)
        self._stream.wait_stream(torch.cuda.current_stream(device))
        return self._stream

    def wait(self) -> None:
        """Wait until the rollout is sampled, if one is.

        Raises:
            Exception: what the thread raised.
        """
        if self._ahead is None or self._ahead.thread is None:
            return
        started = time.perf_counter()
        sampled = self._ahead.sampled.result()
        self._seconds += time.perf_counter() - started
        self._ahead.thread.join()
        self._ahead.thread = None
        self.copy.release()
        for tensor in _tensors(sampled):
            if tensor.is_cuda:  # its memory belongs to the thread's stream, which must not use it before this stream
                tensor.record_stream(torch.cuda.current_stream(tensor.device))

    def take(self, turn: Turn) -> SampledTurn | None:
        """Return the rollout that was sampled ahead, after waiting for it; None if there is none for this turn.

        There is none at the start of a run, and in a resumed run whose prompts, teachers or seed have changed.
        Completions that were mixed with other coins are still samples of the mixture, so they are taken.
        """
        self.wait()
        ahead, self._ahead = self._ahead, None
        self._counts[0] += 1
        if ahead is None:
            return None
        if ahead.turn._replace(coin_key=turn.coin_key) != turn:
            logger.warning(
                "The rollout that was sampled ahead has other prompts or teachers. It is discarded, and another is "
                "sampled now."
            )
            return None
        self._counts[1] += 1
        return ahead.sampled.result()

    def __enter__(self) -> None:
        """Begin a training."""

    def __exit__(self, *unused: object) -> None:
        """End a training, also one that failed or was interrupted, and with it the thread."""
        self.stop()

    def stop(self) -> None:
        """End the thread after the current forward pass, if it runs, and drop its rollout."""
        ahead, self._ahead = self._ahead, None
        if ahead is not None and ahead.thread is not None:
            self._stop.set()
            ahead.thread.join()
            self._stop.clear()
            self.copy.release()

    def take_totals(self) -> dict[str, Fraction]:
        """Return the mean staleness of the rollouts since the last call, in buffers, and the seconds of waiting."""
        (rollouts, ahead), seconds = self._counts, self._seconds
        self._counts, self._seconds = [0, 0], 0.0
        return {"rollout/staleness": (ahead, rollouts), "rollout/wait_seconds": (seconds, rollouts)}

    # Resuming

    def reset(self) -> None:
        """Drop the rollout of an earlier training."""
        self.stop()

    def state(self) -> dict[str, Any]:
        """Return the rollout for a checkpoint, after waiting for it."""
        self.wait()
        if self._ahead is None:
            return {"rollout_ahead": None}
        sampled = self._ahead.sampled.result()
        scores = [
            (rows, pack({name: values for name, values in part._asdict().items() if values is not None}))
            for rows, part in sampled.scores.parts
        ]
        return {"rollout_ahead": {**self._ahead.turn._asdict(), "completions": sampled.completions, "scores": scores}}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue with the rollout that [`state`] returned, unless the settings that made it have changed."""
        ahead = saved.get("rollout_ahead")  # checkpoints of runs without overlap have none
        if ahead is None:
            return
        if changed := self._buffer.changed_settings(saved):
            then = ", ".join(f"{name}={value}" for name, value in changed.items())
            logger.warning(f"The checkpoint's next rollout was sampled with {then}. It is discarded.")
            return
        parts = [(rows, RolloutScores(**self._buffer.unpack(values))) for rows, values in ahead["scores"]]
        sampled: Future[SampledTurn] = Future()
        sampled.set_result(SampledTurn(ahead["completions"], ScoredRows(parts)))
        self._ahead = _Ahead(Turn(*(ahead[name] for name in Turn._fields)), sampled)


def _tensors(sampled: SampledTurn) -> list[torch.Tensor]:
    return [values for _, part in sampled.scores.parts for values in part if values is not None]


def overlapped_rollouts(trainer: "TeacherMixedTrainer") -> OverlappedRollouts | None:
    """Return what samples the trainer's rollouts ahead, or None without `overlap_rollouts`.

    Raises:
        UserError: for a student or a teacher that all processes have to call together.
    """
    if not trainer.args.overlap_rollouts:
        return None
    for strategy, is_used in (("FSDP", trainer.is_fsdp_enabled), ("DeepSpeed", trainer.is_deepspeed_enabled)):
        if is_used:
            raise UserError(
                f"overlap_rollouts=True is supported with DDP alone, but this run uses {strategy}. Use DDP, or set "
                "overlap_rollouts=False."
            )
    if trainer._teacher.is_sharded:
        raise UserError(
            "overlap_rollouts=True calls the teacher from a thread of each process, but this teacher_model is sharded "
            "over the processes, which have to call it together. Pass its name or folder, or set "
            "overlap_rollouts=False."
        )
    assert trainer._rollout_copy is not None  # `rollout_copy` makes one for this purpose
    return OverlappedRollouts(trainer._rollout_copy, trainer.buffer, trainer.accelerator, trainer._teacher.models)
