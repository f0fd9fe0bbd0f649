"""Rules that tell from logged metrics when a student's text degenerates. `docs/degeneration.md` gives the reasons."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean, median
from typing import Any, NamedTuple

_ROUGE_L = "rouge_l"
_AS_GOOD = 0.9  # of the best Rouge-L so far; from one evaluation on 50 prompts to the next it may fall by 0.08
_NOISE = 4.0  # standard errors: a run has hundreds of logs and eight rules
_START = 12  # values


@dataclass(frozen=True)
class Rule:
    """A metric is beyond its limit, `scale * baseline + offset`: below it if it `falls`, above it otherwise.

    Attributes:
        kind (`str`): of degeneration.
        metric (`str`): as logged in training; in evaluation `eval_` stands before it.
        falls (`bool`): whether low values are the bad ones.
        scale, offset (`float`): of the limit.
        spared_by_rouge_l (`bool`): whether it counts only where Rouge-L, if it is evaluated, falls too.
        is_share (`bool`): whether it is a share of the completions, whose noise follows from their number.
    """

    kind: str
    metric: str
    falls: bool
    scale: float
    offset: float = 0.0
    spared_by_rouge_l: bool = False
    is_share: bool = False

    def limit(self, baseline: float) -> float:
        """The limit at a baseline."""
        return self.scale * baseline + self.offset

    def is_beyond(self, value: float, limit: float) -> bool:
        """Whether a value is on the bad side of a limit."""
        return value < limit if self.falls else value > limit


RULES = (
    # of those completions that end by themselves, so that a student that learns to end has no shorter ones
    Rule("length_collapse", "completions/mean_terminated_length", True, 0.7, spared_by_rouge_l=True),
    Rule("length_inflation", "completions/mean_length", False, 1.5, spared_by_rouge_l=True),
    Rule("length_inflation", "rollout/eos_rate", True, 1.0, -0.2, is_share=True),
    Rule("repetition", "rollout/repeated_4grams", False, 1.5, 0.05),
    Rule("entropy_collapse", "entropy", True, 0.5),
    Rule("exploding_weights", "importance_weight/effective_sample_size", True, 0.0, 0.3),
    # per token: the sum over a completion rises with its length, however close each token is to the teacher
    Rule("rising_kl", "objective/reverse_kl_per_token", False, 1.5, 0.1),
    Rule("falling_quality", _ROUGE_L, True, 0.9),
)


class Window(NamedTuple):
    """How a series of values is read.

    Attributes:
        baseline (`int`): number of first values whose median is the baseline.
        recent (`int`): number of last values whose median is compared with it.
        in_a_row (`int`): number of such medians in a row that must be beyond the limit.
    """

    baseline: int
    recent: int
    in_a_row: int


# the first value is that of the first rollout, before any update: the next ones may already be degenerate
TRAINING = Window(baseline=1, recent=5, in_a_row=2)
# all prompts with the same random numbers each time: hardly any noise, and few values
EVALUATION = Window(baseline=1, recent=1, in_a_row=2)


class Rollouts(NamedTuple):
    """How a run samples.

    Attributes:
        completions (`int`, *optional*): of a rollout, on all processes; None if unknown.
        updates (`int`): optimizer steps from one rollout to the next.
        passes (`int`): times that each completion is trained on in them.
    """

    completions: int | None = None
    updates: int = 1
    passes: int = 1


UNKNOWN = Rollouts()


class Verdict(NamedTuple):
    """Of one series.

    Attributes:
        is_beyond (`bool`): whether it has degenerated.
        value, baseline, limit (`float`): the last median, the baseline, and the limit.
        is_well (`bool`): whether the last median is less than half way from the baseline to the limit.
        well_until (`int`): index of the value in the middle of the last such median; -1 for none.
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
    """Of a run.

    Attributes:
        found (`list[Degeneration]`): what the last log shows.
        is_well (`bool`): whether no metric is half way to its limit.
        well_until (`int`): the step up to which no metric was; 0 if this is not known of any later one.
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

    It is beyond the limit if the medians of the last `window.recent` values are, `window.in_a_row` times in a row, and
    the last one differs from the baseline by more than the noise (see [`noise`]) where the limit depends on that. A
    share of completions is judged earlier, see [`has_fallen_at_once`].

    Args:
        values (`Sequence[float]`): of the metric, in order; at least one, and all finite.
        rule ([`Rule`]): with the limit.
        window ([`Window`], *optional*): how many values are taken together.
        completions (`int`, *optional*): that a value is a mean over; None if unknown.
        baseline_variance (`float`, *optional*): of the baseline, as a multiple of the other values' variance.
    """
    baseline = median(values[: window.baseline])
    limit = rule.limit(baseline)
    medians = [median(values[max(0, end - window.recent) : end]) for end in range(1, len(values) + 1)]
    beyond = [rule.is_beyond(each, limit) for each in medians]
    half_way = (baseline + limit) / 2
    well = [not rule.is_beyond(each, half_way) and not far for each, far in zip(medians, beyond, strict=True)]
    last_well = max((index for index, each in enumerate(well) if each), default=-1)
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
    """Whether a share of completions is beyond its limit right after the baseline, before there are medians.

    The last `window.in_a_row` values are, and their mean differs from the baseline by more than four standard errors
    of two shares with that many completions.
    """
    first, last = values[: window.baseline], values[window.baseline :][-window.in_a_row :]
    baseline = median(first)
    if len(last) < window.in_a_row or not all(rule.is_beyond(each, rule.limit(baseline)) for each in last):
        return False
    pooled = fmean([*first, *last])
    error = math.sqrt(pooled * (1 - pooled) / completions * (1 / len(first) + 1 / len(last)))
    return abs(fmean(last) - baseline) > _NOISE * error


