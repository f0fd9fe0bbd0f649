"""Rules that detect degenerate text from logged metrics. `docs/degeneration.md` gives the reasons for their limits."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

_ROUGE_L = "rouge_l"
_AS_GOOD = 0.9  # share of the best Rouge-L so far; between two evaluations on 50 prompts it may fall by 0.08
_NOISE = 4.0  # standard errors; a run applies eight rules to hundreds of logs, so fewer would raise false alarms
_START = 12  # first values, whose spread is the noise of the baseline


@dataclass(frozen=True)
class Rule:
    """A limit on a metric: `scale * baseline + offset`.

    Attributes:
        kind (`str`): kind of degeneration.
        metric (`str`): name of the metric in training logs; in evaluation logs it has the prefix `eval_`.
        falls (`bool`): whether values below the limit are bad; otherwise values above it are.
        scale, offset (`float`): the limit's terms.
        spared_by_rouge_l (`bool`): whether the rule is ignored while Rouge-L, if evaluated, holds.
        is_share (`bool`): whether the metric is a share of completions, whose noise follows from their number.
    """

    kind: str
    metric: str
    falls: bool
    scale: float
    offset: float = 0.0
    spared_by_rouge_l: bool = False
    is_share: bool = False

    def limit(self, baseline: float) -> float:
        """Return the limit for a baseline."""
        return self.scale * baseline + self.offset

    def is_beyond(self, value: float, limit: float) -> bool:
        """Return whether a value is on the bad side of a limit."""
        return value < limit if self.falls else value > limit


RULES = (
    # Only completions with EOS count: otherwise a student that learns to end its completions would seem to collapse
    Rule("length_collapse", "completions/mean_terminated_length", True, 0.7, spared_by_rouge_l=True),
    Rule("length_inflation", "completions/mean_length", False, 1.5, spared_by_rouge_l=True),
    Rule("length_inflation", "rollout/eos_rate", True, 1.0, -0.2, is_share=True),
    Rule("repetition", "rollout/repeated_4grams", False, 1.5, 0.05),
    Rule("entropy_collapse", "entropy", True, 0.5),
    Rule("exploding_weights", "importance_weight/effective_sample_size", True, 0.0, 0.3),
    # Per token, since the sum over a completion grows with its length
    Rule("rising_kl", "objective/reverse_kl_per_token", False, 1.5, 0.1),
    Rule("falling_quality", _ROUGE_L, True, 0.9),
)


class Window(NamedTuple):
    """The windows over a series of values.

    Attributes:
        baseline (`int`): number of first values, whose median is the baseline.
        recent (`int`): number of last values, whose median is compared with the limit.
        in_a_row (`int`): number of consecutive medians that must be beyond the limit.
    """

    baseline: int
    recent: int
    in_a_row: int


# Only the first value is certainly from before any update; later ones may already be degenerate
TRAINING = Window(baseline=1, recent=5, in_a_row=2)
# Every evaluation uses the same prompts and random numbers, so its few values have little noise
EVALUATION = Window(baseline=1, recent=1, in_a_row=2)


class Rollouts(NamedTuple):
    """The size and use of a run's rollouts.

    Attributes:
        completions (`int`, *optional*): completions per rollout, over all processes; None if unknown.
        updates (`int`): optimizer steps per rollout.
        passes (`int`): passes over each completion in these steps.
    """

    completions: int | None = None
    updates: int = 1
    passes: int = 1


UNKNOWN = Rollouts()


class Verdict(NamedTuple):
    """The state of one series.

    Attributes:
        is_beyond (`bool`): whether the series has degenerated.
        value, baseline, limit (`float`): the last median, the baseline, and the limit.
        is_well (`bool`): whether the last median is less than half way from the baseline to the limit.
        well_until (`int`): index of the middle value of the last such median; -1 without one.
    """

    is_beyond: bool
    value: float
    baseline: float
    limit: float
    is_well: bool
    well_until: int


class Degeneration(NamedTuple):
    """A metric that has degenerated: kind, name as logged, last median, baseline and limit."""

    kind: str
    metric: str
    value: float
    baseline: float
    limit: float


class Diagnosis(NamedTuple):
    """The state of a run at its last log.

    Attributes:
        found (`list[Degeneration]`): degenerate metrics.
        is_well (`bool`): whether every metric is less than half way to its limit.
        well_until (`int`): the last step at which every metric is known to have been; 0 if unknown.
    """

    found: list[Degeneration]
    is_well: bool
    well_until: int


def judge(
    values: Sequence[float],
    rule: Rule,
    window: Window = TRAINING,
    completions: int | None = None,
    baseline_variance: float = 1.0,
) -> Verdict:
    """Judge a series by a rule.

    The series has degenerated if `window.in_a_row` consecutive medians of `window.recent` values are beyond the limit.
    Where the limit depends on the baseline, the last median must also differ from it by more than [`noise`]. A share
    of completions can be judged before there are enough values for medians, see [`has_fallen_at_once`].

    Args:
        values (`Sequence[float]`): values of the metric, in order; at least one, all finite.
        rule ([`Rule`]): rule with the limit.
        window ([`Window`], *optional*): number of values in baseline and medians.
        completions (`int`, *optional*): number of completions behind each value; None if unknown.
        baseline_variance (`float`, *optional*): variance of the baseline, as a multiple of the other values' variance.
    """
    baseline = median(values[: window.baseline])
    limit = rule.limit(baseline)
    medians = [median(values[max(0, end - window.recent) : end]) for end in range(1, len(values) + 1)]
    beyond = [rule.is_beyond(value, limit) for value in medians]
    half_way = (baseline + limit) / 2
    well = [not rule.is_beyond(value, half_way) and not far for value, far in zip(medians, beyond, strict=True)]
    last_well = max((index for index, is_well in enumerate(well) if is_well), default=-1)
    if len(values) >= window.recent + window.in_a_row - 1:
        is_noise = rule.scale != 0 and abs(medians[-1] - baseline) <= noise(values, window, baseline_variance)
        is_beyond = all(beyond[-window.in_a_row :]) and not is_noise
    else:
        is_beyond = rule.is_share and completions is not None and has_fallen_at_once(values, rule, window, completions)
    return Verdict(
        is_beyond,
        medians[-1],
        baseline,
        limit,
        well[-1] and not is_beyond,
        max(-1, last_well - window.recent // 2),
    )


def has_fallen_at_once(values: Sequence[float], rule: Rule, window: Window, completions: int) -> bool:
    """Return whether a share of completions is beyond its limit right after the baseline, before there are medians.

    The last `window.in_a_row` values must be beyond the limit, and their mean must differ from the baseline by more
    than four standard errors of the difference between two shares of `completions` each.
    """
    first, last = values[: window.baseline], values[window.baseline :][-window.in_a_row :]
    baseline = median(first)
    if len(last) < window.in_a_row or not all(rule.is_beyond(value, rule.limit(baseline)) for value in last):
        return False
    pooled = fmean([*first, *last])
    error = math.sqrt(pooled * (1 - pooled) / completions * (1 / len(first) + 1 / len(last)))
    return abs(fmean(last) - baseline) > _NOISE * error


def noise(values: Sequence[float], window: Window, baseline_variance: float = 1.0) -> float:
    """Return four standard errors of the difference between baseline and median; 0 for medians of a single value.

    The baseline's error comes from the first values alone, since a degenerate student's metrics are noisier.
    """
    if window.recent == 1:
        return 0.0
    start, overall = _deviation(values[:_START]), _deviation(values)
    return _NOISE * math.sqrt(
        baseline_variance * start**2 * _of_median(window.baseline) + overall**2 * _of_median(window.recent)
    )


def _deviation(values: Sequence[float]) -> float:
    """Estimate the standard deviation from the median difference of neighbours, robust to drift and outliers.

    For normal noise, 1.4826 times the median absolute difference is its standard deviation, which is sqrt(2) times
    the deviation of one value.
    """
    return 1.4826 * median(abs(after - before) for before, after in pairwise(values)) / math.sqrt(2)


def _of_median(number: int) -> float:
    """Return the variance of the median of `number` values of variance 1: about pi / 2 times their mean's variance."""
    return 1.0 if number == 1 else math.pi / 2 / number


