"""`ResumableRollouts`: a `GRPOTrainer` whose runs go on within a rollout buffer, with the prompts next in turn."""

import time
from collections import defaultdict
from typing import Any

import torch
from datasets import Dataset, IterableDataset
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
from .nonfinite_rows import leave_out_faulty
from .run_settings import plain

logger = logging.get_logger(__name__)

PROMPT_INDEX = "minillm_prompt_index"  # column of the training dataset: where a prompt stands in it
FILLER = "minillm_filler"  # column of the rows that an evaluation on several processes does not count

# What a rollout buffer was sampled, scored and cut by: under other values it cannot be used up
_MADE_BY = (
    *("per_device_train_batch_size", "steps_per_generation", "gradient_accumulation_steps"),
    *("num_generations", "num_iterations", "seed"),
    *("teacher_mixed_alpha", "temperature", "kd_temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_completion_length", "eos_tokens", "importance_weighting", "importance_weight_cap"),
    *("gamma", "length_normalization", "discounted_length", "include_current_reward", "rkl_advantage"),
    *("reward_scale", "reward_clip", "whiten_advantages", "reward_weights", "scale_rewards"),
)


class ResumableRollouts(MeasuredTrainer, GRPOTrainer):
    """What GRPO does not restore: its rollout buffer and the step within it, its metrics, and the order of prompts."""

    args: MiniLLMConfig
    _nonfinite_completions = 0  # that the training has left out so far, on all processes
    rollout_seconds = 0.0  # spent on rollouts of the training, since the process began
    _overflow_counter: OverflowCounter | None
    _given: dict[str, dict[str, Any] | None]  # descriptions of the models and data beyond the student and the prompts

    def _blank(self, row: Row) -> Row:
        return {**row, FILLER: True}

    @property
    def _repeats_in_evaluation(self) -> int:
        return self.num_generations_eval

    def _next_micro_batch(self, generation_batch: list[dict[str, Any]]) -> Batch:
        """Return the next micro-batch of the buffer, which is filled by a rollout once it is used up."""
        accumulation = self.args.gradient_accumulation_steps
        if self._buffered_inputs is None:  # a resumed run starts at a fresh rollout, in step with the optimizer
            self._step = self.state.global_step * accumulation
        generate_every = self.args.steps_per_generation * self.num_iterations
        if self._step % generate_every == 0 or self._buffered_inputs is None:
            started = time.perf_counter()
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = self._deal(self._leave_out_faulty(batch))
            self.rollout_seconds += time.perf_counter() - started
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _leave_out_faulty(self, batch: Batch) -> Batch:
        """A rollout without the tokens of faulty rows, which are counted over all processes."""
        flags = self.accelerator.gather(batch["faulty"])
        if count := int(flags.sum()):
            self._nonfinite_completions += count
            if self.accelerator.is_main_process:
                logger.warning(f"{count} of {len(flags)} completions are left out of the update.")
        return leave_out_faulty(batch)

    def _deal(self, batch: Batch) -> list[Batch]:
        """Deal the rows of a rollout to its micro-batches."""
        num_rows, num_steps = len(batch["prompt_ids"]), self.args.steps_per_generation
        num_steps //= self.args.gradient_accumulation_steps
        first_row = self.accelerator.process_index * num_rows
        order = deal_rows(num_rows, num_steps, first_row, self.args.seed, ROLLOUT_ORDER, self.state.global_step)
        lengths = (batch["prompt_mask"].sum(dim=1) + batch["completion_mask"].sum(dim=1)).cpu()
        order = order[by_length(lengths[order], num_steps)]
        dealt = {key: values[order.to(values.device)] for key, values in batch.items()}
        return self._count_windows([trim(part) for part in split_tensor_dict(dealt, self.args.steps_per_generation)])

    def _count_windows(self, batches: list[Batch]) -> list[Batch]:
        window = self.args.gradient_accumulation_steps
        counts = {
            name: self.accelerator.reduce(count, reduction="sum")
            for name, count in window_counts(batches, window).items()
        }
        return [
            {**batch, **{name: sums[i // window] for name, sums in counts.items()}} for i, batch in enumerate(batches)
        ]

    def _forget_last_run(self) -> None:
        super()._forget_last_run()
        self._buffered_inputs = None
        self._nonfinite_completions = 0

    def _run_state(self) -> dict[str, Any]:
        within_buffer = self._step % (self.args.steps_per_generation * self.num_iterations) != 0
        return {
            **super()._run_state(),
            "made_by": self._made_by(),
            "step": self._step,
            "rollouts": _pack(self._buffered_inputs) if within_buffer else None,
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
        for name, values in saved["completions"].items():
            _extend(self._logs[name], values)
        if self._overflow_counter is not None and saved["overflows"] is not None:
            self._overflow_counter.skipped_steps = saved["overflows"]
        made_by = self._made_by()
        before = saved.get("made_by") or saved["cut_by"]  # of older checkpoints, which have fewer
        changed = {name: value for name, value in before.items() if value != made_by[name]}
        if saved["rollouts"] is None:
            return
        if changed:
            then = ", ".join(f"{name}={value}" for name, value in changed.items())
            logger.warning(f"The checkpoint's rollouts were made with {then}: they are dropped, and new ones sampled.")
            return
        self._step = saved["step"]
        self._buffered_inputs = [self._unpack(batch) for batch in saved["rollouts"]]

    def _made_by(self) -> dict[str, Any]:
        teacher = self._given["teacher_model"]
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
    """TRL's `RepeatSampler` whose order is a function of the epoch, the one that it has after that many epochs."""

    epoch = 0

    @classmethod
    def of(cls, sampler: RepeatSampler) -> "EpochRepeatSampler":
        """Return a sampler with the settings of TRL's."""
        names = ("data_source", "mini_repeat_count", "batch_size", "repeat_count", "shuffle", "seed")
        return cls(**{name: getattr(sampler, name) for name in names})

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch that is read next."""
        self.epoch = epoch

    def __iter__(self):
        if self.shuffle:
            self.generator.manual_seed(self.seed)
            for _ in range(self.epoch):
                torch.randperm(self.num_samples, generator=self.generator)
        yield from super().__iter__()


def number_prompts(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Let each row say where it stands in the dataset, for messages about it. A stream begins again at its end.

    So a run's place in a stream is the number of rows that it has read, which transformers knows of a resumed run; of
    passes over a stream, whose lengths it cannot know, it does not.
    """
    if isinstance(dataset, Dataset):
        return dataset.add_column(PROMPT_INDEX, range(len(dataset)))
    return dataset.map(lambda row, index: {**row, PROMPT_INDEX: index}, with_indices=True).repeat(None)


def _pack(batches: list[Batch]) -> list[Batch]:
    """Batches on the CPU; each tensor has memory of its own, of which nothing is saved that it does not show."""
    return [{name: values.detach().cpu().clone() for name, values in batch.items()} for batch in batches]


def _plain(logged: Any) -> Any:
    """Nested dicts and deques as dicts and lists, which can be read back without running code."""
    return {name: _plain(values) for name, values in logged.items()} if isinstance(logged, dict) else list(logged)


def _extend(logged: defaultdict | Any, values: Any) -> None:
    if isinstance(values, dict):
        for name, more in values.items():
            _extend(logged[name], more)
    else:
        logged.extend(values)
