"""Expected rewards and leave-one-out baselines: the gradient that they must not change, and what they are made of."""

import dataclasses
import itertools
import math

import pytest
import torch
from datasets import Dataset
from tabular import Tabular, relative_error
from test_exact_gradient import ENDING, FIXED, both, exact_gradient, expected_gradient, make_logits
from test_reliable_runs import SAVED, assert_same_run
from test_tool_scores import CONVERSATIONS
from test_tool_scores import build_trainer as build_tool_trainer
from test_trainer import DATASET, PROMPTS, make_config, make_trainer
from test_trainer_gradient import PROBLEM, batch_of, build_trainer, enumerate_logps, gradient
from test_trainer_gradient import exact_gradient as exact_trainer_gradient
from test_trainer_gradient import expected_gradient as expected_trainer_gradient

from minillm_trl import MiniLLMTrainer, objectives
from minillm_trl.models.fused_head import ScoreRequest, add_scoring, score_hidden_states
from minillm_trl.models.lm_head import LMHead
from minillm_trl.rollouts.buffer import sequences

NO_CLIP = float("inf")
PAIRS = {"num_generations": 2, "steps_per_generation": 2}


class TestExpectedRewards:
    def distributions(self) -> tuple[torch.Tensor, torch.Tensor]:
        torch.manual_seed(0)
        teacher, student = torch.randn(2, 5, 7, dtype=torch.float64).unbind()
        return teacher.log_softmax(-1), student.log_softmax(-1)

    def test_without_options_they_are_minus_the_reverse_kl(self):
        teacher, student = self.distributions()
        expected = -objectives.reverse_kl(student, teacher)
        torch.testing.assert_close(objectives.expected_rewards(teacher, student), expected, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("options", [{}, {"scale": 0.5}, {"clip": 0.4}, {"scale": 2.0, "clip": 0.3}])
    def test_they_are_the_mean_of_the_rewards_over_the_policy_that_samples(self, options: dict):
        teacher, student = self.distributions()
        sampling = (3.0 * student).log_softmax(-1)
        everywhere = torch.ones_like(student, dtype=torch.bool)
        rewards = objectives.token_rewards(teacher, student, everywhere, **options)
        for policy, given in ((student, ()), (sampling, (sampling,))):
            actual = objectives.expected_rewards(teacher, student, *given, **options)
            torch.testing.assert_close(actual, (policy.exp() * rewards).sum(-1), rtol=1e-12, atol=0)

    def test_no_gradient_flows_through_them(self):
        teacher, student = (each.requires_grad_() for each in self.distributions())
        sampling = (2.0 * student).log_softmax(-1)
        assert not objectives.expected_rewards(teacher, student, sampling).requires_grad

    def test_tokens_of_probability_zero(self):
        half = torch.tensor([0.5, 0.5, 0.0]).log()
        whole = torch.tensor([1.0, 0.0, 0.0]).log()
        assert objectives.expected_rewards(half, whole).item() == pytest.approx(-math.log(2))
        assert objectives.expected_rewards(whole, half).item() == -math.inf
        assert objectives.expected_rewards(whole, half, clip=3.0).item() == pytest.approx((math.log(2) - 3) / 2)

    @pytest.mark.parametrize("options", [{"scale": 0.0}, {"clip": -1.0}])
    def test_options_that_are_not_positive_are_refused(self, options: dict):
        (name,) = options
        with pytest.raises(ValueError, match=f"{name}={options[name]}"):
            objectives.expected_rewards(*self.distributions(), **options)

    def test_they_stand_for_future_rewards_alone(self):
        mask = torch.tensor([[True, True, True, False]])
        rewards, future = torch.tensor([[1.0, 2.0, 4.0, 9.0]]), torch.tensor([[10.0, 20.0, 40.0, 90.0]])
        options = {"gamma": 0.5, "length_normalization": False, "future_rewards": future}
        assert objectives.reward_to_go(rewards, mask, **options).tolist() == [[40.0, 40.0, 0.0, 0.0]]
        options["include_current"] = True
        assert objectives.reward_to_go(rewards, mask, **options).tolist() == [[21.0, 22.0, 4.0, 0.0]]
        options["length_normalization"] = True
        expected = torch.tensor([[21 / 1.75, 22 / 1.5, 4.0, 0.0]])
        torch.testing.assert_close(objectives.reward_to_go(rewards, mask, **options), expected)


class TestExpectedGradient:
    @both
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({}, id="on policy"),
            pytest.param({"single_step": False, "include_current": True}, id="full return alone"),
            pytest.param({"alpha": 0.2, "weighting": "sequence"}, id="mixing with sequence weights"),
            pytest.param(
                {"alpha": 0.7, "weighting": "sequence", "single_step": False, "include_current": True},
                id="sequence weights on the full return",
            ),
        ],
    )
    def test_it_is_that_of_the_reverse_kl(self, problem: Tabular, options: dict):
        assert (
            relative_error(expected_gradient(problem, estimator="expected", **options), exact_gradient(problem)) < 1e-9
        )

    @pytest.mark.parametrize(
        ("weighting", "error"), [("token", 0.150), ("decoupled", 0.150), ("prefix", 0.044), ("sequence", 0.0)]
    )
    def test_other_weights_under_mixing_have_their_known_bias(self, weighting: str, error: float):
        actual = expected_gradient(FIXED, alpha=0.2, weighting=weighting, estimator="expected")
        assert relative_error(actual, exact_gradient(FIXED)) == pytest.approx(error, abs=0.001)

    @both
    def test_discounting_means_the_same_for_either_estimator(self, problem: Tabular):
        sampled, expected = (
            expected_gradient(problem, gamma=0.7, estimator=name) for name in objectives.REWARD_ESTIMATORS
        )
        assert relative_error(expected, sampled) < 1e-9

    def test_length_normalisation_means_the_same_where_all_lengths_are_one(self):
        """Elsewhere the length depends on the token whose reward is replaced."""
        differences = [
            relative_error(
                *(
                    expected_gradient(problem, length_normalization=True, estimator=name)
                    for name in ("expected", "sampled")
                )
            )
            for problem in (FIXED, ENDING)
        ]
        assert differences[0] < 1e-9
        assert differences[1] > 0.01

    @both
    def test_current_reward_must_stay_sampled(self, problem: Tabular):
        """An expected one would multiply a score of mean zero, so that it would teach nothing."""
        options = {"single_step": False, "include_current": True}
        assert relative_error(expected_gradient(problem, **options), exact_gradient(problem)) < 1e-9
        single_step_lost = expected_gradient(problem, single_step=False, estimator="expected")
        assert relative_error(single_step_lost, exact_gradient(problem)) > 0.5


