"""Compute the metrics of training and evaluation, which `docs/metrics.md` explains, from sums and counts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from ..evaluation.metrics import repeated_ngrams, rouge_l
from ..loss import LossTerms
from ..masking import masked_sum

_MEAN, _MAX, _MEAN_SQUARE, _SHARE = (
    f"importance_weight/{name}" for name in ("mean", "max", "mean_square", "effective_sample_size")
)
_EXPLAINED = "objective/baseline_explained_variance"
_REVERSE_KL, _SINGLE_STEP = "objective/reverse_kl", "objective/single_step"
# Left out without values, as 0 would say something: Rouge-L, and what belongs to one of several teachers
_OPTIONAL = ("rouge_l", f"{_REVERSE_KL}/", f"{_REVERSE_KL}_per_token/", f"{_SINGLE_STEP}/")
_LARGEST = {
    _MAX,
    "completions/max_length",
    "completions/max_terminated_length",
    "sampling/sampling_logp_difference/max",
}
_SMALLEST = {"completions/min_length", "completions/min_terminated_length"}


def degeneration_indicators(
    completion_ids: Sequence[Sequence[int]], eos_token_ids: Sequence[int]
) -> dict[str, list[float]]:
    """Return per-completion indicators of degenerating text, which the reverse KL does not show."""
    return {
        "rollout/eos_rate": [float(bool(ids) and ids[-1] in eos_token_ids) for ids in completion_ids],
        "rollout/repeated_4grams": [repeated_ngrams(ids, 4) for ids in completion_ids],
    }


def rouge_l_to_references(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return Rouge-L of each text to its row's `references` or `completion`; NaN if the row has neither."""
    references = [_references(row) for row in rows]
    return [rouge_l(text, known) if known else math.nan for text, known in zip(texts, references, strict=True)]


def _references(row: Mapping[str, Any]) -> list[str]:
    if row.get("references"):
        return list(row["references"])
    completion = row.get("completion")
    if isinstance(completion, list):
        completion = completion[-1]["content"]
    return [completion] if completion else []


class Totals(NamedTuple):
    """Numerators and denominators of one process's metrics, in one tensor so that a single gather is enough.

    A maximum or minimum is its own numerator; its denominator is 0 if there are no values.

    Attributes:
        names (`list[str]`): names of the K metrics.
        values (`torch.Tensor` of shape `(K, 2)`): numerators and denominators, float64.
    """

    names: list[str]
    values: torch.Tensor


Fraction = tuple[torch.Tensor | float, torch.Tensor | float]


def make_totals(sums: Mapping[str, Fraction], device: torch.device) -> Totals:
    """Make [`Totals`] from a numerator and a denominator for each name."""
    pairs = [
        torch.stack([torch.as_tensor(value, dtype=torch.float64, device=device) for value in pair])
        for pair in sums.values()
    ]
    return Totals(list(sums), torch.stack(pairs))


@torch.no_grad()
def loss_totals(
    terms: LossTerms, entropy: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor, rows: int | torch.Tensor
) -> Totals:
    """Sum up the metrics of the loss over a batch of one process.

    Args:
        terms ([`LossTerms`]): terms of the loss at each token.
        entropy, advantages (`torch.Tensor` of shape `(B, T)`): at each token.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        rows (`int` or `torch.Tensor`): number of completions.
    """
    tokens = mask.sum()
    per_token = {
        "objective/long_term": terms.long_term,
        "objective/reverse_kl_per_token": terms.reverse_kl,
        "objective/advantage": advantages,
        "entropy": entropy,
    }
    if terms.single_step is not None:
        per_token["objective/single_step"] = terms.single_step
    if terms.reference_kl is not None:
        per_token["kl"] = terms.reference_kl
    sums: dict[str, Fraction] = {
        name: (masked_sum(values.double(), mask), tokens) for name, values in per_token.items()
    }
    sums["objective/reverse_kl"] = (sums["objective/reverse_kl_per_token"][0], rows)
    sums["clip_ratio/mixing"] = (terms.clipped.by_mixing.sum(), tokens)
    sums["clip_ratio/drift"] = (terms.clipped.by_drift.sum(), tokens)
    weights = terms.weights.double().masked_fill(~mask, 0.0)
    sums[_MEAN] = (weights.sum(), tokens)
    sums[_MEAN_SQUARE] = (weights.square().sum(), tokens)
    sums[_MAX] = (weights.max(), tokens)
    return make_totals(sums, mask.device)