def diagnose(
    history: Sequence[Mapping[str, Any]], is_evaluated: bool = True, rollouts: Rollouts = UNKNOWN
) -> Diagnosis:
    """Apply all rules to the metrics that a run has logged.

    Args:
        history (`Sequence[Mapping]`): `log_history` of the trainer's state. Only metrics of its last entry, or judged
            together with one of them, can be found degenerate.
        is_evaluated (`bool`, *optional*): whether more evaluations will follow. If they measure Rouge-L, lengths are
            not judged before the next one.
        rollouts ([`Rollouts`], *optional*): size and use of the run's rollouts.
    """
    series = _series(history)
    rouge_l = {key: values for key, values in series.items() if key.endswith(_ROUGE_L)}
    found, suspicious, known = [], [], []
    for rule, key in ((rule, key) for rule in RULES for key in series if _is_metric(key, rule.metric)):
        steps, values = series[key]
        in_training = key == rule.metric
        verdict = (
            judge(values, rule, TRAINING, rollouts.completions, _baseline_variance(rule, steps, rollouts))
            if in_training
            else judge(values, rule, EVALUATION)
        )
        well_until = steps[verdict.well_until] if verdict.well_until >= 0 else 0
        concerned = {key}
        holds: bool | None = False  # None while Rouge-L has not been measured since the metric was well
        if rule.spared_by_rouge_l and rouge_l:
            concerned, holds = {key, *rouge_l}, _holds(rouge_l.values(), since=well_until)
        if verdict.is_well or holds:
            if in_training and verdict.is_well and verdict.well_until >= 0:
                known.append(well_until)
            continue
        suspicious.append(well_until)
        waits = holds is None and is_evaluated
        if verdict.is_beyond and not waits and concerned & history[-1].keys():
            found.append(Degeneration(rule.kind, key, verdict.value, verdict.baseline, verdict.limit))
    return Diagnosis(found, not suspicious, min([*suspicious, *known], default=0))


