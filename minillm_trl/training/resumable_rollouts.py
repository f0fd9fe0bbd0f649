"""`ResumableRollouts`: a `GRPOTrainer` that resumes mid-buffer and continues with the next prompts."""

import time
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from transformers import TrainerControl, TrainerState
from transformers.utils import logging
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler, split_tensor_dict

from ..config import MiniLLMConfig
from ..hardware.precision import OverflowCounter
from ..rollouts.buffer import Batch, by_length, deal_rows, trim, window_counts
from ..rollouts.keyed_random import ROLLOUT_ORDER
from .evaluation_rows import Row
from .measured_trainer import MeasuredTrainer
from .mixing_choice import MixingChoice
from .nonfinite_rows import leave_out_faulty
from .run_settings import plain

logger = logging.get_logger(__name__)

PROMPT_INDEX = "minillm_prompt_index"  # column of the training dataset: number of the row
FILLER = "minillm_filler"  # column that marks the filler rows of an evaluation

# Settings of sampling, scoring and batching: if one changes, the rest of a rollout buffer cannot be used
_MADE_BY = (
    *("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"),
    *("num_generations", "num_iterations", "seed"),
    *("teacher_mixed_alpha", "temperature", "kd_temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_completion_length", "eos_tokens", "importance_weighting", "importance_weight_cap"),
    *("gamma", "length_normalization", "discounted_length", "include_current_reward", "rkl_advantage"),
    *("reward_scale", "reward_clip", "whiten_advantages", "reward_weights", "scale_rewards"),
    *("horizon_start", "horizon_steps", "iw_opd_gamma", "top_entropy_quantile", "lmbda", "skd_top_k"),
    "teacher_server_top_k",
)


class ResumableRollouts(MeasuredTrainer, GRPOTrainer):
    """Restore what GRPO does not: the rollout buffer and the step within it, its metrics, and the order of prompts."""

    args: MiniLLMConfig
    # GRPOTrainer takes these from its arguments, which annotate them as optional and fill them in
    num_generations: int
    num_generations_eval: int
    max_completion_length: int
    _buffered_inputs: list[Batch] | None  # type: ignore[assignment]  # TRL only declares None, its first value
    _logs: dict[str, Any]  # GRPO's table of completions, by column

    rollout_seconds = 0.0  # time spent on training rollouts since the process started
    _nonfinite_completions = 0  # left out of the training so far, on all processes
    _overflow_counter: OverflowCounter | None
    _mixing: MixingChoice
    _given: dict[str, dict[str, Any] | None]  # descriptions of the teacher and the corpus of L_PT

    @property
    def _steps_per_generation(self) -> int:
        """Return the micro-batches of a rollout buffer."""
        assert self.args.steps_per_generation is not None  # set by GRPOConfig
        return self.args.steps_per_generation

    def _blank(self, row: Row) -> Row:
        return {**row, FILLER: True}

    @property
    def _repeats_in_evaluation(self) -> int:
        return self.num_generations_eval

    def _next_micro_batch(self, generation_batch: list[dict[str, Any]]) -> Batch:
        """Return the next micro-batch of the buffer, which a rollout refills when it is used up."""
        accumulation = self.args.gradient_accumulation_steps
        if self._buffered_inputs is None:  # also in a resumed run without its buffer
            self._step = self.state.global_step * accumulation
        generate_every = self._steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            started = time.perf_counter()
            with self._saved_before_rollout():
                batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = self._deal(self._leave_out_faulty(batch))
            self.rollout_seconds += time.perf_counter() - started
        return self._buffered_inputs[self._step % self._steps_per_generation]

    def _saved_before_rollout(self) -> AbstractContextManager:
        """Return a context that saves the run if the rollout fails for a reason outside of it."""
        return nullcontext()

    def _leave_out_faulty(self, batch: Batch) -> Batch:
        """Mask the tokens of faulty rows, and count these rows over all processes."""
        flags = self.accelerator.gather(batch["faulty"])
        if count := int(flags.sum()):
            self._nonfinite_completions += count
            if self.accelerator.is_main_process:
                logger.warning(f"{count} of {len(flags)} completions are left out of the update.")
        return leave_out_faulty(batch)

    def _deal(self, batch: Batch) -> list[Batch]:
        """Assign the rows of a rollout to micro-batches."""
        num_rows = len(batch["prompt_ids"])
        num_steps = self._steps_per_generation // self.args.gradient_accumulation_steps
        first_row = self.accelerator.process_index * num_rows
        order = deal_rows(num_rows, num_steps, first_row, self.args.seed, ROLLOUT_ORDER, self.state.global_step)
        lengths = (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)).cpu()
        order = order[by_length(lengths[order], num_steps)]
        dealt: dict[str, Any] = {key: values[order.to(values.device)] for key, values in batch.items()}
        parts: list[Any] = split_tensor_dict(dealt, self._steps_per_generation)
        return self._count_windows([trim(part) for part in parts])

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

    def _loss_normalizer(self, inputs: Batch, mask: torch.Tensor) -> torch.Tensor:
        """Return the tokens or rows of the optimizer step by process, whose gradients DDP averages."""
        of_sequences = self.args.loss_reduction == "sequence_sum"
        total = inputs.get("window_rows" if of_sequences else "window_tokens")
        if total is None:  # a batch outside training counts as an optimizer step
            own = torch.tensor(len(mask), device=mask.device) if of_sequences else mask.sum()
            total = self.accelerator.reduce(own, reduction="sum")
        return total / self.accelerator.num_processes

    def _counts_to_log(self) -> dict[str, float]:
        """Return the number of completions left out so far, and in float16 of steps that overflowed."""
        counts = {"nonfinite_completions": float(self._nonfinite_completions)}
        if self._overflow_counter is not None:
            counts |= self._overflow_counter.metrics(self.model_wrapped)
        return counts

    def _forget_last_run(self) -> None:
        super()._forget_last_run()
        self._buffered_inputs = None
        self._nonfinite_completions = 0
        self._mixing.forget()

    def _run_state(self) -> dict[str, Any]:
        rollouts = None
        if self._step % (self._steps_per_generation * self.num_iterations) != 0:  # the buffer is not used up
            assert self._buffered_inputs is not None
            rollouts = _pack(self._buffered_inputs)
        return {
            **super()._run_state(),
            "made_by": self._made_by(),
            "step": self._step,
            "rollouts": rollouts,
            "mixing": self._mixing.method,
            "completions": _plain(self._logs) if self.log_completions else {},
            "nonfinite_completions": self._nonfinite_completions,
            "overflows": None if self._overflow_counter is None else self._overflow_counter.skipped_steps,
        }

    def _restore_run(self, state: TrainerState, control: TrainerControl) -> None:
        super()._restore_run(state, control)
        saved = self._resumed_state
        if saved is None:
            return
        self._nonfinite_completions = saved["nonfinite_completions"]
        self._mixing.restore(saved.get("mixing", "auto"))  # which older checkpoints lack
        for name, values in saved["completions"].items():
            _extend(self._logs[name], values)
        if self._overflow_counter is not None and saved["overflows"] is not None:
            self._overflow_counter.skipped_steps = saved["overflows"]
        made_by = self._made_by()
        before = saved.get("made_by") or saved["cut_by"]  # the name in older checkpoints, with fewer settings
        changed = {name: value for name, value in before.items() if value != made_by[name]}
        if saved["rollouts"] is None:
            return
        if changed:
            then = ", ".join(f"{name}={value}" for name, value in changed.items())
            logger.warning(
                f"The checkpoint's rollouts were made with {then}. They are discarded; new ones are sampled."
            )
            return
        self._step = saved["step"]
        self._buffered_inputs = [self._unpack(batch) for batch in saved["rollouts"]]

    def _made_by(self) -> dict[str, Any]:
        """Return the settings that the rollout buffer depends on."""
        teacher = self._given["teacher_model"]
        assert teacher is not None, "MiniLLM always has a teacher"
        values = {name: plain(getattr(self.args, name)) for name in _MADE_BY}
        return {**values, "teacher_model": teacher["digest"] or teacher["is"]}

    def _own_settings(self) -> dict[str, Any]:
        return {**super()._own_settings(), **self._given, "reward_funcs": list(self.reward_func_names)}

    def _unpack(self, batch: Batch) -> Batch:
        stays = {"teacher_hidden_states"} if self.args.teacher_hidden_states == "cpu" else set()
        return {
            name: values if name in stays else values.to(self.accelerator.device) for name, values in batch.items()
        }


