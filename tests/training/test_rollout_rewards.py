"""Advantages of a rollout with rows that are left out."""

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

from minillm_trl.training.rollout_rewards import RolloutAdvantages


@pytest.mark.parametrize("whiten", ["none", "tokens", "padding"])
@pytest.mark.parametrize("baseline", ["none", "position"])
@pytest.mark.parametrize("are_expected", [False, True], ids=["sampled", "expected"])
def test_rows_that_are_left_out_have_no_advantage_and_change_no_other(
    tmp_path, whiten: str, baseline: str, are_expected: bool
):
    """Their rewards may be NaN. The other rows have the advantages of a rollout of their own."""
    advantages = RolloutAdvantages(make_config(tmp_path, whiten_advantages=whiten), Accelerator(cpu=True))
    torch.manual_seed(0)
    rewards, mask = torch.randn(4, 5), torch.arange(5) < torch.tensor([5, 3, 4, 2])[:, None]
    faulty = torch.tensor([False, True, False, False])
    broken = torch.where(faulty[:, None], torch.nan, rewards)

    def of_rows(values: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        expected = values[rows] if are_expected else None
        found, totals = advantages.of_teacher(values[rows], expected, mask[rows], faulty[rows], baseline)
        assert (totals is None) == (baseline == "none")
        return found

    found = of_rows(broken, torch.ones_like(faulty))
    alone = of_rows(rewards, ~faulty)
    assert alone.any()
    torch.testing.assert_close(found[~faulty] * mask[~faulty], alone * mask[~faulty])
    if baseline == "none":
        assert not found[faulty].any()


def test_tokens_have_no_weights_where_all_would_be_1(tmp_path):
    values, mask, faulty = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    for options, names in (({}, set()), ({"iw_opd_gamma": 0.5}, {"token_weights"})):
        advantages = RolloutAdvantages(make_config(tmp_path, **options), Accelerator(cpu=True))
        assert set(advantages.token_weights(values, None, mask, faulty)) == names
