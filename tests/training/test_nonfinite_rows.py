"""Which rows have a number that is not finite, what is said of each, and what is left to train on."""

import pytest
import torch
from conftest import build_tokenizer

from minillm_trl.training.nonfinite_rows import (
    explain_empty_step,
    explain_faults,
    explain_loss,
    explain_losses,
    explain_values,
    leave_out_faulty,
    name_rows,
    trained_rows,
    warn_of_faults,
)

INF, NAN = torch.inf, torch.nan
TOKENIZER = build_tokenizer()
IDS = torch.tensor([[40, 41, 42], [43, 44, 45]])
MASK = torch.tensor([[True, True, True], [True, True, False]])


def place(row: int, position: int) -> str:
    token = int(IDS[row, position])
    return f"at token {token} ({TOKENIZER.decode([token])!r}), position {position} of the completion"


def faults(**changed: dict[tuple[int, int], float]) -> dict[int, str]:
    """The faults of two completions whose numbers are -1, except for the changed ones."""
    values = {name: torch.full((2, 3), -1.0) for name in ("teacher", "student", "weight", "expected")}
    for name, entries in changed.items():
        for index, value in entries.items():
            values[name][index] = value
    expected = values["expected"] if "expected" in changed else None
    return explain_faults(values["teacher"], values["student"], values["weight"], MASK, IDS, TOKENIZER, expected)


class TestFaults:
    def test_finite_numbers_and_those_outside_the_mask_are_none(self):
        assert faults(expected={}) == {}
        assert faults(**{name: {(1, 2): NAN} for name in ("teacher", "student", "weight", "expected")}) == {}

    @pytest.mark.parametrize(("name", "words"), [("teacher", "the teacher"), ("student", "the student")])
    def test_of_log_probs(self, name: str, words: str):
        assert faults(**{name: {(0, 1): -INF, (0, 2): NAN}}) == {
            0: f"{words} gives probability zero {place(0, 1)}, where the reverse KL is infinite"
        }
        assert faults(**{name: {(1, 0): NAN}}) == {1: f"{words}'s log-prob is nan {place(1, 0)}"}
        assert faults(**{name: {(1, 1): INF}}) == {1: f"{words}'s log-prob is inf {place(1, 1)}"}

    def test_of_weights_and_expected_rewards_name_the_remedy(self):
        (weight,) = faults(weight={(1, 1): INF}).values()
        assert weight.startswith(f"the importance weight is inf {place(1, 1)}")
        assert "importance_weight_cap" in weight
        (reward,) = faults(expected={(0, 2): -INF}).values()
        assert reward.startswith(f"the expected reward is -inf {place(0, 2)}")
        assert "reward_clip" in reward

    def test_first_one_of_a_row_is_explained(self):
        found = faults(teacher={(1, 0): NAN}, student={(0, 0): NAN, (1, 0): NAN}, weight={(0, 0): INF})
        assert found == {
            1: f"the teacher's log-prob is nan {place(1, 0)}",
            0: f"the student's log-prob is nan {place(0, 0)}",
        }


