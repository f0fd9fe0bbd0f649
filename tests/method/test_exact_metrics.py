"""Metrics are means over all tokens or completions: of one process and of two, of any batch, and by hand."""

import itertools
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import run_module
from evaluation_run import CASES, evaluate, evaluate_minillm, evaluate_tuning
from test_kd import batch_of, by_hand, make_fine_tuning, make_trainer
from torch.utils.data import IterableDataset

import minillm_trl.trainer
from minillm_trl.errors import UserError
from minillm_trl.training.evaluation_rows import FilledDataset, FilledStream, fill_rows
from minillm_trl.training.logged_metrics import (
    baseline_totals,
    completion_sums,
    completion_totals,
    gradient_totals,
    median_and_max,
    metric_means,
    reward_metrics,
    rouge_l_to_references,
)


def values(metrics: dict) -> dict[str, float]:
    """What an evaluation has measured, without times and what is no number."""
    times = ("runtime", "per_second", "preparation_time")
    return {name: value for name, value in metrics.items() if not name.endswith(times) and value == value}


def test_batch_that_would_end_between_the_samples_of_a_prompt_is_refused():
    def filled(batch_size: int, processes: int) -> Any:
        accelerator = SimpleNamespace(num_processes=processes)
        args = SimpleNamespace(accelerator_config=SimpleNamespace(split_batches=False), dataloader_drop_last=False)
        return fill_rows([{"prompt": "a"}] * 3, batch_size, accelerator, args, dict, repeats=4)

    for batch_size, processes, advice in ((2, 1, 4), (6, 1, 4), (1, 2, 2), (3, 3, 4)):
        with pytest.raises(UserError, match=f"num_generations_eval.*per_device_eval_batch_size={advice} "):
            filled(batch_size, processes)
    assert len(filled(4, 1)) == 3
    assert len(filled(4, 2)) == 4  # a batch of eight rows has two prompts


def test_rows_are_filled_where_several_processes_share_them():
    def filled(
        rows: Any, processes: int, dispatch: bool | None = None, drop_last: bool = False, splits: bool = False
    ) -> tuple[Any, Any]:
        loading = SimpleNamespace(dispatch_batches=dispatch)
        accelerator = SimpleNamespace(num_processes=processes, dataloader_config=loading)
        split = SimpleNamespace(split_batches=splits)
        args = SimpleNamespace(accelerator_config=split, dataloader_drop_last=drop_last)
        return fill_rows(rows, 2, accelerator, args, lambda row: -1), loading.dispatch_batches

    for rows in (range(3), Stream(3)):
        assert filled(rows, 1) == (rows, None)
    assert list(filled(range(3), 3)[0]) == [0, 1, 2, -1, -1, -1]
    assert list(filled(range(3), 3, splits=True)[0]) == [0, 1, 2, -1]  # the processes share a batch of two
    assert filled(range(3), 3, drop_last=True) == (range(3), None)
    for dispatch, expected in ((None, False), (True, True), (False, False)):
        stream, found = filled(Stream(3), 3, dispatch)
        assert (list(stream), found) == ([0, 1, 2, -1, -1, -1], expected)


