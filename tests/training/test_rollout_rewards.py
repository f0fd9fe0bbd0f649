"""Advantages of a rollout with rows that are left out."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

from minillm_trl.training.rollout_rewards import FunctionRewards, RolloutAdvantages


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


def test_a_process_has_the_rewards_and_faults_of_its_own_rows(tmp_path):
    """Rewards are gathered: six rows of two functions, of which the second process has the last three."""
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([[1.0, inf], [2.0, 0.5], [3.0, 1.0], [4.0, nan], [-inf, 2.0], [6.0, inf]])
    rewards = FunctionRewards.of(values, group=2)
    assert rewards.faults(0, 3, ["a", "b"]) == {0: "reward function b returned inf"}
    assert rewards.faults(3, 3, ["a", "b"]) == {
        1: "reward function a returned inf",
        2: "reward function b returned inf",
    }
    weights = torch.tensor([1.0, 2.0])
    whole = RolloutAdvantages(make_config(tmp_path), Accelerator(cpu=True)).of_buffer(rewards, weights, 6)
    parts = []
    for process in range(2):
        accelerator = SimpleNamespace(process_index=process)
        parts.append(RolloutAdvantages(make_config(tmp_path), accelerator).of_buffer(rewards, weights, 3))
    assert whole.isfinite().all()
    assert whole.unique().numel() > 3
    assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize("kind", ["position", "group"])
def test_baseline_of_processes_is_that_of_one_that_has_all_rows(tmp_path, kind: str):
    """The rows of the second process are shorter, so they are padded for the baseline alone."""
    torch.manual_seed(0)
    returns, mask = torch.randn(4, 5), torch.arange(5) < torch.tensor([5, 3, 2, 3])[:, None]

    class Gathering:
        """Gathers the rows of both processes, whichever of them asks."""

        def __init__(self, process: int):
            self.process_index = process

        def pad_across_processes(self, values: torch.Tensor, dim: int) -> torch.Tensor:
            return torch.nn.functional.pad(values, (0, 5 - values.shape[dim]))

        def gather(self, values: torch.Tensor) -> torch.Tensor:
            whole = mask.int() if values.dtype == torch.int32 else returns
            assert torch.equal(values[:, :3], whole[2 * self.process_index :][:2, :3])
            return whole

    config = make_config(tmp_path, num_generations=2)
    whole = RolloutAdvantages(config, Accelerator(cpu=True))._baseline(returns, mask, kind)
    first = RolloutAdvantages(config, Gathering(0))._baseline(returns[:2], mask[:2], kind)
    second = RolloutAdvantages(config, Gathering(1))._baseline(returns[2:, :3], mask[2:, :3], kind)
    assert torch.equal(first, whole[:2])
    assert torch.equal(second, whole[2:, :3])
