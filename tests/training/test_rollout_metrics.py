"""`RolloutMetrics` on its own: what a rollout and an update add to the metrics, with fillers, tools and faults."""

import math
from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from conftest import build_tokenizer

from minillm_trl.loss import ClippedTokens, LossTerms
from minillm_trl.models.token_scores import TokenScores
from minillm_trl.training.rollout_metrics import CompletionTable, RolloutMetrics
from minillm_trl.training.run_metrics import RunMetrics

TOKENIZER = build_tokenizer()
PUB, MILL = (TOKENIZER(text)["input_ids"] for text in (" the pub", " the mill"))
END, PAD = TOKENIZER.eos_token_id, TOKENIZER.pad_token_id
REFERENCES = {"references": ["the pub"]}
GROUPED = ("reward", "reward_std", "frac_reward_zero_std")  # GRPO's metrics of rewards


class Table(CompletionTable):
    """Remembers the rows that count."""

    def __init__(self):
        self.counts: list[list[bool]] = []

    def correct(self, batch: dict[str, torch.Tensor], counts: list[bool]) -> None:
        self.counts.append(counts)


def make_metrics(groups: int = 1, rewards: str = "", of_sequences: bool = False, teachers: str = "") -> RolloutMetrics:
    """The metrics of a run with reward functions and teachers of these names."""
    accelerator = Accelerator(cpu=True)
    return RolloutMetrics(
        RunMetrics(accelerator),
        {"train": defaultdict(list), "eval": defaultdict(list)},
        Table(),
        accelerator,
        TOKENIZER,
        {"train": groups, "eval": groups},
        rewards,
        torch.ones(len(rewards)),
        of_sequences,
        teachers,
    )


def rollout(*completions: list[int], tools: tuple[int, ...] = (), **others: torch.Tensor) -> dict[str, torch.Tensor]:
    """A batch of completions; tokens at the positions `tools` are a tool's."""
    length = max(map(len, completions))
    ids = torch.tensor([ids + [PAD] * (length - len(ids)) for ids in completions])
    mask = torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids in completions])
    tool_mask = torch.ones_like(mask)
    tool_mask[:, list(tools)] = 0
    prompts = torch.ones(len(completions), 1, dtype=torch.long)
    batch = {"prompt_ids": prompts, "prompt_mask": prompts, "completion_ids": ids, "completion_mask": mask}
    return {**batch, "tool_mask": tool_mask, **others}


def add_rollout(metrics: RolloutMetrics, mode: str, batch: dict, counts: list[bool], rewards: Any = None) -> dict:
    """Add a rollout whose rows all have the reference "the pub", and return the metrics since the last call."""
    rewards = torch.empty(len(counts), 0) if rewards is None else rewards
    metrics.add_rollout(mode, [REFERENCES] * len(counts), batch, torch.tensor(counts), rewards, [END])
    return dict(metrics.means.take(mode))