def _baseline_variance(rule: Rule, steps: Sequence[int], rollouts: Rollouts) -> float:
    """Return the variance of the first value as a multiple of the other values' variance.

    The first value, if logged at the first step, comes from a single update or rollout; later values are means over
    all updates or rollouts since the previous log.
    """
    if len(steps) < 3 or steps[0] > 1:
        return 1.0
    updates = median(after - before for before, after in pairwise(steps[1:]))
    of_completions = rule.metric.startswith(("completions/", "rollout/"))
    return max(1.0, updates / (rollouts.updates if of_completions else rollouts.passes))


def _is_metric(key: str, metric: str) -> bool:
    """Return whether a logged key is the metric, in training or in evaluation (`eval_` and the dataset's name)."""
    return re.fullmatch(rf"(eval_([^/]*_)?)?{metric}", key) is not None


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and finite values of each metric that has a rule."""
    metrics = {rule.metric for rule in RULES}
    wanted = {key for entry in history for key in entry if any(key.endswith(metric) for metric in metrics)}
    series = {}
    for key in sorted(wanted):
        pairs = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if "length" in key:  # the mean length of zero completions is logged as 0
            pairs = [(step, value) for step, value in pairs if value > 0]
        if pairs := [(step, value) for step, value in pairs if math.isfinite(value)]:
            series[key] = [step for step, _ in pairs], [value for _, value in pairs]
    return series


def _holds(rouge_l: Iterable[tuple[list[int], list[float]]], since: int) -> bool | None:
    """Return whether each Rouge-L is still close to its best; None if one was not measured after the step `since`."""
    if any(steps[-1] <= since for steps, _ in rouge_l):
        return None
    return all(values[-1] >= _AS_GOOD * max(values) for _, values in rouge_l)