class TestEvaluation:
    @pytest.mark.distributed
    def test_two_processes_find_what_one_finds(self, tmp_path):
        launch = ("torch.distributed.run", "--standalone", "--nproc_per_node=2")
        done = run_module(*launch, Path(__file__).parents[1].joinpath("evaluation_run.py"), tmp_path)
        assert done.returncode == 0, done.stderr[-3000:]
        two, one = json.loads((tmp_path / "found.json").read_text()), evaluate(str(tmp_path), 1)
        assert two.keys() == one.keys() == CASES.keys()
        for name in CASES:
            assert values(two[name]["metrics"]) == pytest.approx(values(one[name]["metrics"]), rel=1e-5, abs=1e-6), (
                name
            )
            assert two[name].get("table") == one[name].get("table"), name

    @pytest.mark.parametrize(
        "options", [{}, {"num_generations_eval": 2, "reward": True}, {"loss_reduction": "sequence_sum"}]
    )
    def test_minillm_finds_the_same_whatever_the_batch(self, tmp_path, options: dict):
        found = [values(evaluate_minillm(str(tmp_path), size, rows=5, **options)["metrics"]) for size in (10, 4, 2)]
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)

    @pytest.mark.parametrize("options", [{}, {"num_generations_eval": 2, "reward": True}])
    def test_fillers_count_nowhere(self, tmp_path, monkeypatch, options: dict):
        """Here in one process, as they fill the last batch of several."""
        expected, given = evaluate_minillm(str(tmp_path), 4, rows=5, **options), []

        def fill(dataset: Any, batch_size: int, *others: Any) -> FilledDataset:
            given.append((len(dataset), batch_size, others[-1]))
            return FilledDataset(dataset, 2 * batch_size // options.get("num_generations_eval", 1), others[2])

        monkeypatch.setattr(minillm_trl.trainer, "fill_rows", fill)
        found = evaluate_minillm(str(tmp_path), 4, rows=5, **options)
        assert given == [(5, 4, options.get("num_generations_eval", 1))]
        assert values(found["metrics"]) == pytest.approx(values(expected["metrics"]), rel=1e-5, abs=1e-6)
        assert found["table"] == expected["table"]

    @pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
    def test_loss_of_minillm_is_the_sum_of_its_terms(self, tmp_path, reduction: str):
        found = evaluate_minillm(str(tmp_path), 4, rows=5, loss_reduction=reduction)["metrics"]
        terms = found["eval_objective/long_term"] + found["eval_objective/single_step"]
        tokens = found["eval_completions/mean_length"] if reduction == "sequence_sum" else 1
        assert found["eval_loss"] == pytest.approx(terms * tokens, rel=1e-5)

    @pytest.mark.parametrize("kd", [False, True])
    def test_fine_tuning_finds_the_same_whatever_the_batch(self, tmp_path, kd: bool):
        found = [values(evaluate_tuning(str(tmp_path), size, kd=kd)["metrics"]) for size in (5, 3, 1)]
        for other in found[1:]:
            assert other == pytest.approx(found[0], rel=1e-5)


class TestTraining:
    def logged(self, trainer, names: tuple[str, ...]) -> dict[str, float]:
        trainer.train()
        (entry,) = (entry for entry in trainer.state.log_history if names[0] in entry)
        return {name: entry[name] for name in names}

    @pytest.mark.parametrize("kd", [False, True])
    @pytest.mark.parametrize(("batch_size", "accumulation"), [(8, 1), (1, 8), (2, 2)])
    def test_metrics_are_means_over_all_tokens_since_the_last_log(
        self, tmp_path, kd: bool, batch_size: int, accumulation: int
    ):
        steps = 24 // (batch_size * accumulation)  # of one epoch, with a rate of 0
        options = {
            "per_device_train_batch_size": batch_size,
            "gradient_accumulation_steps": accumulation,
            "learning_rate": 0.0,
            "max_steps": steps,
            "logging_steps": steps,
        }
        trainer = (make_trainer if kd else make_fine_tuning)(tmp_path, **options)
        names = ("kd/cross_entropy", "kd/forward_kl", "entropy") if kd else ("entropy", "mean_token_accuracy")
        found = self.logged(trainer, names)
        batch = batch_of(trainer, range(24))
        tokens = (batch["labels"][:, 1:] != -100).sum()
        if kd:
            entropy, divergence, _ = by_hand(trainer.model, trainer.teacher_model, batch, 0.5)
            assert found["kd/cross_entropy"] == pytest.approx((entropy / tokens).item(), rel=1e-5)
            assert found["kd/forward_kl"] == pytest.approx((divergence / tokens).item(), rel=1e-5)
        trainer.model.eval()
        with torch.no_grad():
            output = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
        log_probs, labels = output.logits[:, :-1].log_softmax(-1), batch["labels"][:, 1:]
        counts = labels != -100
        entropies = -(log_probs.exp() * log_probs).sum(-1)[counts]
        assert found["entropy"] == pytest.approx((entropies.sum() / tokens).item(), rel=1e-5)
        if not kd:
            right = (log_probs.argmax(-1) == labels)[counts]
            assert found["mean_token_accuracy"] == pytest.approx((right.sum() / tokens).item(), rel=1e-6)


class Stream(IterableDataset):
    def __init__(self, length: int):
        self.length, self.epoch = length, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        return iter(range(self.length))


@pytest.mark.parametrize("length", [1, 3, 4, 5, 8])
def test_fillers_come_after_the_rows_and_complete_the_last_batch(length: int):
    def blank(row: int) -> int:
        return -1

    expected = [*range(length), *[-1] * (-length % 4)]
    filled = FilledDataset(range(length), 4, blank)
    assert list(filled) == expected
    assert filled.total_dataset_length == length
    stream = FilledStream(Stream(length), 4, blank)
    assert list(stream) == expected
    stream.set_epoch(3)
    assert stream.rows.epoch == 3


def test_a_stream_without_rows_has_no_fillers():
    assert list(FilledStream(Stream(0), 4, str)) == []


def test_a_stream_without_epochs_is_the_same_in_each():
    stream = FilledStream([5, 6, 7], 2, str)
    stream.set_epoch(1)
    assert list(stream) == [5, 6, 7, "7"]  # a filler is made from a row


def test_fillers_are_made_from_the_first_rows():
    assert list(FilledDataset([5, 6, 7], 8, str)) == [5, 6, 7, "5", "6", "7", "5", "6"]


class TestTotals:
    def of(self, lengths: list[int], ended: list[bool], counts: list[bool], **scores: list[float]) -> dict:
        totals = completion_totals(torch.tensor(lengths), torch.tensor(ended), scores, torch.tensor(counts))
        return totals.names, totals.values

    def test_lengths_are_those_of_the_completions_that_count(self):
        names, first = self.of([9, 2, 30], [True, True, False], [True, True, False], rouge_l=[10.0, math.nan, 90.0])
        _, second = self.of([5, 7, 1], [False, True, True], [True, True, True], rouge_l=[30.0, 50.0, math.nan])
        assert metric_means(names, torch.stack([first, second])) == pytest.approx(
            {
                "completions/mean_length": 24 / 5,
                "completions/min_length": 1,
                "completions/max_length": 9,
                "completions/mean_terminated_length": 19 / 4,
                "completions/min_terminated_length": 1,
                "completions/max_terminated_length": 9,
                "completions/clipped_ratio": 1 / 5,
                "rouge_l": 30.0,
            }
        )

    def test_what_there_is_nothing_of_is_zero_but_for_rouge_l(self):
        names, cut = self.of([4, 4], [False, False], [True, True], rouge_l=[math.nan, math.nan])
        metrics = metric_means(names, cut[None])
        assert metrics["completions/mean_terminated_length"] == metrics["completions/min_terminated_length"] == 0.0
        assert "rouge_l" not in metrics
        _, ended = self.of([6, 4], [True, False], [True, True], rouge_l=[math.nan, math.nan])
        metrics = metric_means(names, torch.stack([cut, ended]))
        assert metrics["completions/mean_terminated_length"] == metrics["completions/min_terminated_length"] == 6.0


def test_rouge_l_of_a_conversation_is_that_to_its_last_message():
    called = {"role": "assistant", "content": "call the tool"}
    answer = {"role": "assistant", "content": "the pub is cheap"}
    rows = [
        {"completion": [answer]},
        {"completion": [called, {"role": "tool", "content": "pub"}, answer]},
        {"completion": "the pub is cheap"},
        {"completion": [called], "references": ["a mill", "the pub is cheap"]},
        {"completion": None},
    ]
    scores = rouge_l_to_references(["the pub is cheap"] * 5, rows)
    assert scores[:4] == [100.0] * 4
    assert math.isnan(scores[4])


def test_metrics_of_rewards_leave_out_what_does_not_apply():
    nan = math.nan
    rewards = torch.tensor([[1.0, nan], [3.0, 2.0], [nan, nan], [nan, nan], [2.0, 4.0], [4.0, 3.0]])
    metrics = reward_metrics(rewards, torch.tensor([1.0, 2.0]), ["a", "b"], num_generations=2)
    assert metrics == pytest.approx(
        {
            "rewards/a/mean": 2.5,
            "rewards/a/std": torch.tensor([1.0, 3.0, 2.0, 4.0]).std().item(),
            "rewards/b/mean": 3.0,
            "rewards/b/std": 1.0,
            "reward": (1 + 7 + 10 + 10) / 4,
            "reward_std": torch.tensor([1.0, 7.0, 10.0, 10.0]).std().item(),
            "frac_reward_zero_std": 1 / 3,
        }
    )


def test_variance_that_a_baseline_explains_is_that_of_all_tokens_together():
    """Of the returns 1 3 5 7, with variance 5, the baseline leaves -1 1 0 0, with variance 0.5."""
    mask = torch.tensor([[True, True], [True, False], [True, False]])
    returns = torch.tensor([[1.0, 3.0], [5.0, 9.0], [7.0, 9.0]])
    advantages = torch.tensor([[-1.0, 1.0], [0.0, 9.0], [0.0, 9.0]])
    parts = [baseline_totals(returns[rows], advantages[rows], mask[rows]) for rows in (slice(0, 1), slice(1, 3))]
    metrics = metric_means(parts[0].names, torch.stack([part.values for part in parts]))
    assert metrics == pytest.approx({"objective/baseline_explained_variance": 0.9})


def test_baseline_of_returns_that_are_all_equal_explains_nothing():
    one = torch.ones(1, 2)
    totals = baseline_totals(one, 0 * one, one.bool())
    assert metric_means(totals.names, totals.values[None]) == {"objective/baseline_explained_variance": 0.0}


def test_median_and_max_are_of_what_is_finite():
    assert median_and_max(torch.tensor([3.0, math.nan, 1.0, math.inf, 2.0, 9.0])) == {"median": 2.0, "max": 9.0}
    assert median_and_max(torch.tensor([math.nan])) == {"median": 0.0, "max": 0.0}


def test_sums_of_completions_are_in_the_places_of_those_that_count():
    values, mask = torch.tensor([[1.0, 2.0], [3.0, math.nan]]), torch.tensor([[True, True], [True, False]])
    for counts, expected in (
        ([False, True, True], [math.nan, 3.0, 3.0]),  # the rows of those that count alone
        ([True, False], [3.0, math.nan]),
        ([False, False, False], [math.nan] * 3),
    ):
        assert completion_sums(values, mask, torch.tensor(counts)).tolist() == pytest.approx(expected, nan_ok=True)


class TestSignalAndVariance:
    def of(self, gradients: torch.Tensor, tokens: torch.Tensor) -> dict[str, float]:
        totals = gradient_totals(gradients, tokens)
        return metric_means(totals.names, totals.values[None])

    def test_expectations_are_the_squared_mean_and_the_variance_of_the_step(self):
        """Of steps with 2 and 3 tokens whose gradients are drawn from four vectors each, all steps enumerated."""
        torch.manual_seed(0)
        draws = torch.randn(2, 4, 3, dtype=torch.float64)  # by term
        steps = list(itertools.product(range(4), repeat=5))
        found, sums = [], []
        for step in steps:
            tokens = draws[:, list(step)]
            gradients = torch.stack([tokens[:, :2].sum(dim=1), tokens[:, 2:].sum(dim=1)], dim=1)
            found.append(self.of(gradients, torch.tensor([2, 3])))
            sums.append(tokens.mean(dim=1))
        sums = torch.stack(sums)  # (steps, 2, 3)
        variances = sums.var(dim=0, correction=0).sum(dim=1)
        for term, name in enumerate(("long_term", "single_step")):
            signal, variance = (
                sum(each[f"objective/{name}_{what}"] for each in found) / len(steps) for what in ("signal", "variance")
            )
            assert signal == pytest.approx(draws[term].mean(dim=0).square().sum().item(), abs=1e-9)
            assert variance == pytest.approx(variances[term].item(), rel=1e-9)

    def test_a_half_without_tokens_counts_for_nothing(self):
        totals = gradient_totals(torch.ones(2, 2, 3), torch.tensor([0, 4]))
        assert totals.values.tolist() == [[0.0, 0.0]] * 4
        nothing = gradient_totals(torch.zeros(2, 2, 3), torch.tensor([0, 0]))
        assert nothing.values.tolist() == [[0.0, 0.0]] * 4
