"""Whether larger or smaller values of a metric are better, for `metric_for_best_model`.

transformers takes larger values for better unless the name ends in "loss", so it would keep the checkpoint with the
highest reverse KL.
"""

import re

from ..errors import UserError

_LARGER = (
    *("rouge_l", "mean_token_accuracy", "objective/advantage", "rollout/eos_rate"),
    *("importance_weight/effective_sample_size", "reward", "rewards/[^/]*/mean"),
    *("samples_per_second", "steps_per_second"),
)
_SMALLER = (
    *("loss", "objective/reverse_kl", "objective/reverse_kl_per_token", "objective/single_step"),
    *("objective/reverse_kl_median", "objective/reverse_kl_max"),
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
    """The direction of a metric of an evaluation.

    Args:
        metric (`str`, *optional*): `metric_for_best_model`; `eval_` and the name of a dataset may stand before it.
        given (`bool`, *optional*): `greater_is_better` of the configuration.

    Returns:
        `bool` or `None`: `given` for metrics that are not of this package, which transformers completes.

    Raises:
        ValueError: if `given` contradicts the metric, or is missing for one that has no direction of its own.
    """
    if metric is None or (known := _known(metric)) is None:
        return given
    direction = _DIRECTIONS[known]
    if direction is None and given is None:
        raise UserError(
            f"metric_for_best_model={metric!r}: neither larger nor smaller values are better in themselves. Set "
            "greater_is_better, or take a metric such as eval_rouge_l or eval_loss."
        )
    if None not in (direction, given) and direction != given:
        better = "larger" if direction else "smaller"
        raise UserError(
            f"greater_is_better={given} contradicts metric_for_best_model={metric!r}, of which {better} values are "
            "better: the worst checkpoint would be kept. Leave greater_is_better out."
        )
    return given if direction is None else direction


def _known(metric: str) -> str | None:
    """The entry that describes a metric, if it is one of this package: the longest, as names may end in others."""
    name = metric.removeprefix("eval_")
    found = [pattern for pattern in _DIRECTIONS if re.fullmatch(rf"([^/]*_)?{pattern}", name)]
    exact = [pattern for pattern in found if re.fullmatch(pattern, name)]
    return max(exact or found, key=len, default=None)