class TestRollout:
    def test_lengths_ends_and_rouge_l_are_of_the_rows_that_count(self):
        """An answer that ends, one that is cut, an empty one, one that ends with padding, and a filler."""
        batch = rollout([*PUB, END], MILL, [], [*PUB, PAD], [*PUB, *PUB, END])
        counts = [True, True, True, True, False]
        pub, mill = len(PUB) + 1, len(MILL)
        lengths = {
            "completions/mean_length": (2 * pub + mill) / 4,
            "completions/min_length": 0,
            "completions/max_length": max(pub, mill),
            "completions/mean_terminated_length": 2 * pub / 3,
            "completions/min_terminated_length": 0,
            "completions/max_terminated_length": pub,
            "completions/clipped_ratio": 1 / 4,
            "rollout/eos_rate": 1 / 4,
            "rollout/repeated_4grams": 0.0,
        }
        metrics = make_metrics()
        assert add_rollout(metrics, "train", batch, counts) == pytest.approx(lengths)
        expected = {**lengths, "rouge_l": (100 + 50 + 0 + 100) / 4}  # "the" is half of "the mill"
        assert add_rollout(metrics, "eval", batch, counts) == pytest.approx(expected)
        assert metrics.table.counts == [counts, counts]

    def test_completion_of_one_token_ends_like_others_and_an_empty_one_always(self):
        batch = rollout(PUB[:1], [END], [])
        batch["completion_ids"][2] = PUB[0]  # padding may be anything
        found = add_rollout(make_metrics(), "train", batch, [True, True, True])
        assert found["completions/clipped_ratio"] == pytest.approx(1 / 3)
        assert found["completions/min_terminated_length"] == 0

    def test_rewards_and_table_are_of_the_rows_of_all_processes(self):
        metrics = make_metrics(rewards="a")
        others = torch.tensor([False, True])  # of another process
        metrics.accelerator = SimpleNamespace(gather=lambda counts: torch.cat([counts, others]))
        metrics.logged["eval"]["rewards/a/mean"] = [9.0]
        rewards = torch.tensor([[1.0], [2.0], [4.0], [8.0]])
        add_rollout(metrics, "eval", rollout(PUB, PUB), [True, False], rewards)
        metrics.finish_eval_rewards()
        assert metrics.table.counts == [[True, False, False, True]]
        assert metrics.logged["eval"]["rewards/a/mean"] == [4.5]

    def test_tokens_of_tools_have_no_length_and_no_text(self):
        batch = rollout([*MILL, *PUB, END], [*MILL, *PUB], tools=tuple(range(len(MILL))))
        found = add_rollout(make_metrics(), "eval", batch, [True, True])
        assert found["completions/mean_length"] == len(PUB) + 0.5
        assert found["completions/clipped_ratio"] == 0.5
        assert found["rollout/eos_rate"] == 0.5
        assert found["rouge_l"] == 100.0

    def test_each_teacher_has_the_rouge_l_of_its_rows(self):
        batch = rollout(PUB, MILL, PUB, PUB, teacher_index=torch.tensor([0, 1, 1, 1]))
        found = add_rollout(make_metrics(teachers="ab"), "eval", batch, [True, True, True, False])
        assert found["rouge_l/a"] == 100.0
        assert found["rouge_l/b"] == 75.0
        assert found["rouge_l"] == pytest.approx(250 / 3)

    def test_only_the_means_over_all_completions_are_logged(self):
        metrics = make_metrics()
        metrics.logged["train"] |= {"completions/mean_length": [1.0], "num_tokens": [2.0]}
        add_rollout(metrics, "train", rollout(PUB), [True])
        assert metrics.logged["train"] == {"num_tokens": [2.0]}


class TestRewards:
    def left(self, mode: str, groups: int, rewards: str) -> set[str]:
        """GRPO's metrics that a run keeps."""
        metrics = make_metrics(groups, rewards)
        metrics.logged[mode] |= {name: [0.5] for name in GROUPED}
        add_rollout(metrics, mode, rollout(PUB, PUB), [True, True], torch.ones(2, len(rewards)))
        return set(metrics.logged[mode])

    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_metrics_of_what_a_run_does_not_have_are_dropped(self, mode: str):
        assert self.left(mode, 2, "a") == set(GROUPED)
        assert self.left(mode, 1, "a") == {"reward", "reward_std"}
        assert self.left(mode, 2, "") == self.left(mode, 1, "") == set()

    def test_evaluation_logs_those_of_all_its_completions_and_the_next_one_its_own(self):
        metrics = make_metrics(2, "ab")
        parts = (
            ([[1.0, 2.0], [1.0, math.nan]], [True, True]),
            ([[4.0, 4.0], [9.0, 9.0], [4.0, 4.0]], [True, False, True]),
        )
        for number in range(2):
            logged = metrics.logged["eval"]
            logged |= {name: [9.0, 9.0] for name in (*GROUPED, "rewards/a/mean", "other")}
            add_rollout(metrics, "train", rollout(PUB, PUB), [True, True], torch.full((2, 2), 100.0))
            for rewards, counts in parts:
                batch = rollout(*[PUB] * len(counts))
                add_rollout(metrics, "eval", batch, counts, torch.tensor(rewards) + number)
            metrics.finish_eval_rewards()
            assert set(logged) == {*GROUPED, "rewards/a/mean", "other"}  # those that GRPO logs
            assert logged["other"] == [9.0, 9.0]
            assert logged["rewards/a/mean"] == [2.5 + number]
            assert logged["reward"] == pytest.approx([(3 + 1 + 8 + 8 + 7 * number) / 4])
            assert logged["frac_reward_zero_std"] == [0.5]
            metrics.finish_eval_rewards()  # nothing is left
            assert logged["rewards/a/mean"] == [2.5 + number]