def long_term_gradients(problem: Tabular, estimator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradient `(N, P)` of the long term of each completion, and the completions' probabilities under the student."""
    student, teacher = make_logits(problem)
    logps, teacher_logps = problem.token_logps(student), problem.token_logps(teacher)
    rewards = objectives.token_rewards(teacher_logps, logps, problem.mask)
    future = objectives.expected_rewards(problem.log_probs(teacher), problem.log_probs(student))
    returns = objectives.reward_to_go(
        rewards,
        problem.mask,
        length_normalization=False,
        future_rewards=future if estimator == "expected" else None,
    )
    loss = objectives.clipped_policy_gradient_loss(logps, logps.detach(), returns, problem.mask, NO_CLIP).sum(dim=1)
    each = torch.eye(len(loss), dtype=loss.dtype)
    (found,) = torch.autograd.grad(loss, student, each, is_grads_batched=True)
    return found.flatten(1), problem.sequence_logps(student).exp().detach()


@pytest.mark.parametrize(("problem", "share"), [(ENDING, 0.573), (FIXED, 0.563)], ids=["ending", "fixed length"])
def test_variance_of_the_long_term_is_smaller_with_expected_rewards(problem: Tabular, share: float):
    variances, means = [], []
    for estimator in objectives.REWARD_ESTIMATORS:
        gradients, probs = long_term_gradients(problem, estimator)
        means.append(probs @ gradients)
        variances.append((probs @ gradients.square() - means[-1].square()).sum().item())
    assert relative_error(means[1], means[0]) < 1e-9
    assert variances[1] / variances[0] == pytest.approx(share, abs=0.001)


class TestLeaveOneOut:
    RETURNS = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 99.0], [7.0, 99.0, 99.0], [10.0, 11.0, 12.0]])
    MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()

    def test_it_is_the_mean_of_the_other_rows_that_are_alive(self):
        actual = objectives.leave_one_out_baseline(self.RETURNS, self.MASK, torch.zeros(4, dtype=torch.long))
        assert actual.tolist() == [[7.0, 8.0, 12.0], [6.0, 6.5, 0.0], [5.0, 0.0, 0.0], [4.0, 3.5, 3.0]]

    def test_groups_are_apart_and_rows_without_company_have_none(self):
        actual = objectives.leave_one_out_baseline(self.RETURNS, self.MASK, torch.tensor([0, 1, 1, 0]))
        assert actual.tolist() == [[10.0, 11.0, 12.0], [7.0, 0.0, 0.0], [4.0, 0.0, 0.0], [1.0, 2.0, 3.0]]

    def test_it_is_detached_and_keeps_what_is_no_number_out(self):
        returns = self.RETURNS.masked_fill(~self.MASK, torch.nan).requires_grad_()
        actual = objectives.leave_one_out_baseline(returns, self.MASK, torch.zeros(4, dtype=torch.long))
        assert not actual.requires_grad
        assert actual.isfinite().all()

    def test_no_rows(self):
        nothing = torch.zeros(0, 3)
        assert objectives.leave_one_out_baseline(nothing, nothing.bool(), torch.zeros(0, dtype=torch.long)).shape == (
            0,
            3,
        )


