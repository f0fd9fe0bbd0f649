"""The callback that warns of degeneration, or stops the run, and keeps the last healthy checkpoint."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.checkpoints import STATE, find_damage
from .degeneration import UNKNOWN, Degeneration, Diagnosis, Rollouts, diagnose

logger = logging.getLogger(__name__)

_EOS_RATE, _MIN_EOS_RATE = "rollout/eos_rate", 0.1
_ENTROPY, _KL = "entropy", "objective/reverse_kl_per_token"
_MAX_NOISE = 0.4  # share of ln(vocabulary); entropies of language models that know a task are below 0.3
_MAX_KL = 0.25  # share of the entropy; the KL is smaller if the teacher is as unsure as the student
HEALTHY = "healthy"  # folder in output_dir; `save_total_limit` deletes only `checkpoint-*` directly in output_dir

_WORDS = {
    "length_collapse": "completions become too short",
    "length_inflation": "completions become too long",
    "repetition": "completions repeat themselves",
    "entropy_collapse": "the student's distribution collapses",
    "exploding_weights": "importance weights explode",
    "rising_kl": "the student moves away from the teacher",
    "falling_quality": "the student's samples get worse",
}
# What to change, and the fields whose values the message names
_REMEDIES: dict[str, tuple[str, tuple[str, ...]]] = {
    "length_collapse": (
        "set length_normalization=True, lower learning_rate, add L_PT (lm_dataset) or beta",
        ("length_normalization", "learning_rate", "beta"),
    ),
    "length_inflation": (
        "add L_PT (lm_dataset) and beta, lower learning_rate, check what reward_funcs reward; if completions are "
        "truncated, raise max_completion_length",
        ("learning_rate", "beta", "max_completion_length"),
    ),
    "repetition": (
        "add L_PT (lm_dataset), lower learning_rate, check what reward_funcs reward",
        ("learning_rate", "num_iterations", "beta"),
    ),
    "entropy_collapse": (
        "lower learning_rate, reduce num_iterations, add L_PT (lm_dataset) or beta",
        ("learning_rate", "num_iterations", "beta", "kd_temperature"),
    ),
    "exploding_weights": (
        "lower teacher_mixed_alpha, set importance_weight_cap or importance_weighting='token', reduce num_iterations, "
        "lower learning_rate",
        ("importance_weighting", "importance_weight_cap", "teacher_mixed_alpha", "num_iterations", "learning_rate"),
    ),
    "rising_kl": (
        "lower learning_rate, use more completions per update (per_device_train_batch_size, "
        "gradient_accumulation_steps), reduce num_iterations, check what reward_funcs reward",
        ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"),
    ),
    "falling_quality": (
        "lower learning_rate, add L_PT (lm_dataset) or beta, check what reward_funcs reward; if the teacher's style "
        "differs from the references', choose another metric",
        ("learning_rate", "num_iterations", "beta", "kd_temperature"),
    ),
}


class DegenerationWatch(TrainerCallback):
    r"""Warn when a student's text degenerates although the loss may still fall, name a remedy, and optionally stop.

    At each log the callback applies the rules of [`degeneration.diagnose`] to the whole history, so a resumed run
    repeats the same warnings at the same steps. It logs each kind found as `degeneration/KIND` = 1 and warns of it
    once. All processes see the same logs and reach the same decision.

    The first step is always logged, whatever `logging_steps`: its rollout, sampled before any update, is the baseline.
    The callback also warns there if hardly any completion ends with EOS, or if the student is close to noise, since
    MiniLLM starts from a student that knows the task.

    With `save_total_limit`, the last checkpoint from before any metric was half way to its limit is kept in
    `output_dir/healthy`, as hard links if the file system supports them. It takes the disk space of one checkpoint on
    top of the limit.

    Args:
        stop (`bool`, *optional*, defaults to `False`):
            Whether to stop training at the first degeneration instead of only warning.

    Attributes:
        stopped_for (`list[Degeneration]`): what training was stopped for; empty if it was not stopped.
    """

    def __init__(self, stop: bool = False):
        self.stop = stop
        self.stopped_for: list[Degeneration] = []
        self._diagnosis = Diagnosis([], True, 0)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self.stopped_for = []
        history = state.log_history
        self._diagnosis = _diagnose(args, history)
        last_logs = [end for end, entry in enumerate(history, start=1) if entry["step"] == state.global_step]
        found = [item for end in last_logs for item in _diagnose(args, history[:end]).found]
        # Resuming from the degenerate checkpoint does not fix a run that was stopped
        if self._stop_for(found, control) and state.is_world_process_zero:
            logger.warning(self._message(args, state, found))
        self._keep_healthy(args, state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        if state.global_step == 1 and args.logging_strategy != "no":
            control.should_log = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        self._keep_healthy(args, state)

    def _keep_healthy(self, args: TrainingArguments, state: TrainerState) -> None:
        if args.save_total_limit and state.is_world_process_zero:
            keep_healthy(_output_dir(args), state.log_history, self._diagnosis)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs) -> None:
        *before, last = state.log_history
        if state.is_world_process_zero and not any(_EOS_RATE in entry for entry in before):
            _warn_of_unending_text(args, last)
            _warn_of_random_text(last, kwargs.get("model"))
        self._diagnosis = _diagnose(args, state.log_history)
        found = self._diagnosis.found
        known = {key for entry in before for key in entry}
        new = [item for item in found if f"degeneration/{item.kind}" not in known]
        for entry in (last, kwargs["logs"]):  # the history, and the dictionary that later callbacks report
            entry |= {f"degeneration/{item.kind}": 1.0 for item in found}
        if self._stop_for(found, control):
            new = found
        if new and state.is_world_process_zero:
            logger.warning(self._message(args, state, new))

    def _stop_for(self, found: list[Degeneration], control: TrainerControl) -> bool:
        """Stop training if `stop` is set and anything was found, once."""
        if not (self.stop and found) or self.stopped_for:
            return False
        self.stopped_for = found
        control.should_training_stop = True
        return True

    def _message(self, args: TrainingArguments, state: TrainerState, found: list[Degeneration]) -> str:
        lines = [f"step {state.global_step}: {_describe(item, args)}" for item in found]
        checkpoint = healthy_checkpoint(_output_dir(args), state.log_history, self._diagnosis.well_until)
        if checkpoint is None:
            lines.append("There is no checkpoint from before this began: apply the remedy and start again.")
        else:
            lines.append(
                f"Apply the remedy and resume from the last healthy checkpoint: --resume_from_checkpoint {checkpoint}"
            )
        if self.stopped_for:
            lines.append("Training stops here.")
        return "\n".join(lines)


def _output_dir(args: TrainingArguments) -> Path:
    return Path(cast(str, args.output_dir))  # `__post_init__` replaces None, which the annotation still allows


def _warn_of_unending_text(args: TrainingArguments, first: Mapping[str, Any]) -> None:
    """Warn if hardly any of the first completions has EOS.

    The rules cannot find this: they compare later logs with the first.
    """
    if first.get(_EOS_RATE, 1.0) < _MIN_EOS_RATE:
        limit = getattr(args, "max_completion_length", None)
        logger.warning(
            f"Only {first[_EOS_RATE]:.0%} of the first completions end with EOS. Unless max_completion_length={limit} "
            "is too short for the task, the student does not know the task yet: fine-tune it first (minillm-trl sft), "
            "and the teacher too if its completions do not end either. If both are fine-tuned, check which tokens end "
            "a completion (minillm-trl doctor --config FILE) and set eos_tokens."
        )


def _warn_of_random_text(first: Mapping[str, Any], model: PreTrainedModel | None) -> None:
    """Warn if the student's first completions are close to noise, by themselves or to the teacher.

    A student that was cut out of a larger model and hardly trained since is an example. Without any training it may
    be surer of its nonsense than noise is, but then the teacher is all the more surprised.
    """
    if model is None or _ENTROPY not in first:
        return
    entropy, kl = first[_ENTROPY], first.get(_KL, math.inf)
    vocabulary = model.config.get_text_config().vocab_size
    if max(entropy, kl) > _MAX_NOISE * math.log(vocabulary) and kl > _MAX_KL * entropy:
        logger.warning(
            f"The student's first completions are close to noise: the entropy is {entropy:.2f} nats per token, "
            f"{entropy / math.log(vocabulary):.0%} of the entropy of uniform noise over its {vocabulary} tokens, and "
            f"the reverse KL to the teacher is {kl:.2f} nats per token. The student does not know the task yet and "
            "learns little from its own samples: fine-tune it first (minillm-trl sft, or seqkd on the teacher's "
            "completions)."
        )


def _rollouts(args: Any) -> Rollouts:
    """Return the size and use of a MiniLLM run's rollouts, from its `MiniLLMConfig`; [`UNKNOWN`] for other runs."""
    if not hasattr(args, "steps_per_generation"):
        return UNKNOWN
    updates = args.steps_per_generation * args.num_iterations // args.gradient_accumulation_steps
    return Rollouts(args.generation_batch_size, max(1, updates), args.num_iterations)


