"""Filler rows, which pad the last batch of an evaluation on several processes and which metrics leave out.

All processes need the same number of rows. accelerate repeats the first rows, which metrics then count twice. With
fillers instead, a metric has the same value on any number of processes.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from torch.utils import data

from ..errors import UserError

Row = dict[str, Any]
Blank = Callable[[Row], Row]


class FilledDataset(data.Dataset):
    """The rows of a dataset, padded with fillers to a multiple of the batch over all processes.

    Args:
        rows (`Sequence[dict]`): at least one row.
        multiple (`int`): the length becomes a multiple of this number.
        blank (`Callable`): turns a row into a filler.
    """

    def __init__(self, rows: Sequence[Row], multiple: int, blank: Blank):
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
        if index >= self.length:
            raise IndexError(f"row {index} of {self.length}")  # ends a loop over the rows
        return self.blank(self.rows[index % len(self.rows)])


class FilledStream(data.IterableDataset):
    """The rows of a stream, padded in the same way. Its length is only known at its end."""

    def __init__(self, rows: data.IterableDataset, multiple: int, blank: Blank):
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


def fill_rows(
    dataset: Any, batch_size: int, accelerator: Accelerator, args: Any, blank: Blank, repeats: int = 1
) -> Any:
    """Return the dataset of an evaluation with fillers, if its processes need more rows than it has.

    Args:
        dataset: rows or a stream.
        batch_size (`int`): rows of a batch on each process.
        accelerator ([`~accelerate.Accelerator`]): its streams are then read by every process.
        args ([`~transformers.TrainingArguments`]): arguments of the run.
        blank (`Callable`): turns a row into a filler.
        repeats (`int`, *optional*, defaults to `1`): how often the sampler yields each row.

    Raises:
        UserError: if a batch over all processes would end between the repeats of a row.
    """
    processes = accelerator.num_processes
    multiple = batch_size if args.accelerator_config.split_batches else batch_size * processes
    if multiple % repeats:
        raise UserError(
            f"An evaluation batch has {multiple} rows on {processes} process(es), which is not a multiple of the "
            f"{repeats} samples of a prompt (num_generations_eval). Set per_device_eval_batch_size="
            f"{repeats // math.gcd(repeats, processes)} or a multiple of it."
        )
    if processes == 1:
        return dataset
    if isinstance(dataset, data.IterableDataset):
        loading = accelerator.dataloader_config
        if loading.dispatch_batches is None:  # the default for streams is True, which fails if batch widths differ
            loading.dispatch_batches = False
        return FilledStream(dataset, multiple, blank)
    if args.dataloader_drop_last:
        return dataset
    return FilledDataset(dataset, multiple // math.gcd(multiple, repeats), blank)
