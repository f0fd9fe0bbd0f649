"""The loss of each token and what the clip does to it, by hand."""

import math

import pytest
import torch

from minillm_trl.loss import clipped_tokens, loss_terms
from minillm_trl.models.fused_head import TokenScores

CLIP_RANGE = {"epsilon": 0.1, "epsilon_high": 0.3, "delta": 1.6}  # ratios in [0.9, 1.3], and at most 1.6
NAN = float("nan")


def logs(values: list[float]) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64).log()


@pytest.mark.parametrize(
    ("ratio", "advantage", "is_clipped"),
    [
        (1.29, 1.0, False),
        (1.31, 1.0, True),
        (0.5, 1.0, False),
        (0.91, -1.0, False),
        (0.89, -1.0, True),
        (1.31, -1.0, False),
        (1.59, -1.0, False),
        (1.61, -1.0, True),
        (2.0, 0.0, False),
        (0.5, 0.0, False),
    ],
)
def test_clipped_tokens_are_those_without_gradient(ratio: float, advantage: float, is_clipped: bool):
    old, advantages, mask = logs([0.2]), torch.tensor([[advantage]]), torch.tensor([[True]])
    moved = logs([0.2 * ratio])
    by_mixing = clipped_tokens(old, moved, old, advantages, mask, **CLIP_RANGE)
    assert (by_mixing.by_mixing.item(), by_mixing.by_drift.item()) == (is_clipped, False)
    by_drift = clipped_tokens(moved, old, old, advantages, mask, **CLIP_RANGE)
    assert (by_drift.by_mixing.item(), by_drift.by_drift.item()) == (False, is_clipped)
    by_both = clipped_tokens(moved, moved, old, advantages, mask, **CLIP_RANGE)
    assert (by_both.by_mixing.item(), by_both.by_drift.item()) == (is_clipped, False)
    padding = clipped_tokens(moved, moved, old, advantages, ~mask, **CLIP_RANGE)
    assert not any(values.any() for values in padding)


def test_range_is_symmetric_and_without_a_bound_by_default():
    old, mask = logs([0.1] * 4), torch.ones(1, 4, dtype=torch.bool)
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    clipped = clipped_tokens(logs([0.119, 0.121, 0.079, 0.9]), old, old, advantages, mask, epsilon=0.2)
    assert clipped.by_drift.tolist() == [[False, True, True, False]]


# Of three tokens and a slot of padding: q_theta, q_old and mu, and what else a rollout has
STUDENT, SAMPLED, BEHAVIOR = [0.3, 0.45, 0.2], [0.25, 0.3, 0.22], [0.5, 0.25, 0.21]
ADVANTAGES, LONG_WEIGHTS, SINGLE_WEIGHTS = [1.5, -2.0, 0.7], [0.8, 1.3, 0.6], [1.1, 0.9, 0.5]
KL, REFERENCE, SAMPLING_RATIO = [0.4, 0.1, 0.6], [0.35, 0.3, 0.25], [1.2, 0.9, 1.5]


def rollout_of_three(**parts: list[float]) -> dict[str, torch.Tensor]:
    rollout = {
        "advantages": torch.tensor([[*ADVANTAGES, NAN]], dtype=torch.float64),
        "old_per_token_logps": logs([*BEHAVIOR, NAN]),
        "student_logps": logs([*SAMPLED, NAN]),
        "long_term_weights": torch.tensor([[*LONG_WEIGHTS, 1.0]], dtype=torch.float64),
        "single_step_weights": torch.tensor([[*SINGLE_WEIGHTS, 1.0]], dtype=torch.float64),
    }
    return rollout | {name: torch.tensor([[*values, 1.0]], dtype=torch.float64) for name, values in parts.items()}


def loss_by_hand(t: int, base: list[float], options: dict, parts: dict) -> tuple[float, float, float]:
    """Loss, long-term term and weight of token t."""
    ratio, advantage = STUDENT[t] / base[t], ADVANTAGES[t]
    low, high = 1 - options["epsilon"], 1 + options["epsilon_high"]
    clipped = min(max(ratio, low), high) * advantage
    long_term = -LONG_WEIGHTS[t] * min(min(ratio, options["delta"]) * advantage, clipped)
    if "importance_sampling_ratio" in parts:
        long_term *= SAMPLING_RATIO[t]
    loss, weight = long_term, LONG_WEIGHTS[t] * ratio
    if options.get("single_step_decomposition", True):
        loss += SINGLE_WEIGHTS[t] * KL[t]
    if "ref_per_token_logps" in parts:
        difference = math.log(REFERENCE[t] / STUDENT[t])
        correction = weight if options.get("use_bias_correction_kl", True) else 1.0
        loss += options["beta"] * correction * (math.exp(difference) - difference - 1)
    return loss, long_term, weight


@pytest.mark.parametrize("weighting", ["token", "decoupled", "prefix", "sequence"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"single_step_decomposition": False},
        {"beta": 0.7},
        {"beta": 0.7, "use_bias_correction_kl": False},
        {"importance_sampling_ratio": True, "beta": 0.7},
    ],
    ids=str,
)
def test_loss_is_the_sum_of_its_weighted_terms(weighting: str, options: dict):
    options, parts = {**CLIP_RANGE, **options}, {}
    if options.pop("importance_sampling_ratio", False):
        parts["importance_sampling_ratio"] = SAMPLING_RATIO
    if "beta" in options:
        parts["ref_per_token_logps"] = [math.log(value) for value in REFERENCE]
    mask = torch.tensor([[True, True, True, False]])
    scores = TokenScores(logs([*STUDENT, NAN]), torch.zeros(1, 4), torch.tensor([[*KL, 0.0]], dtype=torch.float64))
    terms = loss_terms(rollout_of_three(**parts), scores, mask, importance_weighting=weighting, **options)
    base = BEHAVIOR if weighting == "token" else SAMPLED
    by_hand = [loss_by_hand(t, base, options, parts) for t in range(3)]
    actual = zip(
        terms.loss[0, :3].tolist(), terms.long_term[0, :3].tolist(), terms.weights[0, :3].tolist(), strict=True
    )
    assert list(actual) == [pytest.approx(expected) for expected in by_hand]
    assert terms.loss[0, 3] == 0.0
    assert terms.single_step[0, :3].tolist() == KL
    assert (terms.reference_kl is None) == ("beta" not in options)
    # to mu, 0.3 / 0.5 = 0.6 and 0.45 / 0.25 = 1.8, of which 1.2 was there from the start; to q_old, 1.2 and 1.5
    assert terms.clipped.by_drift.tolist() == [[False, weighting == "token", False, False]]
    assert not terms.clipped.by_mixing.any()