def batch(**more: torch.Tensor) -> dict[str, torch.Tensor]:
    """Three rows, of prompts 7, 3 and 7, the second of which is faulty."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]])
    return {
        "prompt_ids": torch.tensor([[20, 21], [22, 23], [24, 25]]),
        "prompt_mask": torch.ones(3, 2, dtype=torch.long),
        "completion_ids": torch.arange(30, 42).view(3, 4),
        "completion_mask": mask,
        "faulty": torch.tensor([False, True, False]),
        "prompt_index": torch.tensor([7, 3, 7]),
        **more,
    }


class TestInputsOfTheLoss:
    def test_value_that_is_not_finite_is_named_unless_its_row_is_faulty_or_padding(self):
        advantages = torch.tensor([[1.0, NAN, INF, 1.0], [NAN, 1.0, 1.0, 1.0], [1.0, INF, 1.0, 1.0]])
        assert explain_values(batch(advantages=advantages)) == {0: "advantages contains nan"}
        assert explain_values(batch(advantages=torch.ones(3, 4))) == {}

    def test_first_name_of_a_row_wins(self):
        one, other = torch.ones(3, 4), torch.ones(3, 4)
        one[2, 0], other[2, 0], other[0, 2] = INF, NAN, -INF
        found = explain_values(batch(advantages=one, long_term_weights=other))
        assert found == {2: "advantages contains inf", 0: "long_term_weights contains -inf"}

    def test_number_of_a_whole_row_is_seen(self):
        values = torch.tensor([[1.0], [NAN], [NAN]])
        assert explain_values(batch(long_term_weights=values)) == {2: "long_term_weights contains nan"}


class TestMessages:
    def test_rows_are_named_by_their_prompts_or_by_their_numbers(self):
        rows = torch.tensor([True, True, True])
        assert name_rows(batch(), rows) == "the prompts [3, 7] of train_dataset"
        assert name_rows(batch(), torch.tensor([False, True, False])) == "the prompts [3] of train_dataset"
        given = batch()
        del given["prompt_index"]
        assert name_rows(given, torch.tensor([True, False, True])) == "the rows [0, 2] of the batch"

    @pytest.mark.parametrize(("tokens", "empty"), [(0, True), (1, False), (None, False)])
    def test_step_is_empty_without_tokens_if_rows_are_faulty(self, tokens: int | None, empty: bool):
        more = {} if tokens is None else {"window_tokens": torch.tensor(tokens)}
        said = ["scores are not finite for the prompts [3] of train_dataset"]
        assert explain_empty_step(batch(**more)) == (said if empty else [])
        assert explain_empty_step(batch(**more, faulty=torch.zeros(3, dtype=torch.bool))) == []

    def test_losses_count_where_tokens_are_trained(self):
        loss = torch.zeros(3, 4)
        assert explain_losses(loss, batch()) == []
        loss[1, 2] = loss[2, 1] = NAN
        assert explain_losses(loss, batch()) == []
        loss[0, 2] = INF
        assert explain_losses(loss, batch()) == ["the loss is not finite for the prompts [7] of train_dataset"]
        assert explain_loss(INF, batch()) == "the loss is inf for the prompts [3, 7] of train_dataset"

    @pytest.mark.parametrize("count", [1, 4, 5, 7])
    def test_a_few_faults_are_listed_with_their_prompts(self, caplog, count: int):
        warn_of_faults({row: f"fault {row}" for row in range(count)}, ["ab" * 50] * 7, [5, 0, -1, 9, 1, 2, 3])
        said = [record.getMessage() for record in caplog.records]
        prompt = repr("ab" * 40)
        places = [f"Prompt {number} {prompt}" if number >= 0 else f"Prompt {prompt}" for number in (5, 0, -1, 9)]
        listed = [f"{where}: fault {row}." for row, where in enumerate(places)][:count]
        more = [f"{count - 4} more completions have NaN or infinite numbers."] if count > 4 else []
        assert said == listed + more


class TestTrainedRows:
    def test_faulty_rows_have_no_tokens(self):
        found = leave_out_faulty(batch())
        assert found["completion_mask"].tolist() == [[1, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]
        assert torch.equal(found["completion_ids"], batch()["completion_ids"])

    def test_faulty_rows_do_not_go_through_the_student(self):
        given = batch(window_tokens=torch.tensor(4))
        found = trained_rows(given, 1)
        assert found["window_tokens"] == 4
        for name in ("prompt_ids", "completion_ids", "completion_mask", "prompt_index"):
            assert torch.equal(found[name], given[name][[0, 2]])
        healthy = batch(faulty=torch.zeros(3, dtype=torch.bool))
        assert trained_rows(healthy, 1) is healthy

    def test_a_row_of_padding_takes_the_place_of_the_last_one(self):
        """Its mask is that of a row without tokens, which `leave_out_faulty` made."""
        given = leave_out_faulty(batch(faulty=torch.ones(3, dtype=torch.bool)))
        found = trained_rows(given, 1)
        assert found["prompt_ids"].tolist() == [[1, 1]]
        assert found["completion_ids"].tolist() == [[1, 1, 1, 1]]
        assert found["completion_mask"].tolist() == [[0, 0, 0, 0]]
        assert found["prompt_mask"].tolist() == [[1, 1]]
        assert given["prompt_ids"].tolist() == batch()["prompt_ids"].tolist()

    def test_batch_of_one_faulty_row_keeps_its_shape(self):
        given = {name: values[:1] for name, values in batch(faulty=torch.ones(3, dtype=torch.bool)).items()}
        found = trained_rows(given, 1)
        assert {name: values.shape for name, values in found.items()} == {
            name: values.shape for name, values in given.items()
        }
        assert (found["completion_ids"] == 1).all()