def _diagnose(args: TrainingArguments, history: Sequence[Mapping[str, Any]]) -> Diagnosis:
    return diagnose(history, args.eval_strategy != "no", _rollouts(args))


def _describe(found: Degeneration, args: TrainingArguments) -> str:
    remedy, fields = _REMEDIES[found.kind]
    values = ", ".join(f"{name}={getattr(args, name)!r}" for name in fields if hasattr(args, name))
    side = "below" if found.value < found.limit else "above"
    return (
        f"{_WORDS[found.kind]} ({found.kind}): {found.metric} is {found.value:.3g}, {side} its limit of "
        f"{found.limit:.3g}; at the start it was {found.baseline:.3g}. Remedy: {remedy} (now {values})."
    )


def healthy_checkpoint(output_dir: Path, history: Sequence[Mapping[str, Any]], well_until: int) -> Path | None:
    """Return the newest complete checkpoint of a run up to a step; None without one.

    If the same checkpoint is also in `output_dir/healthy`, that copy is returned.

    Args:
        output_dir (`Path`): output folder of the run.
        history (`Sequence[Mapping]`): `log_history` of the trainer's state, which identifies the run's checkpoints.
        well_until (`int`): last step to consider.
    """
    found = _checkpoints(output_dir, history) | _checkpoints(output_dir / HEALTHY, history)
    return found[max(steps)] if (steps := [step for step in found if step <= well_until]) else None


