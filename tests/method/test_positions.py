"""Which positions are trained: schedules and weights by value, against TRL's IW-OPD, and in the trainer."""

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from test_trainer import DATASET, make_trainer
from trl.experimental.iw_opd import IWOPDTrainer

from minillm_trl.objectives import clipped_policy_gradient_loss
from minillm_trl.positions import prefix_discrepancy_weights, rollout_horizon, top_entropy_weights

NAN = float("nan")


class TestHorizon:
    def test_it_grows_by_the_same_amount_a_step_up_to_the_limit(self):
        assert [rollout_horizon(step, 50, start=10, steps=4) for step in range(6)] == [10, 20, 30, 40, 50, 50]
        assert [rollout_horizon(step, 50, start=10, steps=1) for step in range(3)] == [10, 50, 50]

    def test_it_stays_without_steps_and_is_whole_without_a_start(self):
        assert [rollout_horizon(step, 50, start=5) for step in (0, 9)] == [5, 5]
        assert rollout_horizon(3, 50) == 50

    def test_one_token_and_the_whole_limit_are_starts(self):
        assert [rollout_horizon(0, 50, start=start) for start in (1, 50)] == [1, 50]

    @pytest.mark.parametrize(("options", "message"), [((60, None), "start"), ((0, None), "start"), ((5, 0), "steps")])
    def test_bad_values_are_refused(self, options: tuple, message: str):
        with pytest.raises(ValueError, match=message):
            rollout_horizon(0, 50, *options)


class TestPrefixDiscrepancy:
    def test_values_by_hand(self):
        rewards = torch.tensor([[1.0, -2.0, 0.0, 1.0, NAN], [0.0, 0.0, 0.0, 0.0, 0.0]])
        mask = torch.tensor([[True] * 4 + [False], [True] * 5])
        weights = prefix_discrepancy_weights(rewards, mask, 0.5)
        expected = [[1.5, 1 + 0.5 * 3 / 4, 1 + 0.5 * 1 / 4, 1 + 0.5 * 1 / 4, 1.0], [1.5] * 5]
        torch.testing.assert_close(weights, torch.tensor(expected))

    def test_negative_gamma_is_refused(self):
        with pytest.raises(ValueError, match="gamma must not be negative"):
            prefix_discrepancy_weights(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), -1.0)

    def test_loss_is_that_of_trl_s_iw_opd(self):
        """Of r_t alone as advantage, so without the single step, on policy; value and gradient of the sum."""
        torch.manual_seed(0)
        logits = torch.randn(3, 6, 9, dtype=torch.float64, requires_grad=True)
        teacher_logps = torch.randn(3, 6, dtype=torch.float64) - 2
        tokens, mask = torch.randint(9, (3, 6)), torch.arange(6) < torch.tensor([[6], [4], [1]])
        settings = SimpleNamespace(
            temperature=1.3,
            iw_opd_gamma=0.5,
            iw_opd_epsilon=1e-8,
            model=SimpleNamespace(training=True),
            _metrics=defaultdict(lambda: defaultdict(list)),
        )
        expected = IWOPDTrainer._compute_iw_opd_loss(
            settings, logits, tokens, torch.where(mask, tokens, -100), teacher_logps, num_items_in_batch=7
        )
        logps = torch.log_softmax(logits / 1.3, -1).gather(2, tokens[..., None]).squeeze(2)
        rewards = (teacher_logps - logps).detach()
        loss = clipped_policy_gradient_loss(logps, logps.detach(), rewards, mask, float("inf"))
        loss = prefix_discrepancy_weights(rewards, mask, 0.5) * loss
        (ours,), (theirs,) = (torch.autograd.grad(total, logits) for total in (loss.sum() / 7, expected))
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-15)


class TestTopEntropy:
    def test_values_by_hand(self):
        entropy = torch.tensor([[1.0, 3.0, 9.0], [2.0, 0.5, 4.0]])
        mask = torch.tensor([[True, True, False], [True, True, True]])
        weights = top_entropy_weights(entropy, mask, 0.4)
        torch.testing.assert_close(weights, torch.tensor([[0.0, 2.5, 0.0], [0.0, 0.0, 2.5]]))

    @pytest.mark.parametrize("quantile", [0.01, 0.3, 0.5, 1.0])
    def test_mean_over_the_tokens_is_one(self, quantile: float):
        torch.manual_seed(0)
        mask = torch.rand(7, 11) < 0.8
        weights = top_entropy_weights(torch.randn(7, 11).double(), mask, quantile)
        assert weights[mask].mean().item() == pytest.approx(1.0)
        assert (weights[~mask] == 0).all()

    def test_no_tokens_have_no_weights(self):
        assert top_entropy_weights(torch.ones(1, 2), torch.zeros(1, 2, dtype=torch.bool), 0.5).tolist() == [[0.0, 0.0]]

    @pytest.mark.parametrize("quantile", [0.0, 1.1])
    def test_share_out_of_range_is_refused(self, quantile: float):
        with pytest.raises(ValueError, match="quantile must lie in"):
            top_entropy_weights(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), quantile)


class TestTrainer:
    def test_horizon_limits_training_rollouts_and_grows(self, tmp_path, monkeypatch: pytest.MonkeyPatch):
        trainer = make_trainer(
            tmp_path,
            max_completion_length=9,
            horizon_start=3,
            horizon_steps=2,
            steps_per_generation=1,
            max_steps=3,
            eval_dataset=DATASET.select(range(8)),
            eval_strategy="steps",
            eval_steps=1,
        )
        lengths: dict[str, list[int]] = {"train": [], "eval": []}
        score = trainer.scoring.training_batch

        def watch(model, batch, *args):
            lengths[trainer.mode].append(batch["completion_ids"].shape[1])
            return score(model, batch, *args)

        monkeypatch.setattr(trainer.scoring, "training_batch", watch)
        trainer.train()
        assert lengths["train"] == [3, 6, 9]
        assert max(lengths["eval"]) == 9

    @pytest.mark.parametrize("options", [{"iw_opd_gamma": 0.5}, {"top_entropy_quantile": 0.25}])
    def test_weights_are_in_training_batches_alone(self, tmp_path, options: dict):
        trainer = make_trainer(tmp_path, **options)
        rows = [trainer.train_dataset[i] for i in range(4)]
        for training in (True, False):
            trainer.model.train(training)
            batch = trainer._generate_and_score_completions(rows)
            assert ("token_weights" in batch) == training
            if training:
                weights = batch["token_weights"][batch["completion_mask"].bool()]
                assert weights.max() > 1.0
                assert weights.unique().numel() > 1