class EpochRepeatSampler(RepeatSampler):
    """TRL's `RepeatSampler`, with an order that depends on the epoch alone, also in a resumed run."""

    epoch = 0

    @classmethod
    def of(cls, sampler: Sampler) -> "EpochRepeatSampler":
        """Return a sampler with the settings of TRL's."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(**{name: getattr(sampler, name) for name in names})

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch to read next."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:  # TRL's generator is advanced by one permutation an epoch
            assert self.seed is not None  # GRPOTrainer passes `args.seed`
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


def number_prompts(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Add a column with the number of each row, for messages, and repeat a stream endlessly.

    The position of a run in an endless stream is the number of rows read, which transformers restores. It could not
    restore a position after several passes over a stream of unknown length.
    """
    if isinstance(dataset, Dataset):
        return dataset.add_column(PROMPT_INDEX, range(len(dataset)))
    return dataset.map(lambda row, index: {**row, PROMPT_INDEX: index}, with_indices=True).repeat(None)


def _pack(batches: list[Batch]) -> list[Batch]:
    """Copy batches to the CPU. Cloning keeps `torch.save` from writing the whole storage behind a view."""
    return [{name: values.detach().cpu().clone() for name, values in batch.items()} for batch in batches]


def _plain(logged: Any) -> Any:
    """Convert nested dicts and deques to dicts and lists, which load without running code."""
    return {name: _plain(values) for name, values in logged.items()} if isinstance(logged, dict) else list(logged)


def _extend(logged: Any, values: Any) -> None:
    """Append what [`_plain`] returned to nested dicts and deques."""
    if isinstance(values, dict):
        for name, more in values.items():
            _extend(logged[name], more)
    else:
        logged.extend(values)