@torch.no_grad()
def teacher_totals(
    terms: LossTerms,
    mask: torch.Tensor,
    teacher_index: torch.Tensor,
    counts: torch.Tensor | None,
    names: Sequence[str],
) -> Totals:
    """Sum up the reverse KL and the single step of the rows of each of several teachers.

    Args:
        terms ([`LossTerms`]): terms of the loss at each token.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
        teacher_index (`torch.Tensor` of shape `(B,)`): number of each row's teacher.
        counts (`torch.Tensor` of shape `(B,)`, *optional*): whether a row counts, or is a filler; None if all do.
        names (`Sequence[str]`): names of the teachers.
    """
    assert terms.single_step is not None  # cross_tokenizer is refused with several teachers
    sums: dict[str, Fraction] = {}
    for number, name in enumerate(names):
        own = teacher_index == number
        tokens = mask & own[:, None]
        rows = own.sum() if counts is None else (own & counts).sum()
        reverse_kl, single_step = (
            masked_sum(values.double(), tokens) for values in (terms.reverse_kl, terms.single_step)
        )
        sums[f"{_REVERSE_KL}/{name}"] = (reverse_kl, rows)
        sums[f"{_REVERSE_KL}_per_token/{name}"] = (reverse_kl, tokens.sum())
        sums[f"{_SINGLE_STEP}/{name}"] = (single_step, tokens.sum())
    return make_totals(sums, mask.device)


@torch.no_grad()
def token_totals(per_token: Mapping[str, torch.Tensor], mask: torch.Tensor) -> Totals:
    """Sum up tensors `(B, L)` over the tokens where `mask` is True, for means over tokens."""
    tokens = mask.sum()
    sums = {name: (masked_sum(values.double(), mask), tokens) for name, values in per_token.items()}
    return make_totals(sums, mask.device)


def completion_totals(
    lengths: torch.Tensor, ended: torch.Tensor, values: Mapping[str, Sequence[float]], counts: torch.Tensor
) -> Totals:
    """Sum up lengths and other values of completions, for means over completions.

    Args:
        lengths (`torch.Tensor` of shape `(B,)`): trained tokens of each completion.
        ended (`torch.Tensor` of shape `(B,)`): whether the completion ended before the length limit.
        values (`Mapping[str, Sequence[float]]`): further values of the completions by name; NaN where undefined.
        counts (`torch.Tensor` of shape `(B,)`): whether the completion counts, or is a filler.
    """

    def of_lengths(chosen: torch.Tensor, name: str) -> dict[str, Fraction]:
        found = lengths[chosen]
        count = len(found)
        return {
            f"completions/mean_{name}": (found.sum(), count),
            f"completions/min_{name}": (found.min() if count else 0.0, count),
            f"completions/max_{name}": (found.max() if count else 0.0, count),
        }

    sums = of_lengths(counts, "length") | of_lengths(counts & ended, "terminated_length")
    sums["completions/clipped_ratio"] = ((counts & ~ended).sum(), counts.sum())
    for name, of_rows in values.items():
        known = torch.tensor(of_rows, dtype=torch.float64, device=counts.device)[counts]
        known = known[~known.isnan()]
        sums[name] = (known.sum(), len(known))
    return make_totals(sums, counts.device)


def metric_means(names: list[str], gathered: torch.Tensor) -> dict[str, float]:
    """Compute metrics from the totals of all micro-batches of all processes.

    Args:
        names (`list[str]`): names of [`Totals`].
        gathered (`torch.Tensor` of shape `(parts, K, 2)`): values of [`Totals`] of every micro-batch and process.

    Returns:
        `dict`: means over tokens, in nats, or over completions. `objective/reverse_kl` is the mean over completions of
        sums over tokens. Its states come from the behavior policy; in evaluation this is the student, which makes it
        an unbiased estimate of the objective. `importance_weight/effective_sample_size` is the share
        sum^2 / (n * sum of squares). `objective/baseline_explained_variance` is
        1 - var(returns - baseline) / var(returns) over tokens. Metrics without values are 0, except Rouge-L and
        those of one of several teachers, which are left out.
    """
    numerators, denominators = gathered.sum(dim=0).unbind(dim=1)
    metrics = dict(zip(names, (numerators / denominators.clamp(min=1.0)).tolist(), strict=True))
    for name in metrics.keys() & (_LARGEST | _SMALLEST):
        values, counts = gathered[:, names.index(name)].unbind(dim=1)
        known = values[counts > 0]
        if len(known):
            metrics[name] = (known.max() if name in _LARGEST else known.min()).item()
    if _MAX in metrics:
        mean_square = metrics.pop(_MEAN_SQUARE)
        metrics[_SHARE] = metrics[_MEAN] ** 2 / mean_square if mean_square else 1.0
    if f"{_EXPLAINED}/returns_mean" in metrics:
        before, after = (
            metrics.pop(f"{_EXPLAINED}/{of}_mean_square") - metrics.pop(f"{_EXPLAINED}/{of}_mean") ** 2
            for of in ("returns", "advantages")
        )
        metrics[_EXPLAINED] = 1.0 - after / before if before > 0 else 0.0
    for name in [name for name in metrics if name.startswith(_OPTIONAL)]:
        if denominators[names.index(name)] == 0:
            del metrics[name]
    return metrics


