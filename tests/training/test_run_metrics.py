"""`RunMetrics` on its own: what a resumed or a second training keeps, and numbers that are not finite."""

import pytest
import torch
from accelerate import Accelerator

from minillm_trl.training.logged_metrics import make_totals
from minillm_trl.training.run_metrics import RunMetrics


@pytest.fixture
def metrics() -> RunMetrics:
    return RunMetrics(Accelerator(cpu=True))


def add(metrics: RunMetrics, mode: str, *values: float) -> None:
    totals = {f"metric_{number}": (value, 2.0) for number, value in enumerate(values)}
    metrics.add(mode, make_totals(totals, torch.device("cpu")))


def test_totals_with_a_number_that_is_not_finite_are_left_out_of_a_training_alone(metrics: RunMetrics):
    for mode in ("train", "eval"):
        add(metrics, mode, 2.0, 6.0)
        add(metrics, mode, torch.nan, 8.0)
    assert dict(metrics.take("train")) == {"metric_0": 1.0, "metric_1": 3.0}
    found = dict(metrics.take("eval"))
    assert found["metric_0"] != found["metric_0"]
    assert found["metric_1"] == 3.5
    assert metrics.take("train") == metrics.take("eval") == []


def test_resumed_training_continues_with_totals_and_values_and_a_second_one_does_not(metrics: RunMetrics):
    add(metrics, "train", 2.0)
    metrics.add_values("train", "length", torch.tensor([1.0, 4.0]))
    state = metrics.state()
    other = RunMetrics(metrics.accelerator)
    add(other, "train", 100.0)
    other.add_values("train", "length", torch.tensor([100.0]))
    add(other, "eval", 8.0)
    other.reset()
    assert dict(other.take("eval")) == {"metric_0": 4.0}  # of an evaluation that goes on
    assert other.take("train") == []
    other.restore(state)
    other.add_values("train", "length", torch.tensor([9.0]))
    add(other, "train", 4.0)
    assert dict(other.take("train")) == {"length_median": 4.0, "length_max": 9.0, "metric_0": 1.5}
    assert other.take("train") == []


def test_values_are_kept_without_their_graphs(metrics: RunMetrics):
    metrics.add_values("train", "length", torch.tensor([1.0], requires_grad=True).square())
    assert not metrics.state()["values"]["length"].requires_grad


def test_checkpoint_from_before_there_were_totals_has_none(metrics: RunMetrics):
    metrics.restore({})
    assert metrics.take("train") == []


def test_evaluation_loss_is_the_mean_over_all_tokens_since_its_start(metrics: RunMetrics):
    assert metrics.eval_loss() is None
    metrics.add_eval_loss(torch.tensor(100.0), 1)
    metrics.begin_evaluation()
    for total, count in ((6.0, 4), (2.0, torch.tensor(1))):
        metrics.add_eval_loss(torch.tensor(total), count)
    assert metrics.eval_loss() == 1.6


@pytest.mark.parametrize(
    ("losses", "expected"), [([(3.0, 1)], 3.0), ([(0.0, 0)], 0.0), ([(2.0**24, 1), (1.0, 1)], (2.0**24 + 1) / 2)]
)
def test_evaluation_loss_of_few_tokens_and_of_many(
    metrics: RunMetrics, losses: list[tuple[float, int]], expected: float
):
    for total, count in losses:
        metrics.add_eval_loss(torch.tensor(total), count)
    assert metrics.eval_loss() == expected
