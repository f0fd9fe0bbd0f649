"""The expected gradient of the objectives against the gradient of the enumerated reverse KL, in float64."""

import pytest
import torch
from tabular import Tabular, relative_error, sequence_reverse_kl

from minillm_trl import objectives

ENDING = Tabular.build()  # unequal lengths
FIXED = Tabular.build(eos=False)
both = pytest.mark.parametrize("problem", [ENDING, FIXED], ids=["ending", "fixed length"])


def make_logits(problem: Tabular) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    student = torch.randn(problem.num_prefixes, problem.vocab, dtype=torch.float64).requires_grad_()
    return student, 1.5 * torch.randn(problem.num_prefixes, problem.vocab, dtype=torch.float64)


def exact_gradient(problem: Tabular) -> torch.Tensor:
    student, teacher = make_logits(problem)
    kl = sequence_reverse_kl(problem.sequence_logps(student), problem.sequence_logps(teacher))
    return torch.autograd.grad(kl, student)[0]


def expected_gradient(
    problem: Tabular,
    alpha: float = 0.0,
    weighting: str = "token",
    long_term: bool = True,
    single_step: bool = True,
    weight_single_step: bool = False,
    mask: torch.Tensor | None = None,
    kl=objectives.reverse_kl,
    epsilon: float = float("inf"),
    cap: float | None = None,
    estimator: str = "sampled",
    **return_options,
) -> torch.Tensor:
    """Gradient of E_{y ~ mu}[sum_t loss_t] for the loss that the objectives make."""
    mask = problem.mask if mask is None else mask
    student, teacher = make_logits(problem)
    logps, teacher_logps = problem.token_logps(student), problem.token_logps(teacher)
    behavior_logps = objectives.mixture_logps(logps.detach(), teacher_logps, alpha)
    rewards = objectives.token_rewards(teacher_logps, logps, mask)
    if estimator == "expected":
        distributions = problem.log_probs(teacher), problem.log_probs(student)
        return_options["future_rewards"] = objectives.expected_rewards(*distributions)
    returns = objectives.reward_to_go(rewards, mask, **{"length_normalization": False, **return_options})
    long_weights, single_weights = objectives.importance_weights(logps, behavior_logps, problem.mask, weighting, cap)
    old_logps = behavior_logps if weighting == "token" else logps.detach()
    loss = torch.zeros_like(logps)
    if long_term:
        loss = loss + long_weights * objectives.clipped_policy_gradient_loss(logps, old_logps, returns, mask, epsilon)
    if single_step:
        if weight_single_step:
            single_weights = (logps.detach() - behavior_logps).exp()
        loss = loss + single_weights * kl(problem.log_probs(student), problem.log_probs(teacher))
    mu = behavior_logps.masked_fill(~problem.mask, 0.0).sum(dim=1).exp()
    total = (mu[:, None] * loss).masked_fill(~mask, 0.0).sum()
    return torch.autograd.grad(total, student)[0]


@both
def test_completions_probabilities_sum_to_one(problem: Tabular):
    for logits in make_logits(problem):
        assert problem.sequence_logps(logits).exp().sum().item() == pytest.approx(1.0, abs=1e-12)


@both
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="single step and future return"),
        pytest.param({"single_step": False, "include_current": True}, id="full return alone"),
        pytest.param({"alpha": 0.2, "weighting": "sequence"}, id="mixing with sequence weights"),
        pytest.param({"alpha": 0.2, "weighting": "sequence", "epsilon": 0.2}, id="clipping the drift alone"),
        pytest.param(
            {"alpha": 0.7, "weighting": "sequence", "single_step": False, "include_current": True},
            id="sequence weights on the full return",
        ),
    ],
)
def test_expected_gradient_is_that_of_the_reverse_kl(problem: Tabular, options: dict):
    assert relative_error(expected_gradient(problem, **options), exact_gradient(problem)) < 1e-9


@pytest.mark.parametrize(("weighting", "error"), [("token", 0.185), ("prefix", 0.110)])
def test_truncated_weights_under_mixing_have_their_known_bias(weighting: str, error: float):
    actual = expected_gradient(FIXED, alpha=0.2, weighting=weighting)
    assert relative_error(actual, exact_gradient(FIXED)) == pytest.approx(error, abs=0.001)


def test_decoupled_weights_have_the_expectation_of_the_token_ratio():
    options = {"alpha": 0.2, "epsilon": float("inf")}
    plain, decoupled = (
        expected_gradient(FIXED, weighting=weighting, **options) for weighting in ("token", "decoupled")
    )
    assert relative_error(decoupled, plain) < 1e-9


@both
def test_weighting_the_single_step_term_leaves_its_expectation_unchanged(problem: Tabular):
    plain = expected_gradient(problem, alpha=0.2)
    weighted = expected_gradient(problem, alpha=0.2, weight_single_step=True)
    assert relative_error(weighted, plain) < 1e-9


def swapped_kl(student_log_probs: torch.Tensor, teacher_log_probs: torch.Tensor) -> torch.Tensor:
    return (teacher_log_probs.exp() * (teacher_log_probs - student_log_probs)).sum(dim=-1)


@pytest.mark.parametrize(
    ("broken", "error"),
    [
        pytest.param({"include_current": True}, 0.838, id="current reward counted twice"),
        pytest.param({"long_term": False}, 0.320, id="single step alone"),
    ],
)
def test_missing_or_double_rewards_have_their_known_error(broken: dict, error: float):
    actual = expected_gradient(FIXED, **broken)
    assert relative_error(actual, exact_gradient(FIXED)) == pytest.approx(error, abs=0.001)


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param({"include_current": True}, id="current reward counted twice"),
        pytest.param({"long_term": False}, id="single step alone"),
        pytest.param({"mask": ENDING.mask & (ENDING.ids != 0)}, id="end of sequence dropped"),
        pytest.param({"mask": torch.ones_like(ENDING.mask)}, id="padding counted"),
        pytest.param({"kl": swapped_kl}, id="forward KL"),
        pytest.param({"gamma": 0.5}, id="discounted"),
        pytest.param({"length_normalization": True}, id="length-normalised"),
        pytest.param({"epsilon": 0.2, "alpha": 0.2}, id="clipped and mixed"),
        pytest.param({"alpha": 0.2, "weighting": "sequence", "cap": 1.0}, id="capped weights"),
    ],
)
def test_broken_or_biased_variants_are_told_apart(broken: dict):
    assert relative_error(expected_gradient(ENDING, **broken), exact_gradient(ENDING)) > 0.05


@both
def test_student_equal_to_teacher_has_zero_loss_and_gradient(problem: Tabular):
    student, _ = make_logits(problem)
    logps, log_probs = problem.token_logps(student), problem.log_probs(student)
    rewards = objectives.token_rewards(logps.detach(), logps, problem.mask)
    returns = objectives.reward_to_go(rewards, problem.mask)
    loss = objectives.clipped_policy_gradient_loss(logps, logps.detach(), returns, problem.mask, 0.2)
    loss = loss + objectives.reverse_kl(log_probs, log_probs)
    assert rewards.abs().max() == 0
    assert loss.abs().max() < 1e-15
    assert torch.autograd.grad(loss.sum(), student)[0].abs().max() < 1e-12
