"""Numbers that describe what the loss does with a batch of rollouts. `docs/metrics.md` explains each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .evaluation.metrics import repeated_ngrams, rouge_l
from .loss import LossTerms
from .masking import masked_sum

_MEAN, _MAX, _MEAN_SQUARE, _SHARE = (
    f"importance_weight/{name}" for name in ("mean", "max", "mean_square", "effective_sample_size")
)


def degeneration(completion_ids: Sequence[Sequence[int]], eos_token_ids: Sequence[int]) -> dict[str, list[float]]:
    """Of each completion, what shows text degenerating while the reverse KL still falls."""
    return {
        "rollout/eos_rate": [float(bool(ids) and ids[-1] in eos_token_ids) for ids in completion_ids],
        "rollout/repeated_4grams": [repeated_ngrams(ids, 4) for ids in completion_ids],
    }


def rouge_l_to_references(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Rouge-L of each text to the `references` of its row, or to its `completion`; NaN where there is neither."""
    references = [_references(row) for row in rows]
    return [rouge_l(text, each) if each else math.nan for text, each in zip(texts, references, strict=True)]


def _references(row: Mapping[str, Any]) -> list[str]:
    if row.get("references"):
        return list(row["references"])
    completion = row.get("completion")
    if isinstance(completion, list):
        completion = completion[-1]["content"]
    return [completion] if completion else []


class Totals(NamedTuple):
    """Numerators and denominators `(K,)` of one process's metrics, in one order for one gather of all of them."""

    names: list[str]
    values: torch.Tensor


@torch.no_grad()
def loss_totals(terms: LossTerms, entropy: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Totals:
    """What [`loss_metrics`] needs of one process's batch; all tensors of shape `(B, T)`."""
    tokens, rows = mask.sum().double(), torch.tensor(float(len(mask)), device=mask.device, dtype=torch.float64)
    per_token = {
        "objective/long_term": terms.long_term,
        "objective/single_step": terms.single_step,
        "objective/advantage": advantages,
        "entropy": entropy,
    }
    if terms.reference_kl is not None:
        per_token["kl"] = terms.reference_kl
    sums = {name: (masked_sum(values.double(), mask), tokens) for name, values in per_token.items()}
    sums["objective/reverse_kl"] = (sums["objective/single_step"][0], rows)
    sums["clip_ratio/mixing"] = (terms.clipped.by_mixing.sum(), tokens)
    sums["clip_ratio/drift"] = (terms.clipped.by_drift.sum(), tokens)
    weights = terms.weights.double().masked_fill(~mask, 0.0)
    sums[_MEAN] = (weights.sum(), tokens)
    sums[_MEAN_SQUARE] = (weights.square().sum(), tokens)
    sums[_MAX] = (weights.max(), tokens)
    return Totals(list(sums), torch.stack([torch.stack([n.double(), d]) for n, d in sums.values()]))


def corpus_totals(per_token: Mapping[str, torch.Tensor], mask: torch.Tensor) -> Totals:
    """The same for a batch of the corpus of L_PT: tensors of shape `(B, L)` by name, and where a token counts."""
    sums = [torch.stack([masked_sum(values.detach().double(), mask), mask.sum()]) for values in per_token.values()]
    return Totals(list(per_token), torch.stack(sums))


def loss_metrics(names: list[str], gathered: torch.Tensor) -> dict[str, float]:
    """Metrics of all micro-batches of all processes.

    Args:
        names (`list[str]`): of [`Totals`].
        gathered (`torch.Tensor` of shape `(parts, K, 2)`): values of [`Totals`] of every micro-batch and process.

    Returns:
        `dict`: means over the tokens in nats; `objective/reverse_kl` is the sum over a completion's tokens, mean over
        completions (states from the behavior policy; in evaluation from the student, so an unbiased estimate of the
        objective); `importance_weight/effective_sample_size` is a share, sum^2 / (n * sum of squares).
    """
    numerators, denominators = gathered.sum(dim=0).unbind(dim=1)
    metrics = dict(zip(names, (numerators / denominators.clamp(min=1.0)).tolist(), strict=True))
    if _MAX in metrics:
        metrics[_MAX] = gathered[:, names.index(_MAX), 0].max().item()
        mean_square = metrics.pop(_MEAN_SQUARE)
        metrics[_SHARE] = metrics[_MEAN] ** 2 / mean_square if mean_square else 1.0
    return metrics