def effect_of_baseline(problem: Tabular, alpha: float, weighting: str, shared_coins: bool, itself: bool) -> float:
    """Size of what a baseline adds to the expected gradient, over that of the gradient, by enumerating pairs of rows.

    Each row has the other as its baseline, or, with `itself`, the mean of both.
    """
    student, teacher = make_logits(problem)
    logps, teacher_logps = problem.token_logps(student), problem.token_logps(teacher)
    behavior = objectives.mixture_logps(logps.detach(), teacher_logps, alpha)
    rewards = objectives.token_rewards(teacher_logps, logps, problem.mask)
    returns = objectives.reward_to_go(rewards, problem.mask, length_normalization=False)
    weights, _ = objectives.importance_weights(logps, behavior, problem.mask, weighting)
    factors = weights * (logps - (behavior if weighting == "token" else logps.detach())).exp()

    def given_coins(coins: tuple[bool, ...]) -> torch.Tensor:
        tokens = torch.where(torch.tensor(coins), teacher_logps, logps.detach())
        return tokens.masked_fill(~problem.mask, 0.0).sum(dim=1).exp()

    horizon = problem.ids.shape[1]
    if shared_coins:
        pairs = 0.0
        for coins in itertools.product((False, True), repeat=horizon):
            prob = math.prod(alpha if coin else 1 - alpha for coin in coins)
            pairs = pairs + prob * given_coins(coins)[:, None] * given_coins(coins)
    else:
        mu = behavior.masked_fill(~problem.mask, 0.0).sum(dim=1).exp()
        pairs = mu[:, None] * mu
    total = 0.0
    for one, other in itertools.product(range(len(pairs)), repeat=2):
        pair, group = [one, other], torch.zeros(2, dtype=torch.long)
        baseline = objectives.leave_one_out_baseline(returns[pair], problem.mask[pair], group)[0]
        if itself:
            baseline = (baseline + returns[one]) / 2
        added = (factors[one] * baseline).masked_fill(~problem.mask[one], 0.0).sum()
        total = total + pairs[one, other] * added
    return (torch.autograd.grad(total, student)[0].norm() / exact_gradient(problem).norm()).item()


SMALL = Tabular.build(vocab=3, horizon=3)


class TestBaselineInExpectation:
    @pytest.mark.parametrize(
        ("alpha", "weighting"), [(0.0, "token"), (0.3, "token"), (0.3, "prefix"), (0.3, "sequence")]
    )
    def test_independent_rows_leave_the_gradient_as_it_is(self, alpha: float, weighting: str):
        assert effect_of_baseline(SMALL, alpha, weighting, shared_coins=False, itself=False) < 1e-12

    @pytest.mark.parametrize(
        ("weighting", "error"), [("token", 0.0045), ("decoupled", 0.0045), ("prefix", 0.0045), ("sequence", 0.028)]
    )
    def test_shared_coins_have_their_known_bias(self, weighting: str, error: float):
        actual = effect_of_baseline(SMALL, 0.2, weighting, shared_coins=True, itself=False)
        assert actual == pytest.approx(error, abs=0.0005)

    def test_a_row_in_its_own_mean_does_not(self):
        assert effect_of_baseline(SMALL, 0.0, "decoupled", shared_coins=False, itself=True) > 0.05


