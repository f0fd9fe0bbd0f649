"""`RolloutBuffer`: the micro-batches of a rollout, from which a resumed run continues."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from accelerate import Accelerator
from transformers.utils import logging
from trl.trainer.utils import split_tensor_dict

from ..config import MiniLLMConfig
from ..hardware.precision import OverflowCounter
from ..rollouts.buffer import Batch, by_length, deal_rows, pin_states, trim, window_counts
from ..rollouts.keyed_random import ROLLOUT_ORDER
from ..teacher_server.addresses import served_names
from .nonfinite_rows import leave_out_faulty
from .run_settings import plain

logger = logging.get_logger(__name__)

# Settings of sampling, scoring and batching: if one changes, the rest of a rollout buffer cannot be used
_MADE_BY = (
    *("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"),
    *("num_generations", "num_iterations", "seed"),
    *("teacher_mixed_alpha", "temperature", "kd_temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_completion_length", "eos_tokens", "importance_weighting", "importance_weight_cap"),
    *("gamma", "length_normalization", "discounted_length", "include_current_reward", "rkl_advantage"),
    *("reward_scale", "reward_clip", "whiten_advantages", "reward_weights", "scale_rewards"),
    *("reward_estimator", "advantage_baseline"),
    *("horizon_start", "horizon_steps", "iw_opd_gamma", "top_entropy_quantile", "lmbda", "skd_top_k"),
    *("cross_tokenizer", "offline_teacher"),
    *("teacher_server_top_k", "teacher_server_tokens"),
)


class RolloutBuffer:
    """The micro-batches of a rollout, and the position in the passes over them.

    Args:
        args ([`MiniLLMConfig`]): arguments of the run.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        teacher (`str`): digest or name of the teacher. With another teacher, a saved buffer is discarded.
    """

    def __init__(self, args: MiniLLMConfig, accelerator: Accelerator, teacher: str):
        assert args.steps_per_generation is not None  # set by GRPOConfig
        self.args = args
        self.accelerator = accelerator
        self.batches: list[Batch] | None = None  # of one pass
        self.seconds = 0.0  # spent on rollouts since the process started
        self.micro_batches: int = args.steps_per_generation  # of one pass
        self._teacher = teacher
        self._position = 0  # micro-batches handed out

    @property
    def kept_on_cpu(self) -> set[str]:
        """Return the names of the tensors that are not on the device of the updates."""
        return {"teacher_hidden_states"} if self.args.teacher_hidden_states == "cpu" else set()

    @property
    def _is_used_up(self) -> bool:
        return self._position % (self.micro_batches * self.args.num_iterations) == 0

    @property
    def next_rollout(self) -> tuple[int, int]:
        """Return the number of the rollout after the current one, and the optimizer steps before it."""
        of_a_rollout = self.micro_batches * self.args.num_iterations
        number = self._position // of_a_rollout + 1
        return number, number * of_a_rollout // self.args.gradient_accumulation_steps

    def next(self, step: int, make_rollout: Callable[[], Batch]) -> tuple[int, Batch]:
        """Return the number of a micro-batch in its optimizer step, and the micro-batch.

        Args:
            step (`int`): optimizer steps so far.
            make_rollout (`Callable`): samples and scores a rollout, whose rows refill the buffer when it is used up.
        """
        accumulation = self.args.gradient_accumulation_steps
        if self.batches is None:  # also in a resumed run without its buffer
            self._position = step * accumulation
        if self.batches is None or self._is_used_up:
            started = time.perf_counter()
            self.batches = self._deal(make_rollout(), step)
            self.seconds += time.perf_counter() - started
        batch = self.batches[self._position % self.micro_batches]
        number = self._position % accumulation
        self._position += 1
        return number, batch

    def _deal(self, batch: Batch, step: int) -> list[Batch]:
        """Assign the rows of a rollout to micro-batches."""
        num_rows = len(batch["prompt_ids"])
        num_steps = self.micro_batches // self.args.gradient_accumulation_steps
        first_row = self.accelerator.process_index * num_rows
        order = deal_rows(num_rows, num_steps, first_row, self.args.seed, ROLLOUT_ORDER, step)
        lengths = (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)).cpu()
        order = order[by_length(lengths[order], num_steps)]
        dealt: dict[str, Any] = {key: values[order.to(values.device)] for key, values in batch.items()}
        parts: list[Any] = split_tensor_dict(dealt, self.micro_batches)
        return self._count_windows([pin_states(trim(part), self.accelerator.device) for part in parts])

    def _count_windows(self, batches: list[Batch]) -> list[Batch]:
        """Add the trained tokens and rows of its optimizer step, on all processes, to each micro-batch."""
        window = self.args.gradient_accumulation_steps
        counts = {
            name: self.accelerator.reduce(count, reduction="sum")
            for name, count in window_counts(batches, window).items()
        }
        return [
            {**batch, **{name: sums[i // window] for name, sums in counts.items()}} for i, batch in enumerate(batches)
        ]

    def halves(self, num_rows: int) -> torch.Tensor:
        """Return the half of the buffer, 0 or 1, of each row of this process `(B,)`.

        Completions of a prompt are in the same half. Each block of neighbours gives one row to each optimizer step, so
        halves of whole blocks also split each step into halves.
        """
        first, group = self.accelerator.process_index * num_rows, self.args.num_generations
        assert group is not None  # set by GRPOConfig
        rows = torch.arange(first, first + num_rows, device=self.accelerator.device)
        num_steps = self.micro_batches // self.args.gradient_accumulation_steps
        unit = math.lcm(num_steps, group)
        if 2 * unit > num_rows * self.accelerator.num_processes:
            unit = group
        return rows // unit % 2

    # Resuming

    def reset(self) -> None:
        """Drop the buffer: the first step of a run samples."""
        self.batches = None

    def state(self) -> dict[str, Any]:
        """Return the position, the micro-batches unless they are used up, and the settings that made them."""
        rollouts = None
        if not self._is_used_up:
            assert self.batches is not None
            rollouts = [pack(batch) for batch in self.batches]
        return {"made_by": self._made_by(), "step": self._position, "rollouts": rollouts}

    def restore(self, saved: dict[str, Any]) -> None:
        """Continue with saved micro-batches, unless the settings that made them have changed."""
        if saved["rollouts"] is None:
            return
        if changed := self.changed_settings(saved):
            then = ", ".join(f"{name}={value}" for name, value in changed.items())
            logger.warning(
                f"The checkpoint's rollouts were made with {then}. They are discarded; new ones are sampled."
            )
            return
        self._position = saved["step"]
        self.batches = [self.unpack(batch) for batch in saved["rollouts"]]

    def changed_settings(self, saved: dict[str, Any]) -> dict[str, Any]:
        """Return the settings that made the rollouts of a checkpoint, as far as they have changed."""
        made_by = self._made_by()
        before = saved.get("made_by") or saved["cut_by"]  # the name in older checkpoints, with fewer settings
        return {name: value for name, value in before.items() if value != made_by[name]}

    def _made_by(self) -> dict[str, Any]:
        """Return the settings that the rollout buffer depends on."""
        values = {name: plain(getattr(self.args, name)) for name in _MADE_BY}
        # a server's states are no hidden states, even those of a teacher with the same digest
        stored = self.args.offline_teacher is not None
        is_served = self.args.teacher_server_url is not None or stored or served_names(self.args) or False
        return {**values, "teacher_model": self._teacher, "teacher_is_served": is_served}

    def unpack(self, batch: Batch) -> Batch:
        """Place the tensors of a checkpoint."""
        device, stay = self.accelerator.device, self.kept_on_cpu
        placed = {name: values if name in stay else values.to(device) for name, values in batch.items()}
        return pin_states(placed, device)


def pack(batch: Batch) -> Batch:
    """Copy a batch to the CPU. Cloning keeps `torch.save` from writing the whole storage behind a view."""
    return {name: values.detach().cpu().clone() for name, values in batch.items()}


class RolloutCounts:
    """The counts of completions that were left out of the training, and of steps that overflowed in float16.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        overflows ([`OverflowCounter`], *optional*): counter of a run in float16.
    """

    def __init__(self, accelerator: Accelerator, overflows: OverflowCounter | None):
        self.accelerator = accelerator
        self.overflows = overflows
        self.left_out = 0  # completions of this run, on all processes

    def leave_out_faulty(self, batch: Batch) -> Batch:
        """Mask the tokens of faulty rows, and count these rows over all processes."""
        flags = self.accelerator.gather(batch["faulty"])
        if count := int(flags.sum()):
            self.left_out += count
            if self.accelerator.is_main_process:
                logger.warning(f"{count} of {len(flags)} completions are left out of the update.")
        return leave_out_faulty(batch)

    def metrics(self, engine: Any) -> dict[str, float]:
        """Return the counts to log; `engine` has the loss scale under DeepSpeed."""
        counts = {"nonfinite_completions": float(self.left_out)}
        return counts if self.overflows is None else counts | self.overflows.metrics(engine)

    def reset(self) -> None:
        """Start a run."""
        self.left_out = 0

    def state(self) -> dict[str, Any]:
        """Return the counts to resume with."""
        overflows = None if self.overflows is None else self.overflows.skipped_steps
        return {"nonfinite_completions": self.left_out, "overflows": overflows}

    def restore(self, saved: dict[str, Any]) -> None:
        """Resume with the counts that [`state`] returned."""
        self.left_out = saved["nonfinite_completions"]
        if self.overflows is not None and saved["overflows"] is not None:
            self.overflows.skipped_steps = saved["overflows"]


def loss_normalizer(batch: Batch, mask: torch.Tensor, reduction: str, accelerator: Accelerator) -> torch.Tensor:
    """Return the tokens or rows of the optimizer step by process, whose gradients DDP averages.

    Args:
        batch (`dict` of `torch.Tensor`): a micro-batch of the buffer. A batch outside training counts as a step.
        mask (`torch.Tensor` of shape `(B, T)`): True on the trained tokens.
        reduction (`str`): `loss_reduction`.
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
    """
    of_sequences = reduction == "sequence_sum"
    total = batch.get("window_rows" if of_sequences else "window_tokens")
    if total is None:
        own = torch.tensor(len(mask), device=mask.device) if of_sequences else mask.sum()
        total = accelerator.reduce(own, reduction="sum")
    return total / accelerator.num_processes
