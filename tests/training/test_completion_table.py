"""The table of logged completions: its rows stay together and in order, without fillers, also in a resumed run."""

from collections import defaultdict, deque
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from minillm_trl.training.rollout_metrics import CompletionTable

ROWS = 6  # that GRPO keeps


def make_table(logged: bool = True) -> CompletionTable:
    columns: dict[str, Any] = {name: deque(maxlen=ROWS) for name in ("prompt", "completion", "advantages")}
    columns |= {"rewards": defaultdict(lambda: deque(maxlen=ROWS)), "extra": defaultdict(lambda: deque(maxlen=ROWS))}
    return CompletionTable(columns, Accelerator(cpu=True), logged)


def add(table: CompletionTable, names: str, counts: list[bool] | None = None) -> None:
    """Add a rollout of completions with these names, as GRPO does with advantages of its own."""
    rows = list(names)
    for column, values in (("prompt", rows), ("completion", [2 * name for name in rows]), ("advantages", [9] * ROWS)):
        table.columns[column].extend(values[: len(rows)])
    table.columns["rewards"]["a"].extend(map(ord, rows))
    table.columns["extra"]["source"].extend(name.upper() for name in rows)
    # two tokens, of which the second one of every other row is a tool's
    ids = torch.ones(len(rows), 2, dtype=torch.long)
    batch = dict.fromkeys(("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"), ids)
    batch["tool_mask"] = torch.tensor([[1, row % 2] for row in range(len(rows))])
    batch["advantages"] = torch.tensor([[ord(name), ord(name) + 2.0] for name in rows])
    table.correct(batch, [True] * len(rows) if counts is None else counts)


def rows_of(table: CompletionTable) -> list[tuple]:
    columns = table.columns
    of_functions = columns["rewards"]["a"], columns["extra"]["source"]
    return list(zip(columns["prompt"], columns["completion"], columns["advantages"], *of_functions, strict=True))


def expected(name: str, row: int) -> tuple:
    """A row of the table; its advantage is the mean over the trained tokens."""
    return name, 2 * name, ord(name) + row % 2, ord(name), name.upper()


def test_rows_have_the_advantages_of_the_teacher():
    table = make_table()
    add(table, "ab")
    add(table, "cde")
    assert rows_of(table) == [expected(name, row) for name, row in zip("abcde", (0, 1, 0, 1, 2), strict=True)]


@pytest.mark.parametrize(
    ("counts", "left"), [([True, True, False], "de"), ([True, False, True], "df"), ([False, False, False], "")]
)
def test_fillers_leave_and_the_other_rows_stay_in_their_order(counts: list[bool], left: str):
    table = make_table()
    add(table, "abc")
    add(table, "def", counts)
    assert rows_of(table) == [expected(name, "abcdef".index(name) % 3) for name in "abc" + left]


def test_rollout_of_more_rows_than_the_table_keeps_its_last_ones():
    table = make_table()
    add(table, "abcdefgh", [True] * 7 + [False])
    assert rows_of(table) == [expected(name, "abcdefgh".index(name)) for name in "cdefg"]


def test_resumed_run_has_the_rows_of_the_checkpoint():
    table, other = make_table(), make_table()
    add(table, "ab")
    add(other, "xyz")  # of an earlier training
    state = table.state()
    add(table, "c")  # which the state does not see
    other.reset()
    for column in (*(other.columns[name] for name in ("prompt", "completion", "advantages")),):
        column.clear()
    other.columns["rewards"].clear()
    other.columns["extra"].clear()
    other.restore(state)
    assert rows_of(other) == [expected("a", 0), expected("b", 1)]


def test_run_that_logs_no_completions_saves_none():
    table = make_table(logged=False)
    add(table, "ab")
    assert table.state() == {"completions": {}}
    table.restore(table.state())
    assert len(rows_of(table)) == 2
