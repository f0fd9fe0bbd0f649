"""Rules that tell from logged metrics when a student's text degenerates. `docs/degeneration.md` gives the reasons."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, NamedTuple

_ROUGE_L = "rouge_l"
_AS_GOOD = 0.9  # of the best Rouge-L so far; from one evaluation on 50 prompts to the next it may fall by 0.08
_NOISE = 3.0  # standard errors


@dataclass(frozen=True)
class Rule:
    """A metric is beyond its limit, `scale * baseline + offset`: below it if it `falls`, above it otherwise.

    Attributes:
        kind (`str`): of degeneration.
        metric (`str`): as logged in training; in evaluation `eval_` stands before it.
        falls (`bool`): whether low values are the bad ones.
        scale, offset (`float`): of the limit.
        spared_by_rouge_l (`bool`): whether it counts only where Rouge-L, if it is evaluated, falls too.
    """

    kind: str
    metric: str
    falls: bool
    scale: float
    offset: float = 0.0
    spared_by_rouge_l: bool = False

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
    Rule("length_inflation", "rollout/eos_rate", True, 1.0, -0.2),
    Rule("repetition", "rollout/repeated_4grams", False, 1.5, 0.05),
    Rule("entropy_collapse", "entropy", True, 0.5),
    Rule("exploding_weights", "importance_weight/effective_sample_size", True, 0.0, 0.3),
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


TRAINING = Window(baseline=3, recent=5, in_a_row=2)
# all prompts with the same random numbers each time: hardly any noise, and few values
EVALUATION = Window(baseline=1, recent=1, in_a_row=2)


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


def judge(values: Sequence[float], rule: Rule, window: Window = TRAINING) -> Verdict:
    """Judge a series by a rule.

    It is beyond the limit if the medians of the last `window.recent` values are, `window.in_a_row` times in a row, and
    the last one differs from the baseline by more than the noise (see [`noise`]) where the limit depends on that.

    Args:
        values (`Sequence[float]`): of the metric, in order; at least one, and all finite.
        rule ([`Rule`]): with the limit.
        window ([`Window`], *optional*): how many values are taken together.
    """
    baseline = median(values[: window.baseline])
    limit = rule.limit(baseline)
    medians = [median(values[max(0, end - window.recent) : end]) for end in range(1, len(values) + 1)]
    beyond = [rule.is_beyond(each, limit) for each in medians]
    half_way = (baseline + limit) / 2
    well = [not rule.is_beyond(each, half_way) and not far for each, far in zip(medians, beyond, strict=True)]
    last_well = max((index for index, each in enumerate(well) if each), default=-1)
    is_beyond = (
        len(values) >= window.recent + window.in_a_row - 1
        and all(beyond[-window.in_a_row :])
        and (rule.scale == 0 or abs(medians[-1] - baseline) > noise(values, window))
    )
    return Verdict(
        is_beyond,
        medians[-1],
        baseline,
        limit,
        well[-1],
        max(-1, last_well - window.recent // 2),
    )


def noise(values: Sequence[float], window: Window) -> float:
    """Three standard errors of the difference between baseline and median; 0 for single values.

    The standard deviation is that of the median difference between neighbours, which neither a drift nor a few
    outliers change much.
    """
    if window.recent == 1:
        return 0.0
    differences = [abs(after - before) for before, after in pairwise(values)]
    deviation = 1.4826 * median(differences) / math.sqrt(2)
    # the variance of a median of n values is about pi / 2 times that of their mean
    return _NOISE * deviation * math.sqrt(math.pi / 2 * (1 / window.baseline + 1 / window.recent))


def diagnose(history: Sequence[Mapping[str, Any]], is_evaluated: bool = True) -> Diagnosis:
    """Apply all rules to what a run has logged.

    Args:
        history (`Sequence[Mapping]`): `log_history` of the trainer's state. Only what its last entry bears on can be
            found to have degenerated.
        is_evaluated (`bool`, *optional*): whether evaluations are still to come. Where they have Rouge-L, lengths are
            not judged before the next one.
    """
    series = _series(history)
    rouge_l = {key: each for key, each in series.items() if key.endswith(_ROUGE_L)}
    found, suspicious, known = [], [], []
    for rule, key in ((rule, key) for rule in RULES for key in series if _is_metric(key, rule.metric)):
        steps, values = series[key]
        in_training = key == rule.metric
        verdict = judge(values, rule, TRAINING if in_training else EVALUATION)
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
