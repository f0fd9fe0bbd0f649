"""The order of prompts, which depends on seed and epoch alone, and the columns that mark rows."""

from itertools import islice

import torch
from datasets import Dataset, IterableDataset
from torch.utils.data import Sampler
from trl.trainer.utils import RepeatSampler

from .evaluation_rows import Row

PROMPT_INDEX = "minillm_prompt_index"  # column of the training dataset: number of the row
FILLER = "minillm_filler"  # column that marks the filler rows of an evaluation


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

    def rollout(self, number: int) -> list[int]:
        """Return the numbers of the rows of a rollout of all processes; rollouts count from the start of the run."""
        epoch, number = divmod(number, self.num_samples // self.batch_size)
        once = EpochRepeatSampler.of(self)
        once.repeat_count, once.epoch = 1, epoch
        size = self.batch_size * self.mini_repeat_count
        return list(islice(once, number * size, (number + 1) * size))

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


def mark_filler(row: Row) -> Row:
    """Return a filler: a row that samples a completion, but does not count."""
    return {**row, FILLER: True}


def split_columns(rows: list[Row]) -> tuple[list[int], list[bool], list[Row]]:
    """Split rows into their numbers in the dataset (-1 if unknown), whether they count, and the user's columns."""
    added = (PROMPT_INDEX, FILLER)
    return (
        [row.get(PROMPT_INDEX, -1) for row in rows],
        [FILLER not in row for row in rows],
        [{name: row[name] for name in row if name not in added} for row in rows],
    )