def build_pairs(trainer: MiniLLMTrainer) -> torch.Tensor:
    """Expected gradient of compute_loss over all pairs of completions that are sampled independently."""
    with torch.no_grad():
        logps, teacher_logps = enumerate_logps(trainer.model), enumerate_logps(trainer.teacher_model)
        mu = objectives.mixture_logps(logps, teacher_logps, trainer.args.teacher_mixed_alpha)
        probs = mu.masked_fill(~PROBLEM.mask, 0.0).sum(dim=1).exp().tolist()
    total = 0.0
    for one, other in itertools.combinations_with_replacement(range(len(probs)), 2):
        batch = trainer.score_rollouts(*batch_of(torch.tensor([one, other]), padding=1))
        loss = trainer.compute_loss(trainer.model, batch)
        times = 1 if one == other else 2
        total = total + times * probs[one] * probs[other] * gradient(loss, trainer.model)
    return total


class TestTrainersGradient:
    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"epsilon": 100.0}, id="on policy"),
            pytest.param({"epsilon": 100.0, "single_step_decomposition": False}, id="full return alone"),
            pytest.param({"teacher_mixed_alpha": 0.2, "importance_weighting": "sequence"}, id="sequence weights"),
        ],
    )
    def test_expected_rewards_leave_it_that_of_the_reverse_kl(self, tmp_path, options: dict):
        trainer = build_trainer(tmp_path, reward_estimator="expected", **options)
        alpha = options.get("teacher_mixed_alpha", 0.0)
        assert relative_error(expected_trainer_gradient(trainer, alpha), exact_trainer_gradient(trainer)) < 1e-9

    @pytest.mark.parametrize(
        "options",
        [
            pytest.param({"advantage_baseline": "position", "epsilon": 100.0}, id="position"),
            pytest.param(
                {
                    **{"advantage_baseline": "group", **PAIRS, "reward_estimator": "expected"},
                    **{"teacher_mixed_alpha": 0.2, "importance_weighting": "sequence", "shared_coins": False},
                },
                id="group, expected rewards, sequence weights",
            ),
        ],
    )
    def test_baselines_leave_it_that_of_the_reverse_kl(self, tmp_path, options: dict):
        trainer = build_trainer(tmp_path, **options)
        assert relative_error(build_pairs(trainer), exact_trainer_gradient(trainer)) < 1e-9


def distributions(trainer: MiniLLMTrainer, temperature: float) -> list[torch.Tensor]:
    """Log-probs `(N, T, V)` of student and teacher by plain forward passes."""
    ids = torch.cat([torch.tensor([[1, 2, 2]]).expand(len(PROBLEM.ids), -1), PROBLEM.ids], dim=1)
    with torch.no_grad():
        logits = [model(ids).logits[:, 2:-1] for model in (trainer.model, trainer.teacher_model)]
    return [torch.log_softmax(each / temperature, dim=-1) for each in logits]