def keep_healthy(output_dir: Path, history: Sequence[Mapping[str, Any]], diagnosis: Diagnosis) -> None:
    """Copy the newest checkpoint into `output_dir/healthy` if every metric is well, and drop outdated copies.

    Whether a checkpoint is healthy shows only later, as metrics are judged by medians. So older copies are kept until
    a newer copy is known to be healthy, and newer copies are dropped once degeneration is found.
    """
    folder, present = output_dir / HEALTHY, _checkpoints(output_dir, history)
    if present and diagnosis.is_well:
        newest = present[max(present)]
        temporary = folder / f".{newest.name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(newest, temporary, copy_function=_link)
        shutil.rmtree(folder / newest.name, ignore_errors=True)
        os.replace(temporary, folder / newest.name)
    kept = _checkpoints(folder, history)
    healthy = max((step for step in kept if step <= diagnosis.well_until), default=None)
    for step, path in kept.items():
        if healthy is not None and (step < healthy or (diagnosis.found and step > healthy)):
            shutil.rmtree(path)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def _checkpoints(folder: Path, history: Sequence[Mapping[str, Any]]) -> dict[int, Path]:
    """Return the complete checkpoints in a folder by step, without checkpoints of runs with another history."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit() or find_damage(path, checksums=False) is not None:
            continue
        theirs = json.loads((path / STATE).read_text(encoding="utf-8"))["log_history"]
        last, ours = (json.dumps(logs[-1:], sort_keys=True) for logs in (theirs, history[: len(theirs)]))
        if last == ours:
            found[int(number)] = path
    return found
