"""Filler rows, which pad the last batch of an evaluation on several processes and which metrics leave out.

All processes need the same number of rows. accelerate repeats the first rows, which metrics then count twice. With
fillers instead, a metric has the same value on any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils import data

Row = dict[str, Any]


class FilledDataset(data.Dataset):
    """The rows of a dataset, padded with fillers to a multiple of the batch over all processes.

    Args:
        rows (`Sequence[dict]`): at least one row.
        multiple (`int`): the length becomes a multiple of this number.
        blank (`Callable`): turns a row into a filler.
    """

    def __init__(self, rows: Sequence[Row], multiple: int, blank: Callable[[Row], Row]):
        self.rows = rows
        self.blank = blank
        self.length = -(-len(rows) // multiple) * multiple

    @property
    def total_dataset_length(self) -> int:
        """Return the number of real rows; accelerate's `gather_for_metrics` drops the others."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if index < len(self.rows):
            return self.rows[index]
        return self.blank(self.rows[index % len(self.rows)])


class FilledStream(data.IterableDataset):
    """The rows of a stream, padded in the same way. Its length is only known at its end."""

    def __init__(self, rows: data.IterableDataset, multiple: int, blank: Callable[[Row], Row]):
        self.rows = rows
        self.multiple = multiple
        self.blank = blank

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, which determines the order of a shuffled stream."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        count = 0
        for row in self.rows:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            yield self.blank(row)