def noise(values: Sequence[float], window: Window, baseline_variance: float = 1.0) -> float:
    """Four standard errors of the difference between baseline and median; 0 for single values.

    Of the baseline it is that at the start, as a degenerate student's metrics are noisier.
    """
    if window.recent == 1:
        return 0.0
    start, overall = _deviation(values[:_START]), _deviation(values)
    return _NOISE * math.sqrt(
        baseline_variance * start**2 * _of_median(window.baseline) + overall**2 * _of_median(window.recent)
    )


def _deviation(values: Sequence[float]) -> float:
    """Standard deviation by the median difference between neighbours, which neither a drift nor a few outliers change
    much."""
    return 1.4826 * median(abs(after - before) for before, after in pairwise(values)) / math.sqrt(2)


def _of_median(number: int) -> float:
    """Variance of the median of so many values: about pi / 2 times that of their mean."""
    return 1.0 if number == 1 else math.pi / 2 / number


def diagnose(
    history: Sequence[Mapping[str, Any]], is_evaluated: bool = True, rollouts: Rollouts = UNKNOWN
) -> Diagnosis:
    """Apply all rules to what a run has logged.

    Args:
        history (`Sequence[Mapping]`): `log_history` of the trainer's state. Only what its last entry bears on can be
            found to have degenerated.
        is_evaluated (`bool`, *optional*): whether evaluations are still to come. Where they have Rouge-L, lengths are
            not judged before the next one.
        rollouts ([`Rollouts`], *optional*): how the run samples.
    """
    series = _series(history)
    rouge_l = {key: each for key, each in series.items() if key.endswith(_ROUGE_L)}
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
        concerned, holds = {key}, False
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
    """Variance of the first value in terms of the others'. It comes from one update or rollout, if it was logged at
    the first step, the others from all since the log before."""
    if len(steps) < 3 or steps[0] > 1:
        return 1.0
    updates = median(after - before for before, after in pairwise(steps[1:]))
    of_completions = rule.metric.startswith(("completions/", "rollout/"))
    return max(1.0, updates / (rollouts.updates if of_completions else rollouts.passes))


def _is_metric(key: str, metric: str) -> bool:
    """In training, or in evaluation, where the name of the dataset may stand before it."""
    return re.fullmatch(rf"(eval_([^/]*_)?)?{metric}", key) is not None


def _series(history: Sequence[Mapping[str, Any]]) -> dict[str, tuple[list[int], list[float]]]:
    """Steps and finite values of each metric that matters."""
    metrics = {rule.metric for rule in RULES}
    wanted = {key for entry in history for key in entry if any(key.endswith(metric) for metric in metrics)}
    series = {}
    for key in sorted(wanted):
        pairs = [(entry["step"], entry[key]) for entry in history if entry.get(key) is not None]
        if "length" in key:  # 0 stands for the mean length of no completions
            pairs = [(step, value) for step, value in pairs if value > 0]
        if pairs := [(step, value) for step, value in pairs if math.isfinite(value)]:
            series[key] = tuple(map(list, zip(*pairs, strict=True)))
    return series


def _holds(rouge_l: Iterable[tuple[list[int], list[float]]], since: int) -> bool | None:
    """Whether each Rouge-L is still about the best that it was; None if none was measured after the step `since`."""
    if any(steps[-1] <= since for steps, _ in rouge_l):
        return None
    return all(values[-1] >= _AS_GOOD * max(values) for _, values in rouge_l)
