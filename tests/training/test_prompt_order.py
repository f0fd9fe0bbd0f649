"""The order of an epoch, also in a resumed run, and the columns that the trainer adds to rows."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader
from trl.trainer.utils import RepeatSampler

from minillm_trl.training.exact_resume import EpochOrder
from minillm_trl.training.prompt_order import EpochRepeatSampler, mark_filler, number_prompts, split_columns


class Epochs:
    """Draws the order of twenty rows in each epoch, as the sampler of a data loader does."""

    def __init__(self) -> None:
        self.order = EpochOrder()
        self.loader = DataLoader(range(20), batch_size=20, shuffle=True)

    def draw(self, epoch: int, within: bool = False) -> list[int]:
        self.order.begin(self.loader, epoch, within=within)
        (rows,) = self.loader
        return rows.tolist()


def test_epochs_after_a_resumed_one_have_the_orders_of_the_uninterrupted_run():
    torch.manual_seed(0)
    whole = Epochs()
    first = whole.draw(0)
    second, saved = whole.draw(1), whole.order.state()
    third, fourth = whole.draw(2), whole.draw(3)
    assert len({tuple(rows) for rows in (first, second, third, fourth)}) == 4
    torch.manual_seed(7)
    resumed = Epochs()
    resumed.order.restore(saved)
    assert [resumed.draw(1, within=True), resumed.draw(2), resumed.draw(3)] == [second, third, fourth]


def test_run_that_resumes_without_a_stored_state_draws_from_the_current_one():
    torch.manual_seed(0)
    expected = Epochs().draw(1)
    torch.manual_seed(0)
    resumed = Epochs()
    resumed.order.restore({"epoch_random_state": None})
    assert resumed.draw(1, within=True) == expected


@pytest.mark.parametrize("stream", [False, True])
def test_rows_have_their_number_and_fillers_do_not_count(stream: bool):
    rows = Dataset.from_dict({"prompt": ["a", "b"], "solution": [1, 2]})
    numbered = iter(number_prompts(rows.to_iterable_dataset() if stream else rows))
    first, second = next(numbered), next(numbered)
    assert split_columns([first, mark_filler(second), {"prompt": "c"}]) == (
        [0, 1, -1],
        [True, False, True],
        [{"prompt": "a", "solution": 1}, {"prompt": "b", "solution": 2}, {"prompt": "c"}],
    )


def sampler(epoch: int = 0, **options) -> EpochRepeatSampler:
    """A sampler of seven rows: rollouts of two prompts, each three times, of which each is read twice."""
    made = EpochRepeatSampler(range(7), mini_repeat_count=3, batch_size=2, repeat_count=2, **{"seed": 5, **options})
    made.set_epoch(epoch)
    return made


def test_order_of_an_epoch_is_that_of_trls_sampler_after_as_many_epochs():
    theirs = RepeatSampler(range(7), mini_repeat_count=3, batch_size=2, repeat_count=2, seed=5)
    orders = [list(theirs) for _ in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    read = sampler()
    for epoch in (0, 1, 3, 2, 0):  # whatever was read before
        read.set_epoch(epoch)
        assert list(read) == orders[epoch] == list(sampler(epoch))
    assert (
        list(sampler(2, shuffle=False))
        == list(sampler(shuffle=False))
        == [row for chunk in ([0, 1], [2, 3], [4, 5]) for _ in range(2) for row in chunk for _ in range(3)]
    )


@pytest.mark.parametrize("shuffle", [True, False])
def test_rollouts_count_over_epochs_and_have_each_row_of_the_sampler_once(shuffle: bool):
    """An epoch has three rollouts of two prompts; the seventh row is left out."""
    read = sampler(1, shuffle=shuffle)
    found = [read.rollout(number) for number in range(9)]
    for number, rows in enumerate(found):
        epoch, place = divmod(number, 3)
        assert rows == list(sampler(epoch, shuffle=shuffle))[12 * place :][:6]
    assert read.epoch == 1
    assert read.repeat_count == 2


@pytest.mark.parametrize("shuffle", [True, False])
def test_copy_of_a_sampler_has_its_settings_and_begins_with_the_first_epoch(shuffle: bool):
    theirs = RepeatSampler(range(7), mini_repeat_count=3, batch_size=2, repeat_count=4, shuffle=shuffle, seed=5)
    copied = EpochRepeatSampler.of(theirs)
    assert (list(copied), len(copied), copied.seed) == (list(theirs), len(theirs), 5)


def test_stream_is_repeated_endlessly_with_the_same_numbers():
    rows = Dataset.from_dict({"prompt": ["a", "b"]})
    stream = iter(number_prompts(rows.to_iterable_dataset()))
    numbers, _, found = split_columns([next(stream) for _ in range(5)])
    assert numbers == [0, 1, 0, 1, 0]
    assert [row["prompt"] for row in found] == list("ababa")
    assert len(number_prompts(rows)) == 2
