"""Rows of the rollout buffer: how they are put together, dealt to the optimizer steps, and counted."""

from typing import NamedTuple

import pytest
import torch

from minillm_trl.rollouts.buffer import (
    assemble_fields,
    assemble_rows,
    by_length,
    deal_rows,
    parts_by_length,
    sequences,
    trim,
    window_counts,
)
from minillm_trl.rollouts.keyed_random import keyed_uniforms


class Scores(NamedTuple):
    logps: torch.Tensor
    states: torch.Tensor | None
    entropy: torch.Tensor | None = None


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64, torch.bfloat16])
def test_rows_of_parts_are_put_in_their_places_with_zeros_behind(dtype):
    """Parts have different lengths, and further dimensions; a row that no part has is zero."""
    first, second = (torch.arange(1.0, 1 + n * t * 2).view(n, t, 2).to(dtype) for n, t in ((2, 3), (1, 1)))
    found = assemble_rows([([3, 0], first), ([1], second)], 5, 4)
    assert (found.dtype, found.shape) == (dtype, (5, 4, 2))
    expected = [first[1].tolist(), second[0].tolist(), [], first[0].tolist(), []]
    assert found.tolist() == [rows + [[0, 0]] * (4 - len(rows)) for rows in expected]


def test_fields_that_are_none_stay_none():
    parts = [([1], Scores(torch.ones(1, 2), torch.full((1, 2, 3), 2.0))), ([0], Scores(torch.ones(1, 1), None))]
    found = assemble_fields([(rows, part._replace(states=torch.ones(1, 1, 3))) for rows, part in parts], (2, 3))
    assert isinstance(found, Scores)
    assert found.logps.tolist() == [[1, 0, 0], [1, 1, 0]]
    assert found.states.shape == (2, 3, 3)
    assert found.entropy is None


def test_trained_tokens_are_those_of_the_completion_that_no_tool_wrote():
    batch = {
        "prompt_ids": torch.tensor([[1, 5], [6, 7]]),
        "prompt_mask": torch.tensor([[False, True], [True, True]]),
        "completion_ids": torch.tensor([[8, 9, 1], [2, 3, 4]]),
        "completion_mask": torch.tensor([[1, 1, 0], [1, 1, 1]]).bool(),
    }
    ids, attention, mask = sequences(batch)
    assert ids.tolist() == [[1, 5, 8, 9, 1], [6, 7, 2, 3, 4]]
    assert (attention.tolist(), attention.dtype) == ([[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]], torch.int64)
    assert mask.tolist() == [[True, True, False], [True, True, True]]
    tools = torch.tensor([[1, 0, 1], [0, 1, 1]])
    _, attention, mask = sequences({**batch, "tool_mask": tools})
    assert attention.tolist() == [[0, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert (mask.tolist(), mask.dtype) == ([[True, False, False], [False, True, True]], torch.bool)


def test_trim_keeps_values_of_rows_and_cuts_states():
    batch = {
        "prompt_ids": torch.tensor([[1, 1, 5], [1, 6, 7], [1, 1, 8]]),
        "prompt_mask": torch.tensor([[0, 0, 1], [0, 1, 1], [0, 0, 1]]),
        "completion_mask": torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 0, 0, 0]]),
        "faulty": torch.tensor([False, True, False]),
        "teacher_hidden_states": torch.arange(36.0).view(3, 4, 3),
    }
    trimmed = trim(batch)
    assert trimmed["prompt_ids"].tolist() == [[1, 5], [6, 7], [1, 8]]
    assert torch.equal(trimmed["faulty"], batch["faulty"])
    assert torch.equal(trimmed["teacher_hidden_states"], batch["teacher_hidden_states"][:, :2])


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_parts_by_length_are_each_row_once_with_all_its_tokens(batch_size: int):
    """Rows of the same length stay in their order, and no part is longer than its longest row needs."""
    lengths = [(1, 2), (3, 1), (2, 1), (1, 4), (2, 3), (3, 2), (1, 1)]
    mask = torch.tensor([[0] * (3 - p) + [1] * (p + c) + [0] * (4 - c) for p, c in lengths])
    parts = [(rows.tolist(), columns) for rows, columns in parts_by_length(mask, batch_size)]
    order = sorted(range(7), key=lambda row: (-sum(lengths[row]), row))
    assert [rows for rows, _ in parts] == [order[i : i + batch_size] for i in range(0, 7, batch_size)]
    for rows, columns in parts:
        assert columns.start == min(3 - lengths[row][0] for row in rows)
        assert columns.stop == max(3 + lengths[row][1] for row in rows)


def test_rows_of_equal_length_keep_their_order():
    lengths = torch.tensor([2, 5, 2, 5] * 20)
    order = by_length(lengths, 2).tolist()
    assert order == [n for block in (0, 40) for n in sorted(range(block, block + 40), key=lambda n: -lengths[n])]


@pytest.mark.parametrize("steps", [1, 3, 4])
def test_each_block_of_rows_gives_one_to_each_step_on_any_number_of_processes(steps: int):
    rows, key = 12 * steps, (7, 3, 2)
    whole = deal_rows(rows, steps, 0, *key)
    assert whole.dtype == torch.int64
    by_step = whole.view(steps, -1)
    for step in by_step:
        assert sorted((step // steps).tolist()) == list(range(12))
    assert sorted(whole.tolist()) == list(range(rows))
    for processes in (2, 3):
        own = rows // processes
        parts = [deal_rows(own, steps, p * own, *key).view(steps, -1) + p * own for p in range(processes)]
        assert torch.equal(torch.cat(parts, dim=1), by_step)
    for block in range(12):  # zeros at the end of a key make no difference, as in older versions
        numbers = keyed_uniforms(steps, *key, block) if block else keyed_uniforms(steps, *key)
        assert by_step[:, block].tolist() == (numbers.argsort() + block * steps).tolist()
    if steps > 1:
        assert not torch.equal(deal_rows(rows, steps, 0, 7, 3, 1), whole)
        orders = {tuple((by_step[:, block] % steps).tolist()) for block in range(12)}
        assert len(orders) > 2  # blocks are shuffled independently


def test_windows_count_trained_tokens_and_rows_that_are_not_faulty():
    """Of four micro-batches, two make up a window; a window of one batch has its counts."""

    def batch(completion: list[list[int]], tools: list[list[int]], faulty: list[bool]) -> dict[str, torch.Tensor]:
        mask = torch.tensor(completion)
        names = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids"), torch.ones_like(mask))
        return {**names, "completion_mask": mask, "tool_mask": torch.tensor(tools), "faulty": torch.tensor(faulty)}

    batches = [
        batch([[1, 1, 0], [1, 1, 1]], [[1, 1, 1], [1, 0, 1]], [False, False]),
        batch([[0, 0, 0], [1, 0, 0]], [[1, 1, 1], [1, 1, 1]], [False, False]),
        batch([[0, 0, 0], [1, 1, 1]], [[1, 1, 1], [1, 1, 1]], [True, False]),
        batch([[0, 0, 0], [0, 0, 0]], [[1, 1, 1], [1, 1, 1]], [True, True]),
    ]
    counts = {name: values.tolist() for name, values in window_counts(batches, 2).items()}
    assert counts == {"window_tokens": [5, 3], "window_rows": [4, 1]}
    counts = {name: values.tolist() for name, values in window_counts(batches, 1).items()}
    assert counts == {"window_tokens": [4, 1, 3, 0], "window_rows": [2, 2, 1, 0]}
