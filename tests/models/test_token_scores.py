"""What the scores of a chunk contain, and that they do not depend on how they are computed."""

import pytest
import torch

from minillm_trl.divergences import forward_kl, reverse_kl
from minillm_trl.models.token_scores import score_logits, score_logits_in_place

N, VOCAB = 6, 9


def both(teacher: bool, *options) -> list:
    """Scores of the same logits by autograd and in place."""
    draws = torch.Generator().manual_seed(0)
    logits, of_teacher = torch.randn(2, N, VOCAB, dtype=torch.float64, generator=draws)
    targets = torch.randint(VOCAB, (N,), generator=draws)
    return [
        score_logits(logits, targets, of_teacher if teacher else None, *options),
        score_logits_in_place(logits.clone(), targets, of_teacher.clone() if teacher else None, *options)[0],
    ]


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl])
@pytest.mark.parametrize("kd_temperature", [0.7, 2.0])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_both_ways_give_the_same_scores_and_only_what_is_asked_for(divergence, kd_temperature, temperature):
    for measure in (False, True):
        plain, in_place = both(True, temperature, kd_temperature, divergence, measure)
        for actual, expected in zip(in_place[:3], plain[:3], strict=True):
            torch.testing.assert_close(actual, expected)
        if measure:
            torch.testing.assert_close(in_place.reverse_kl, plain.reverse_kl)
        else:
            assert in_place.reverse_kl is plain.reverse_kl is None
    for scores in both(True, temperature, kd_temperature, divergence):
        assert scores.reverse_kl is None
    for scores in both(False, temperature, kd_temperature, divergence, True):
        assert scores.divergence is scores.reverse_kl is None
        torch.testing.assert_close(scores.logps, plain.logps)
        torch.testing.assert_close(scores.entropy, plain.entropy)
