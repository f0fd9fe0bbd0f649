"""`Turn`: what a call of the sampler reads besides the weights, for the rollout that is due and for the next one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from datasets import Dataset
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from ..positions import rollout_horizon
from ..rollouts.buffer import Batch
from ..rollouts.keyed_random import COINS, turn_keys
from ..rollouts.rollout_sampler import RolloutSampler, SampledTurn
from ..rollouts.sampling import left_pad
from .prompt_order import EpochRepeatSampler
from .teacher_choice import index_entry, row_teachers

if TYPE_CHECKING:
    from .teacher_mixed_trainer import TeacherMixedTrainer


class Turn(NamedTuple):
    """Prompts and random numbers of a call of the sampler. With the weights, they determine its samples.

    Attributes:
        prompt_ids, keys, coin_key, max_new_tokens, teacher_index: see [`RolloutSampler.sample`].
    """

    prompt_ids: list[list[int]]
    keys: list[tuple[int, ...]]
    coin_key: tuple[int, ...]
    max_new_tokens: int
    teacher_index: list[int]

    def sample(
        self,
        sampler: RolloutSampler,
        student: PreTrainedModel,
        with_scores: bool = True,
        given: Sequence[list[int] | None] = (),
    ) -> SampledTurn:
        """Sample the completions, except for given ones, see [`RolloutSampler.sample`]."""
        return sampler.sample(
            student,
            self.prompt_ids,
            self.keys,
            self.coin_key,
            self.max_new_tokens,
            with_scores,
            given,
            self.teacher_index,
        )

    def batch(self, completions: Sequence[Sequence[int]], pad_token_id: int, device: torch.device) -> Batch:
        """Return prompts and completions, padded as GRPO pads them."""
        prompt_ids, prompt_mask = left_pad(self.prompt_ids, pad_token_id)
        rows = [torch.tensor(completion) for completion in completions]
        completion_ids = pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
        completion_mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
        batch = {
            "prompt_ids": prompt_ids,
            "prompt_mask": prompt_mask.long(),
            "completion_ids": completion_ids,
            "completion_mask": completion_mask,
        }
        return {name: values.to(device) for name, values in batch.items()} | index_entry(self.teacher_index, device)


def make_turn(
    trainer: "TeacherMixedTrainer",
    prompt_ids: list[list[int]],
    max_new_tokens: int,
    step: int,
    number: int = 0,
    teacher_index: Sequence[int] = (),
) -> Turn:
    """Return a turn of a rollout, with a key for the tokens of each row, and one for the coins.

    Args:
        trainer ([`TeacherMixedTrainer`]): the trainer.
        prompt_ids (`list[list[int]]`): prompts of this process, without padding.
        max_new_tokens (`int`): length limit.
        step (`int`): optimizer steps before the rollout.
        number (`int`, *optional*, defaults to `0`): number of the turn; only tools make more than one.
        teacher_index (`Sequence[int]`, *optional*): number of each prompt's teacher, if there are several.
    """
    args, process, training = trainer.args, trainer.accelerator.process_index, trainer.model.training
    rows = args.per_device_train_batch_size * trainer.buffer.micro_batches if training else args.eval_batch_size
    group = None if training else trainer.num_generations_eval
    keys = turn_keys(prompt_ids, args.seed, step, number, process * rows, group)
    coin_key: tuple[int, ...] = (args.seed, COINS)  # the keys of the rows complete it
    if args.shared_coins:
        # all processes call a sharded teacher at the same time, so they share their coins
        coin_key = (*coin_key, step, 0 if trainer._teacher.is_sharded else process, number + 1)
    return Turn(prompt_ids, keys, coin_key, max_new_tokens, list(teacher_index))


def next_turn(trainer: "TeacherMixedTrainer") -> Turn | None:
    """Return the turn of the rollout after the current one of a training; None if the run ends before it."""
    args, dataset = trainer.args, trainer.train_dataset
    assert isinstance(dataset, Dataset), "a stream is refused with overlap_rollouts"
    number, step = trainer.buffer.next_rollout
    if step >= trainer.state.max_steps:
        return None
    size = args.per_device_train_batch_size * trainer.buffer.micro_batches
    sampler = EpochRepeatSampler.of(trainer._get_train_sampler(dataset))
    numbers = sampler.rollout(number)[trainer.accelerator.process_index * size :][:size]
    rows = [dataset[row] for row in numbers]
    prompt_ids, *_ = trainer._tokenize_prompts([row["prompt"] for row in rows])
    horizon = rollout_horizon(step, trainer.max_completion_length, args.horizon_start, args.horizon_steps)
    teacher_index = row_teachers(rows, args.teacher_column, trainer._teacher_names)
    return make_turn(trainer, prompt_ids, horizon, step, teacher_index=teacher_index)