@torch.no_grad()
def completion_sums(values: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Sum values over the tokens of each completion of a micro-batch.

    Args:
        values (`torch.Tensor` of shape `(b, T)`): values of all completions, or only of those that count, in order.
        mask (`torch.Tensor` of shape `(b, T)`): True on the completion's tokens.
        counts (`torch.Tensor` of shape `(B,)`): whether the completion counts.

    Returns:
        `torch.Tensor` of shape `(B,)`: sums, NaN for completions that do not count.
    """
    sums, rows = masked_sum(values.double(), mask, dim=1), counts.nonzero().squeeze(1)
    found = sums.new_full((len(counts),), torch.nan)
    found[rows] = sums[rows] if len(sums) == len(counts) else sums[: len(rows)]
    return found


def median_and_max(values: torch.Tensor) -> dict[str, float]:
    """Return median (the lower of two middle values) and maximum of the finite values in `(N,)`; 0 without any."""
    known = values[values.isfinite()]
    if not len(known):
        return {"median": 0.0, "max": 0.0}
    return {"median": known.median().item(), "max": known.max().item()}


def baseline_totals(returns: torch.Tensor, advantages: torch.Tensor, mask: torch.Tensor) -> Totals:
    """Sum up moments of one process's rollout, for the variance that the baseline explains.

    Args:
        returns, advantages (`torch.Tensor` of shape `(B, T)`): before and after subtracting the baseline.
        mask (`torch.Tensor` of shape `(B, T)`): True on the completion's tokens.
    """
    tokens = mask.sum()
    moments = {
        f"{_EXPLAINED}/{of}_{name}": (masked_sum(power, mask), tokens)
        for of, values in (("returns", returns.double()), ("advantages", advantages.double()))
        for name, power in (("mean", values), ("mean_square", values.square()))
    }
    return make_totals(moments, mask.device)


@torch.no_grad()
def gradient_totals(gradients: torch.Tensor, tokens: torch.Tensor) -> Totals:
    r"""Estimate signal and variance of both terms of an optimizer step's gradient, from two independent halves.

    Let $g_1, g_2$ be the mean gradients over the $n_1, n_2$ tokens of the halves. Then $\langle g_1, g_2 \rangle$
    estimates the squared norm of the expected gradient. $\|g_1 - g_2\|^2\, n_1 n_2 / (n_1 + n_2)^2$ estimates the
    variance of the step's gradient around it, summed over its components.

    Args:
        gradients (`torch.Tensor` of shape `(2, 2, V)`): sums over tokens by term (long term, single step) and half.
        tokens (`torch.Tensor` of shape `(2,)`): number of tokens of each half; without tokens in one of
            them, the estimates are left out.
    """
    known = int(tokens.min() > 0)
    of_halves = gradients.double() / tokens.clamp(min=1)[:, None]
    share = tokens.prod() / tokens.sum().clamp(min=1).double().square()
    totals: dict[str, Fraction] = {}
    for name, (first, second) in zip(("long_term", "single_step"), of_halves, strict=True):
        totals[f"objective/{name}_signal"] = (known * (first @ second), known)
        totals[f"objective/{name}_variance"] = ((first - second).square().sum() * share, known)
    return make_totals(totals, gradients.device)


def reward_metrics(
    rewards: torch.Tensor, weights: torch.Tensor, names: Sequence[str], num_generations: int
) -> dict[str, float]:
    """Compute GRPO's metrics of reward functions over all completions of an evaluation.

    Args:
        rewards (`torch.Tensor` of shape `(N, F)`): NaN where a function does not apply.
        weights (`torch.Tensor` of shape `(F,)`): weight of each function.
        names (`Sequence[str]`): name of each function.
        num_generations (`int`): completions of a prompt, which are neighbours.

    Returns:
        `dict`: mean and sample standard deviation of each function and of the weighted sum, and the share of prompts
        whose completions all have the same reward; NaN without values.
    """

    def mean_and_deviation(values: torch.Tensor) -> tuple[float, float]:
        known = values[~values.isnan()].double()
        return known.mean().item(), known.std().item() if len(known) > 1 else math.nan

    metrics = {}
    for name, values in zip(names, rewards.unbind(dim=1), strict=True):
        metrics[f"rewards/{name}/mean"], metrics[f"rewards/{name}/std"] = mean_and_deviation(values)
    weighted = (rewards * weights.to(rewards.device)).nansum(dim=1)
    weighted = weighted.masked_fill(rewards.isnan().all(dim=1), math.nan)
    metrics["reward"], metrics["reward_std"] = mean_and_deviation(weighted)
    groups = weighted.view(-1, num_generations)
    same = torch.isclose(groups, groups[:, :1]).all(dim=1)
    metrics["frac_reward_zero_std"] = same.double().mean().item()
    return metrics
