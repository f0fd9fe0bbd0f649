"""The order of an epoch in a run that goes on or resumes, and what the columns that the trainer adds say of a row."""

import pytest
import torch
from datasets import Dataset
from torch.utils.data import DataLoader

from minillm_trl.training.exact_resume import EpochOrder
from minillm_trl.training.prompt_order import mark_filler, number_prompts, split_columns


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
