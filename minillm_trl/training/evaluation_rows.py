"""Rows that fill up the last batch of an evaluation on several processes, and that no metric counts.

All processes need the same number of rows. accelerate repeats the first rows, which metrics then count twice. Here
fillers take their place, so a metric has the same value on any number of processes.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch.utils import data

Row = dict[str, Any]


class FilledDataset(data.Dataset):
    """The rows of a dataset, then fillers up to a multiple of the rows that all processes evaluate at a time.

    Args:
        rows (`Sequence[dict]`): at least one.
        multiple (`int`): of which the length is to be one.
        blank (`Callable`): makes a filler of a row.
    """

    def __init__(self, rows: Sequence[Row], multiple: int, blank: Callable[[Row], Row]):
        self.rows = rows
        self.blank = blank
        self.length = -(-len(rows) // multiple) * multiple

    @property
    def total_dataset_length(self) -> int:
        """Number of rows that count; accelerate drops the others from what `gather_for_metrics` gathers."""
        return len(self.rows)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Row:
        if index < len(self.rows):
            return self.rows[index]
        return self.blank(self.rows[index % len(self.rows)])


class FilledStream(data.IterableDataset):
    """The same for a stream, whose length is known at its end."""

    def __init__(self, rows: data.IterableDataset, multiple: int, blank: Callable[[Row], Row]):
        self.rows = rows
        self.multiple = multiple
        self.blank = blank

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of a stream that is shuffled."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[Row]:
        count = 0
        for row in self.rows:
            count += 1
            yield row
        for _ in range(-count % self.multiple):
            yield self.blank(row)