class TestTrainer:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"kd_temperature": 2.0, "temperature": 0.7},
            {"reward_clip": 0.5, "reward_scale": 0.5, "gamma": 0.9},
            {"include_current_reward": True, "length_normalization": True},
        ],
        ids=["plain", "two temperatures", "scaled, clipped and discounted", "current reward and normalised"],
    )
    def test_returns_are_made_of_expected_rewards(self, tmp_path, options: dict):
        trainer = build_trainer(tmp_path, reward_estimator="expected", teacher_mixed_alpha=0.2, **options)
        batch = trainer.score_rollouts(*batch_of(slice(None)))
        log_q, _ = distributions(trainer, trainer.temperature)
        kd_q, kd_p = distributions(trainer, options.get("kd_temperature", trainer.temperature))
        clip, scale = options.get("reward_clip", math.inf), options.get("reward_scale", 1.0)
        rewards = ((kd_p - kd_q) / scale).clamp(-clip, clip)
        expected = (log_q.exp() * rewards).sum(dim=-1)
        sampled = rewards.gather(2, PROBLEM.ids[..., None]).squeeze(2)
        mask, gamma, include = PROBLEM.mask, options.get("gamma", 1.0), "include_current_reward" in options
        for row, t in mask.nonzero().tolist():
            terms = [sampled[row, t].item()] if include else []
            terms += [expected[row, i].item() for i in range(t + 1, 3) if mask[row, i]]
            value = sum(gamma**k * term for k, term in enumerate(terms))
            if options.get("length_normalization") and terms:
                value /= len(terms)
            assert batch["advantages"][row, t].item() == pytest.approx(value, abs=1e-9)
        assert not any(values.requires_grad for values in batch.values())

    @pytest.mark.parametrize(
        ("baseline", "groups"), [("position", [0] * 14), ("group", [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6])]
    )
    @pytest.mark.parametrize("estimator", objectives.REWARD_ESTIMATORS)
    def test_baseline_is_subtracted_from_returns(self, tmp_path, baseline: str, groups: list[int], estimator: str):
        options = {"reward_estimator": estimator, **PAIRS}
        rows = batch_of(slice(0, 14))
        plain = build_trainer(tmp_path, **options).score_rollouts(*rows)["advantages"]
        found = build_trainer(tmp_path, advantage_baseline=baseline, **options).score_rollouts(*rows)["advantages"]
        mask, groups = PROBLEM.mask[:14], torch.tensor(groups)
        for row, t in mask.nonzero().tolist():
            others = mask[:, t] & (groups == groups[row]) & (torch.arange(14) != row)
            mean = plain[others, t].mean().item() if others.any() else 0.0
            assert found[row, t].item() == pytest.approx(plain[row, t].item() - mean, abs=1e-12)
        assert found[~mask].abs().max() == 0

    def test_whole_groups_are_needed(self, tmp_path):
        trainer = build_trainer(tmp_path, advantage_baseline="group", **PAIRS)
        with pytest.raises(ValueError, match="num_generations=2 rows, got 3 rows"):
            trainer.score_rollouts(*batch_of(slice(0, 3)))

    def test_rows_that_are_left_out_are_in_no_mean(self, tmp_path):
        rows = [DATASET[i] for i in range(8)]
        options = {"advantage_baseline": "position", "teacher_mixed_alpha": 0.0}
        trainer = make_trainer(tmp_path, **options)
        trainer.model.train()
        score = trainer.scoring.of_rollout

        def broken(model, batch, sampled):
            scores = score(model, batch, sampled)
            scores.teacher_kd_logps[3, 0] = torch.nan
            return scores

        trainer.scoring.of_rollout = broken
        found = trainer._generate_and_score_completions(rows)
        mask = sequences(found)[2]
        plain = make_trainer(tmp_path, teacher_mixed_alpha=0.0)
        plain.model.train()
        returns = plain._generate_and_score_completions(rows)["advantages"]
        kept = mask & (torch.arange(8) != 3)[:, None]
        expected = returns - objectives.leave_one_out_baseline(returns, kept, torch.zeros(8, dtype=torch.long))
        torch.testing.assert_close(found["advantages"][kept], expected[kept])

    def test_evaluation_has_no_baseline(self, tmp_path):
        rows = [DATASET[i] for i in range(4)]
        plain, other = (
            make_trainer(tmp_path, advantage_baseline=name, teacher_mixed_alpha=0.0) for name in ("none", "position")
        )
        found = [each._generate_and_score_completions(rows)["advantages"] for each in (plain, other)]
        assert torch.equal(*found)

    def test_impossible_token_of_the_teacher_is_named(self, tmp_path):
        trainer = make_trainer(tmp_path, reward_estimator="expected", teacher_mixed_alpha=0.0)
        bias = torch.zeros(trainer.vocab_size)
        bias[7] = -torch.inf
        add_scoring(trainer.model, trainer.vocab_size, dataclasses.replace(trainer._teacher.head, bias=bias))
        ids = torch.tensor([[5, 6]])
        everywhere = torch.ones_like(ids)
        with pytest.raises(FloatingPointError, match=r"expected reward is -inf at token 5 .*set reward_clip"):
            trainer.score_rollouts(ids, everywhere, ids, everywhere)


def count_passes(trainer: MiniLLMTrainer) -> tuple[dict, dict[str, int]]:
    """A training rollout, and how often the bodies of both models ran for it."""
    counts = {"student": 0, "teacher": 0}

    def count(name: str):
        def hook(*unused) -> None:
            counts[name] += 1

        return hook

    trainer.model.base_model.register_forward_hook(count("student"))
    trainer.teacher_model.base_model.register_forward_hook(count("teacher"))
    trainer.model.train()
    column = trainer.train_dataset["prompt"]
    return trainer._generate_and_score_completions([{"prompt": column[i]} for i in range(8)]), counts