MASK = torch.tensor([[True, True, True], [True, False, False]])


def terms_of(value: float, loss: float = 0.0) -> LossTerms:
    """Terms that are `value` at the first token, twice at the second, and so on."""
    values = value * torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    clipped = ClippedTokens(*(torch.zeros_like(MASK) for _ in range(2)))
    return LossTerms(values + loss, values, 2 * values, 3 * values, None, values, clipped)


def scores_of(loss: float | None = None, term_gradients: torch.Tensor | None = None) -> TokenScores:
    entropy = torch.full(MASK.shape, 0.5)
    return TokenScores(entropy, entropy, None, None, None if loss is None else torch.tensor(loss), term_gradients)


def batch_of(**others: torch.Tensor) -> dict[str, torch.Tensor]:
    """A micro-batch of two rows with three tokens and one."""
    batch = rollout([5, 6, 7], [5])
    return {**batch, "advantages": torch.full(MASK.shape, 0.25), "faulty": torch.tensor([False, False]), **others}


def add_update(metrics: RolloutMetrics, mode: str, terms: LossTerms, scores: TokenScores, batch: dict) -> list[str]:
    return metrics.add_update(mode, terms, scores, batch, MASK, batch.get("counts", ~batch["faulty"]))


class TestUpdate:
    @pytest.mark.parametrize("mode", ["train", "eval"])
    def test_terms_are_means_over_tokens_and_completions(self, mode: str):
        metrics = make_metrics()
        for value in (1.0, 2.0):
            assert add_update(metrics, mode, terms_of(value), scores_of(8.0), batch_of()) == []
        found = dict(metrics.means.take(mode))
        assert found["objective/long_term"] == (10 + 20) / 8
        assert found["objective/single_step"] == 2 * (10 + 20) / 8
        assert found["objective/reverse_kl"] == 3 * (10 + 20) / 4
        assert (found["entropy"], found["objective/advantage"]) == (0.5, 0.25)
        assert "objective/reverse_kl_median" not in found  # of batches whose sizes differ

    @pytest.mark.parametrize(("of_sequences", "expected"), [(False, 16 / 8), (True, 16 / 3)])
    def test_evaluation_has_a_loss_of_the_tokens_or_of_the_rows_that_count(self, of_sequences: bool, expected: float):
        metrics = make_metrics(of_sequences=of_sequences)
        for counts in ([True, True], [True, False]):
            batch = batch_of(counts=torch.tensor(counts))
            add_update(metrics, "eval", terms_of(1.0), scores_of(8.0), batch)
            add_update(metrics, "train", terms_of(1.0), scores_of(99.0), batch)
        assert metrics.means.eval_loss() == pytest.approx(expected)
        assert dict(metrics.means.take("eval"))["objective/reverse_kl"] == 3 * 20 / 3

    def test_completions_that_count_have_a_median(self):
        metrics = make_metrics()
        for value, faulty in ((1.0, [False, False]), (2.0, [False, True])):
            batch = batch_of(prompt_index=torch.tensor([0, 1]), faulty=torch.tensor(faulty))
            add_update(metrics, "train", terms_of(value), scores_of(), batch)
        found = dict(metrics.means.take("train"))
        assert found["objective/reverse_kl_median"] == 18.0  # of 18, 12 and 36
        assert found["objective/reverse_kl_max"] == 36.0

    @pytest.mark.parametrize("faulty", [[True, False], [True, True]])
    def test_micro_batch_with_a_faulty_row_adds_nothing_to_the_means_of_a_training(self, faulty: list[bool]):
        metrics = make_metrics(teachers="ab")
        for value, marks in ((1.0, [False, False]), (9.0, faulty)):
            batch = batch_of(teacher_index=torch.tensor([0, 1]), faulty=torch.tensor(marks))
            for mode in ("train", "eval"):
                add_update(metrics, mode, terms_of(value), scores_of(1.0), batch)
        train, evaluation = (dict(metrics.means.take(mode)) for mode in ("train", "eval"))
        assert train["objective/long_term"] == 10 / 4
        assert train["objective/reverse_kl"] == 30 / 2
        assert train["objective/reverse_kl/a"] == 3 * (1 + 2 + 3)
        assert train["objective/single_step/b"] == 2 * 4
        assert evaluation["objective/long_term"] == (10 + 90) / 8
        assert evaluation["objective/reverse_kl_per_token/b"] == 3 * (4 + 36) / 2

    def test_loss_that_is_not_finite_is_explained_and_left_out_of_a_training_alone(self):
        metrics = make_metrics()
        batch = batch_of(prompt_index=torch.tensor([3, 7]))
        add_update(metrics, "train", terms_of(1.0), scores_of(), batch)
        terms = terms_of(9.0, loss=math.nan)
        assert add_update(metrics, "train", terms, scores_of(), batch) == [
            "the loss is not finite for the prompts [3, 7] of train_dataset"
        ]
        assert add_update(metrics, "eval", terms, scores_of(1.0), batch) == []
        assert dict(metrics.means.take("train"))["objective/long_term"] == 10 / 4
        assert dict(metrics.means.take("eval"))["objective/long_term"] == 90 / 4

    def test_fillers_are_no_rows_of_a_teacher(self):
        metrics = make_metrics(teachers="ab")
        batch = batch_of(teacher_index=torch.tensor([0, 0]), counts=torch.tensor([True, False]))
        add_update(metrics, "eval", terms_of(1.0), scores_of(1.0), batch)
        assert dict(metrics.means.take("eval"))["objective/reverse_kl/a"] == 30.0

    def test_signal_and_variance_are_of_the_micro_batches_of_a_step(self):
        """In each of two steps, halves of 2 * 3 and 2 * 1 tokens; their mean gradients are 1 and 3, then 2 and 6."""
        metrics = make_metrics()
        batch = batch_of(half=torch.tensor([0, 1]))
        for step in (1.0, 2.0):
            for synchronized, sums in (
                (False, [[[2.0], [1.0]], [[9.0], [0.0]]]),
                (True, [[[4.0], [5.0]], [[3.0], [2.0]]]),
            ):
                metrics.accelerator.gradient_state._set_sync_gradients(synchronized)
                sums = step * torch.tensor(sums)
                add_update(metrics, "train", terms_of(1.0), scores_of(term_gradients=sums), batch)
        found = dict(metrics.means.take("train"))
        share = 6 * 2 / 8**2
        assert found["objective/long_term_signal"] == pytest.approx((1 * 3 + 2 * 6) / 2)
        assert found["objective/long_term_variance"] == pytest.approx((2**2 + 4**2) / 2 * share)
        assert found["objective/single_step_signal"] == pytest.approx((2 * 1 + 4 * 2) / 2)
        assert found["objective/single_step_variance"] == pytest.approx((1**2 + 2**2) / 2 * share)
