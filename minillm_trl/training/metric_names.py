"""Metrics of an evaluation during training, to reject a misspelt `metric_for_best_model` before training starts."""

from collections.abc import Collection

from ..errors import UserError
from ..files.messages import nearest

_ALWAYS = ("loss", "runtime", "samples_per_second", "steps_per_second", "num_tokens", "entropy")
_LENGTHS = ("mean_length", "min_length", "max_length")
_TERMINATED = ("mean_terminated_length", "min_terminated_length", "max_terminated_length")
_SAMPLES = ("rouge_l", "rollout/eos_rate", "rollout/repeated_4grams")

FINE_TUNING = frozenset((*_ALWAYS, *_SAMPLES, "completions/mean_length", "mean_token_accuracy", "aux_loss"))
_FROM_LOGITS = {"mean_token_accuracy", "num_tokens", "aux_loss"}  # KD does not compute them
KD = FINE_TUNING - _FROM_LOGITS | {"kd/cross_entropy", "kd/forward_kl"}
MINILLM = frozenset(
    (
        *(*_ALWAYS, *_SAMPLES, "kl"),
        *(f"completions/{name}" for name in (*_LENGTHS, *_TERMINATED, "clipped_ratio")),
        *(f"objective/{name}" for name in ("reverse_kl", "reverse_kl_per_token", "single_step", "long_term")),
        *("objective/advantage", "objective/reverse_kl_median", "objective/reverse_kl_max"),
        *(f"importance_weight/{name}" for name in ("mean", "max", "effective_sample_size")),
        *(f"clip_ratio/{name}" for name in ("mixing", "drift")),
    )
)

# The metrics that exist for each of several teachers too, with a slash and its name
BY_TEACHER = ("rouge_l", *(f"objective/{name}" for name in ("reverse_kl", "reverse_kl_per_token", "single_step")))


def check_metric_name(metric: str | None, known: Collection[str]) -> None:
    """Check that evaluations log the metric that chooses the checkpoint. Otherwise, the first of them would fail.

    Args:
        metric (`str`, *optional*): `metric_for_best_model`, with or without `eval_`.
        known (`Collection[str]`): the metrics of the subcommand, without `eval_`.

    Raises:
        ValueError: with the most similar name.
    """
    if metric is None or (name := metric.removeprefix("eval_")) in known:
        return
    names = [f"eval_{name}" for name in sorted(known)]
    raise UserError(
        f"metric_for_best_model={metric!r} is no metric of an evaluation here.{nearest(f'eval_{name}', names)} The "
        f"metrics are {', '.join(names)}."
    )