class TestPasses:
    @pytest.mark.parametrize(
        "options",
        [
            {"teacher_mixed_alpha": 0.5},
            {"teacher_mixed_alpha": 0.0},
            {"teacher_mixed_alpha": 0.0, "kd_temperature": 2.0, "temperature": 0.8},
            {"teacher_mixed_alpha": 0.3, "sampling_batch_size": 3, "teacher_hidden_states": "cpu"},
            {"teacher_mixed_alpha": 0.0, "top_k": 5, "num_iterations": 2},
            {"teacher_mixed_alpha": 0.0, "offload_teacher": True},
        ],
        ids=["mixed", "student alone", "two temperatures", "in parts", "TRL's generation", "teacher on the CPU"],
    )
    def test_no_model_runs_more_often_and_scores_are_those_of_a_scoring_pass(self, tmp_path, options: dict):
        _, plain = count_passes(make_trainer(tmp_path, **options))
        trainer = make_trainer(tmp_path, reward_estimator="expected", **options)
        batch, counts = count_passes(trainer)
        parts = 2 * math.ceil(8 / options.get("sampling_batch_size", 8)) if "sampling_batch_size" in options else 0
        assert counts["student"] == plain["student"]
        assert counts["teacher"] <= plain["teacher"] + parts
        tokens = [batch[name] for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask")]
        again = trainer.score_rollouts(*tokens)
        for name in ("advantages", "student_logps", "old_per_token_logps"):
            torch.testing.assert_close(batch[name], again[name], rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("accumulation", [1, 2])  # with 1, GRPO asks for the old log-probs by itself
    def test_turns_of_tools(self, tmp_path, accumulation: int):
        options = {"gradient_accumulation_steps": accumulation, "teacher_mixed_alpha": 0.3}
        _, plain = count_passes(build_tool_trainer(tmp_path, **options))
        trainer = build_tool_trainer(tmp_path, reward_estimator="expected", length_normalization=False, **options)
        batch, counts = count_passes(trainer)
        assert counts == plain
        mask = sequences(batch)[2]
        assert (batch["completion_mask"].bool() & ~mask).any()
        for row in range(len(CONVERSATIONS)):
            ids = [batch[f"{name}_ids"][row][batch[f"{name}_mask"][row].bool()] for name in ("prompt", "completion")]
            with torch.no_grad():
                q, p = (
                    model.eval()(torch.cat(ids)[None]).logits[0, len(ids[0]) - 1 : -1].log_softmax(-1)
                    for model in (trainer.model, trainer.teacher_model)
                )
            kl = (q.exp() * (q - p)).sum(-1).masked_fill(~mask[row, : len(ids[1])], 0.0)
            expected = -(kl.flip(0).cumsum(0).flip(0) - kl).masked_fill(~mask[row, : len(ids[1])], 0.0)
            torch.testing.assert_close(batch["advantages"][row, : len(ids[1])], expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [
        {"reward_estimator": "expected", "advantage_baseline": "position"},
        {"advantage_baseline": "group", "num_generations": 2, "shared_coins": False},
    ],
    ids=["position", "group"],
)
def test_resumed_run_is_the_run_that_was_not_interrupted(tmp_path, options: dict):
    runs = []
    for checkpoint in (None, str(tmp_path / "checkpoint-2"), str(tmp_path / "checkpoint-4")):
        trainer = make_trainer(tmp_path, **SAVED, **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        runs.append(trainer)
    for resumed in runs[1:]:
        assert_same_run(resumed, runs[0])


class TestRefused:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"reward_estimator": "mean"}, "reward_estimator must be one of .*'mean'"),
            ({"advantage_baseline": "value"}, "advantage_baseline must be one of .*'value'"),
            ({"advantage_baseline": "group"}, "advantage_baseline='group' .* num_generations=1"),
            (
                {"advantage_baseline": "position", "rkl_advantage": False},
                "advantage_baseline='position' has no effect",
            ),
            ({"reward_estimator": "expected", "rkl_advantage": False}, "reward_estimator='expected' has no effect"),
            (
                {"advantage_baseline": "position", "importance_weighting": "sequence"},
                "advantage_baseline='position' .*shared_coins=False",
            ),
        ],
    )
    def test_settings_without_a_meaning(self, tmp_path, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            make_config(tmp_path, **options)


def test_reward_functions_keep_their_own_advantage(tmp_path):
    def first_token(completion_ids, **unused) -> list[float]:
        return [float(ids[0]) for ids in completion_ids]

    rows = [{"prompt": prompt} for prompt in PROMPTS[:8]]
    options = {"advantage_baseline": "position", "reward_estimator": "expected", "teacher_mixed_alpha": 0.0}
    found = []
    for extra in (options, {**options, "reward_funcs": first_token}):
        trainer = make_trainer(tmp_path, dataset=Dataset.from_dict({"prompt": PROMPTS}), **extra)
        trainer.model.train()
        found.append(trainer._generate_and_score_completions(rows))
    mask = sequences(found[0])[2]
    rewards = found[0]["completion_ids"][:, 0].float()
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    added = found[1]["advantages"] - found[0]["advantages"]
    torch.testing.assert_close(added[mask], advantages[:, None].expand_as(added)[mask], rtol=1e-4, atol=1e-4)


class TestMetrics:
    def test_gradients_by_term_and_half_are_those_of_a_bias_on_the_logits(self):
        torch.manual_seed(0)
        hidden, teacher_hidden = torch.randn(2, 4, 3, 5, dtype=torch.float64)
        weights = torch.randn(2, 7, 5, dtype=torch.float64)
        head = LMHead(weights[0].requires_grad_(), torch.zeros(7, dtype=torch.float64, requires_grad=True), scale=0.8)
        mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]).bool()
        factors = torch.randn(2, 12, dtype=torch.float64)
        half = torch.tensor([0, 1, 1, 0])
        request = ScoreRequest(
            torch.randint(7, (4, 3)),
            torch.ones(4, 3),
            mask,
            0.7,
            teacher_hidden,
            1.5,
            loss=lambda scores, rows: factors[0][rows] * scores.logps + factors[1][rows] * scores.divergence,
            half=half,
        )
        found = score_hidden_states(hidden, head, request, 7, LMHead(weights[1].detach(), None)).term_gradients
        bias = torch.zeros(7, dtype=torch.float64, requires_grad=True)
        logits = 0.8 * torch.nn.functional.linear(hidden, head.weight.detach()) + bias
        logps = torch.log_softmax(logits / 0.7, -1).gather(2, request.completion_ids[..., None]).squeeze(2)
        p = torch.log_softmax(torch.nn.functional.linear(teacher_hidden, weights[1].detach()) / 1.5, -1)
        kl = objectives.reverse_kl(torch.log_softmax(logits / 1.5, -1), p)
        for term, values in enumerate((logps, kl)):
            for number in range(2):
                chosen = (mask & (half == number)[:, None]) * factors[term].view(4, 3) * values
                (expected,) = torch.autograd.grad(chosen.sum(), bias, retain_graph=True)
                torch.testing.assert_close(found[term, number], expected.float(), rtol=1e-5, atol=1e-6)

    def test_they_are_logged_and_steady_rewards_show(self, tmp_path):
        trainer = make_trainer(tmp_path, max_steps=2, advantage_baseline="position", reward_estimator="expected")
        trainer.train()
        first, second, *_ = trainer.state.log_history
        for entry in (first, second):
            for name in ("long_term", "single_step"):
                assert entry[f"objective/{name}_variance"] > 0
                assert entry[f"objective/{name}_signal"] != 0
            assert entry["objective/reverse_kl_max"] >= entry["objective/reverse_kl_median"] > 0
        assert -1 < first["objective/baseline_explained_variance"] < 1
        assert "objective/baseline_explained_variance" not in second  # of rollouts, which were made before

    def test_completions_of_a_prompt_are_in_one_half(self, tmp_path):
        trainer = make_trainer(tmp_path, num_generations=2)
        assert trainer.buffer.halves(8).tolist() == [0, 0, 1, 1, 0, 0, 1, 1]
        assert trainer.buffer.halves(4).tolist() == [0, 0, 1, 1]

    def test_each_step_has_as_much_of_either_half(self, tmp_path):
        trainer = make_trainer(tmp_path, steps_per_generation=4, max_steps=1)
        trainer.train()
        assert [batch["half"].sum().item() for batch in trainer.buffer.batches] == [2, 2, 2, 2]
