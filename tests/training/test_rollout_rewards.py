"""Advantages of a rollout with rows that are left out."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from test_trainer import make_config

from minillm_trl.training.rollout_rewards import (
    FunctionRewards,
    RolloutAdvantages,
    placeholder_reward,
    remove_placeholder,
)


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
            assert values.shape == (2, 5)
            whole = mask.int() if values.dtype == torch.int32 else returns
            assert torch.equal(values[:, :3], whole[2 * self.process_index :][:2, :3])
            return whole

    config = make_config(tmp_path, num_generations=2)
    whole = RolloutAdvantages(config, Accelerator(cpu=True))._baseline(returns, mask, kind)
    first = RolloutAdvantages(config, Gathering(0))._baseline(returns[:2], mask[:2], kind)
    second = RolloutAdvantages(config, Gathering(1))._baseline(returns[2:, :3], mask[2:, :3], kind)
    assert torch.equal(first, whole[:2])
    assert torch.equal(second, whole[2:, :3])


LENGTHS, LONGEST, HORIZON = (5, 3, 4, 2), 5, 12


def slow_advantages(rewards, expected, baseline: str, group: int, whiten: str, options: dict) -> list[list[float]]:
    """Advantages of completions, in loops over lists; of two processes that have the same rows."""
    gamma, current = options.get("gamma", 1.0), options.get("include_current_reward", False)
    returns = []
    for row, length in enumerate(LENGTHS):
        future = rewards[row] if expected is None else expected[row]
        values = [0.0] * LONGEST
        for t in range(length):
            weights = [gamma ** (i - t - (not current)) for i in range(t + (not current), length)]
            taken = [rewards[row][i] if i == t else future[i] for i in range(t + (not current), length)]
            size = sum(weights) if options.get("discounted_length", True) else len(weights)
            if not options.get("length_normalization", True):
                size = 1.0
            values[t] = sum(weight * value for weight, value in zip(weights, taken, strict=True)) / (size or 1.0)
        returns.append(values)
    advantages = [list(values) for values in returns]
    for row, length in enumerate(LENGTHS if baseline != "none" else ()):
        for t in range(length):
            others = [
                *(other for other in range(len(LENGTHS)) if other != row and LENGTHS[other] > t),
            ]
            if baseline == "group":
                others = [other for other in others if other // group == row // group]
            advantages[row][t] -= sum(returns[other][t] for other in others) / max(len(others), 1)
    if whiten == "none":
        return advantages
    tokens = [advantages[row][t] for row, length in enumerate(LENGTHS) for t in range(length)] * 2
    count = len(tokens) if whiten == "tokens" else 2 * len(LENGTHS) * HORIZON
    mean = sum(tokens) / count
    variance = sum(value * value for value in tokens) / count - mean * mean
    return [
        [(value - mean) / (variance + 1e-8) ** 0.5 if t < LENGTHS[row] else 0.0 for t, value in enumerate(values)]
        for row, values in enumerate(advantages)
    ]


@pytest.mark.parametrize("whiten", ["none", "tokens", "padding"])
@pytest.mark.parametrize("baseline", ["none", "position", "group"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gamma": 0.5},
        {"gamma": 0.5, "discounted_length": False},
        {"length_normalization": False},
        {"include_current_reward": True, "single_step_decomposition": False, "gamma": 0.5},
        {"reward_estimator": "expected", "gamma": 0.5},
    ],
    ids=lambda options: "-".join(options) or "defaults",
)
def test_advantages_are_those_of_loops(tmp_path, options: dict, baseline: str, whiten: str):
    torch.manual_seed(0)
    rewards, expected = torch.randn(2, 4, LONGEST, dtype=torch.float64)
    mask = torch.arange(LONGEST) < torch.tensor(LENGTHS)[:, None]
    config = make_config(
        tmp_path, whiten_advantages=whiten, num_generations=2, max_completion_length=HORIZON, **options
    )
    advantages = RolloutAdvantages(config, Accelerator(cpu=True))
    advantages.accelerator = SimpleNamespace(
        process_index=0,
        gather=lambda values: values,
        pad_across_processes=lambda values, dim: values,
        reduce=lambda moments, reduction: 2 * moments if reduction == "sum" else None,
    )
    expected = expected if "reward_estimator" in options else None
    found, totals = advantages.of_teacher(rewards, expected, mask, torch.zeros(4, dtype=torch.bool), baseline)
    lists = None if expected is None else expected.tolist()
    slow = slow_advantages(rewards.tolist(), lists, baseline, 2, whiten, options)
    torch.testing.assert_close(found * mask, torch.tensor(slow, dtype=torch.float64))
    if baseline == "none":
        assert totals is None
        return
    assert totals is not None  # for the variance that the baseline explains
    for of, kind, (mean, mean_square) in zip(
        ("returns", "advantages"), ("none", baseline), totals.values.view(2, 2, 2), strict=True
    ):
        values = torch.tensor(slow_advantages(rewards.tolist(), lists, kind, 2, "none", options), dtype=torch.float64)
        assert [name.rpartition("/")[2] for name in totals.names if of in name] == [f"{of}_mean", f"{of}_mean_square"]
        torch.testing.assert_close(mean, torch.stack([values.sum(), mask.sum()]))
        torch.testing.assert_close(mean_square, torch.stack([values.square().sum(), mask.sum()]))


def test_without_the_teachers_advantage_there_is_none(tmp_path):
    config = make_config(tmp_path, rkl_advantage=False)
    rewards, mask = torch.randn(2, 3), torch.ones(2, 3, dtype=torch.bool)
    found, totals = RolloutAdvantages(config, Accelerator(cpu=True)).of_teacher(
        rewards, None, mask, torch.zeros(2, dtype=torch.bool), "position"
    )
    assert torch.equal(found, torch.zeros(2, 3))
    assert totals is None


@pytest.mark.parametrize(
    "options",
    [{"iw_opd_gamma": 0.5}, {"top_entropy_quantile": 0.4}, {"iw_opd_gamma": 0.5, "top_entropy_quantile": 0.4}],
)
def test_weights_of_tokens_are_multiplied_and_leave_faulty_rows_out(tmp_path, options: dict):
    """Five healthy tokens, of which a share of 0.4 trains the two of highest entropy, with weight 5 / 2."""
    rewards = torch.tensor([[1.0, -3.0, 0.0], [torch.nan, torch.nan, torch.nan], [2.0, 2.0, 9.0]])
    entropy = torch.tensor([[0.1, 0.5, 0.2], [9.0, 9.0, 9.0], [0.3, 0.4, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, True], [True, True, False]])
    advantages = RolloutAdvantages(make_config(tmp_path, **options), Accelerator(cpu=True))
    found = advantages.token_weights(rewards, entropy, mask, torch.tensor([False, True, False]))["token_weights"]
    healthy = (mask & torch.tensor([[True], [False], [True]])).float()
    expected = healthy.clone()
    if "iw_opd_gamma" in options:
        expected *= torch.tensor([[1.5, 1.375, 1.0], [1.0, 1.0, 1.0], [1.5, 1.25, 1.0]])
    if "top_entropy_quantile" in options:
        expected *= torch.tensor([[0.0, 2.5, 0.0], [0.0, 0.0, 0.0], [0.0, 2.5, 0.0]])
    torch.testing.assert_close(found * healthy, expected)


@pytest.mark.parametrize("scale_rewards", ["group", "batch", "none"])
@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_advantages_of_functions_are_relative_to_the_buffer(tmp_path, scale_rewards: str, aggregation: str):
    values, weights = torch.tensor([[1.0, 10.0], [3.0, 40.0], [8.0, 10.0]]), torch.tensor([1.0, 0.5])
    config = make_config(tmp_path, scale_rewards=scale_rewards, multi_objective_aggregation=aggregation)
    found = RolloutAdvantages(config, Accelerator(cpu=True)).of_buffer(FunctionRewards.of(values, 1), weights, 3)
    columns = values
    if aggregation == "normalize_then_sum":
        columns = (columns - columns.mean(dim=0)) / (columns.std(dim=0) + 1e-4)
    totals = columns @ weights
    totals = totals - totals.mean()
    if scale_rewards != "none" or aggregation == "normalize_then_sum":  # which scales the sum in any case, as in GRPO
        totals = totals / (totals.std() + 1e-4)
    torch.testing.assert_close(found, totals)


def test_infinite_reward_has_the_mean_of_its_group():
    rewards = FunctionRewards.of(torch.tensor([[torch.inf], [2.0], [4.0], [1.0], [-torch.inf], [torch.nan]]), 3)
    assert rewards.values[:5].flatten().tolist() == [3.0, 2.0, 4.0, 1.0, 1.0]
    assert rewards.values[5].isnan()
    assert rewards.infinite.flatten().tolist() == [True, False, False, False, True, False]


def test_placeholder_is_removed_and_never_called():
    """An environment may have added functions behind it."""
    names = ("reward_funcs", "reward_func_names", "reward_processing_classes")
    trainer = SimpleNamespace(
        **{name: [placeholder_reward, name] for name in names}, reward_weights=torch.tensor([1.0, 2.0])
    )
    remove_placeholder(trainer)
    assert [getattr(trainer, name) for name in names] == [[name] for name in names]
    assert trainer.reward_weights.tolist() == [2.0]
    with pytest.raises(RuntimeError):
        placeholder_reward([], [])
