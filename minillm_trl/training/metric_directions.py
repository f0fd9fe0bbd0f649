"""Directions of metrics for `metric_for_best_model`: whether larger or smaller values are better.

By default, transformers assumes that larger values are better unless the name ends in "loss". It would keep the
checkpoint with the highest reverse KL.
"""

import re

from ..errors import UserError

_LARGER = (
    *("rouge_l", "rouge_l/[^/]+", "mean_token_accuracy", "objective/advantage", "rollout/eos_rate"),
    *("importance_weight/effective_sample_size", "reward", "rewards/[^/]*/mean"),
    *("samples_per_second", "steps_per_second"),
)
_SMALLER = (
    *("loss", "objective/reverse_kl", "objective/reverse_kl_per_token", "objective/single_step"),
    *("objective/reverse_kl_median", "objective/reverse_kl_max"),
    "objective/(reverse_kl|reverse_kl_per_token|single_step)/[^/]+",
    *("kd/cross_entropy", "kd/forward_kl", "kl", "rollout/repeated_4grams", "completions/clipped_ratio"),
    *("aux_loss", "runtime"),
)
_NEITHER = (
    *(
        "objective/baseline_explained_variance",
        "objective/(long_term|single_step)_(signal|variance)",
        "entropy",
        "objective/long_term",
        "importance_weight/mean",
        "importance_weight/max",
        "num_tokens",
    ),
    *("completions/(mean|min|max)_(terminated_)?length", "reward_std", "rewards/[^/]*/std", "frac_reward_zero_std"),
    *("clip_ratio/mixing", "clip_ratio/drift", "tools/.*", "sampling/.*"),
)
_DIRECTIONS = {
    **dict.fromkeys(_LARGER, True),
    **dict.fromkeys(_SMALLER, False),
    **dict.fromkeys(_NEITHER, None),
}


def greater_is_better(metric: str | None, given: bool | None) -> bool | None:
    """Return the direction of an evaluation metric.

    Args:
        metric (`str`, *optional*): `metric_for_best_model`, with or without the prefix `eval_` and a dataset's name.
        given (`bool`, *optional*): `greater_is_better` of the configuration.

    Returns:
        `bool` or `None`: `given` for metrics of other packages; transformers replaces None by its default.

    Raises:
        ValueError: if `given` contradicts the metric's direction, or is missing for a metric without a direction.
    """
    if metric is None or (known := _known(metric)) is None:
        return given
    direction = _DIRECTIONS[known]
    if direction is None and given is None:
        raise UserError(
            f"metric_for_best_model={metric!r}: neither larger nor smaller values are always better. Set "
            "greater_is_better, or choose a metric such as eval_rouge_l or eval_loss."
        )
    if None not in (direction, given) and direction != given:
        better = "larger" if direction else "smaller"
        raise UserError(
            f"greater_is_better={given} contradicts metric_for_best_model={metric!r}: {better} values are better, so "
            "the worst checkpoint would be kept. Drop greater_is_better."
        )
    return given if direction is None else direction


def _known(metric: str) -> str | None:
    """Return the pattern that describes a metric of this package, after a dataset's name or not, or None."""
    name = metric.removeprefix("eval_")
    return next((pattern for pattern in _DIRECTIONS if re.fullmatch(rf"([^/]*_)?{pattern}", name)), None)
