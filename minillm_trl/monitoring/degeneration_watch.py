"""The callback that warns of degeneration, or stops for it, and keeps the last healthy checkpoint."""

import json
import logging
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..training.checkpoints import STATE, find_damage
from .degeneration import UNKNOWN, Degeneration, Diagnosis, Rollouts, diagnose

logger = logging.getLogger(__name__)

_EOS_RATE, _UNENDING = "rollout/eos_rate", 0.1
_ENTROPY, _KL = "entropy", "objective/reverse_kl_per_token"
_UNSURE = 0.4  # of ln(vocabulary): language models that know a task are below 0.3
_UNLIKE = 0.25  # of the entropy: a student that is as unsure as its teacher is closer to it
HEALTHY = "healthy"  # folder in output_dir, out of reach of `save_total_limit`, which looks at `checkpoint-*` there

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
        "add L_PT (lm_dataset) and beta, lower learning_rate, look at what reward_funcs pay for; where "
        "completions are cut before they can end, raise max_completion_length",
        ("learning_rate", "beta", "max_completion_length"),
    ),
    "repetition": (
        "add L_PT (lm_dataset), lower learning_rate, look at what reward_funcs pay for",
        ("learning_rate", "num_iterations", "beta"),
    ),
    "entropy_collapse": (
        "lower learning_rate, fewer num_iterations, add L_PT (lm_dataset) or beta",
        ("learning_rate", "num_iterations", "beta", "kd_temperature"),
    ),
    "exploding_weights": (
        "lower teacher_mixed_alpha, set importance_weight_cap or importance_weighting='token', fewer num_iterations, "
        "lower learning_rate",
        ("importance_weighting", "importance_weight_cap", "teacher_mixed_alpha", "num_iterations", "learning_rate"),
    ),
    "rising_kl": (
        "lower learning_rate, more completions an update (per_device_train_batch_size, gradient_accumulation_steps), "
        "fewer num_iterations, look at what reward_funcs pay for",
        ("learning_rate", "per_device_train_batch_size", "gradient_accumulation_steps", "num_iterations"),
    ),
    "falling_quality": (
        "lower learning_rate, add L_PT (lm_dataset) or beta, look at what reward_funcs pay for; a teacher that "
        "writes otherwise than the references needs another measure",
        ("learning_rate", "num_iterations", "beta", "kd_temperature"),
    ),
}


class DegenerationWatch(TrainerCallback):
    r"""Warns when a student's text degenerates while the loss may still fall, names the remedy, and can stop the run.

    At each log the rules of [`degeneration.diagnose`] are applied to all that was logged so far, so a resumed run
    warns of the same at the same steps. What is found is logged too, as `degeneration/KIND` = 1. Each kind is warned
    of once. All processes see the same logs and so decide alike. The first step is logged, whatever `logging_steps`:
    later logs are compared with it, as it has the first rollout, before any update. There it warns, too, where hardly
    any completion ends by itself, or the student is far less sure than the teacher: MiniLLM starts from a student that
    knows the task.

    Where `save_total_limit` deletes checkpoints, the last one from before any metric was half way to its limit is kept
    in `output_dir/healthy`: files are linked, not copied, where the file system can. It takes the disk space of
    a checkpoint more than the limit says.

    Args:
        stop (`bool`, *optional*, defaults to `False`):
            Whether to stop the training at the first degeneration instead of warning alone.

    Attributes:
        stopped_for (`list[Degeneration]`): why it has stopped the training; empty if it has not.
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
        found = [each for end in last_logs for each in _diagnose(args, history[:end]).found]
        # a run that was stopped is not mended by going on from where it was
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
            keep_healthy(Path(args.output_dir), state.log_history, self._diagnosis)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict[str, float], **kwargs
    ) -> None:
        *before, last = state.log_history
        if state.is_world_process_zero and not any(_EOS_RATE in entry for entry in before):
            _warn_of_unending_text(args, last)
            _warn_of_random_text(last, kwargs.get("model"))
        self._diagnosis = _diagnose(args, state.log_history)
        found = self._diagnosis.found
        known = {key for entry in before for key in entry}
        new = [each for each in found if f"degeneration/{each.kind}" not in known]
        for entry in (last, logs):
            entry |= {f"degeneration/{each.kind}": 1.0 for each in found}
        if self._stop_for(found, control):
            new = found
        if new and state.is_world_process_zero:
            logger.warning(self._message(args, state, new))

    def _stop_for(self, found: list[Degeneration], control: TrainerControl) -> bool:
        """Stop for what was found, if so asked and not stopping already."""
        if not (self.stop and found) or self.stopped_for:
            return False
        self.stopped_for = found
        control.should_training_stop = True
        return True

    def _message(self, args: TrainingArguments, state: TrainerState, found: list[Degeneration]) -> str:
        lines = [f"step {state.global_step}: {_describe(each, args)}" for each in found]
        folder, history = Path(args.output_dir), state.log_history
        checkpoint = healthy_checkpoint(folder, history, self._diagnosis.well_until)
        if checkpoint is None:
            lines.append("There is no checkpoint from before this began: start again with such a change.")
        else:
            lines.append(f"Go on from before this began, with such a change: --resume_from_checkpoint {checkpoint}")
        if self.stopped_for:
            lines.append("The training stops here.")
        return "\n".join(lines)


def _warn_of_unending_text(args: TrainingArguments, first: Mapping[str, Any]) -> None:
    """Later logs are compared with the first: a student that never knew the task degenerates no further."""
    if first.get(_EOS_RATE, 1.0) < _UNENDING:
        logger.warning(
            f"Only {first[_EOS_RATE]:.0%} of the first completions end by themselves. Unless max_completion_length="
            f"{args.max_completion_length} is too short for the task, the student does not know it yet: fine-tune it "
            "first (minillm-trl sft), and the teacher too if it writes so. If both are fine-tuned, see which tokens "
            "end a completion (minillm-trl doctor --config FILE) and set eos_tokens."
        )


def _warn_of_random_text(first: Mapping[str, Any], model: PreTrainedModel | None) -> None:
    """A student that was cut out of a larger model, say, and hardly trained since, writes next to noise."""
    if model is None or _ENTROPY not in first:
        return
    entropy, kl = first[_ENTROPY], first.get(_KL, math.inf)
    vocabulary = model.config.get_text_config().vocab_size
    if entropy > _UNSURE * math.log(vocabulary) and kl > _UNLIKE * entropy:
        logger.warning(
            f"The student's first completions are close to noise: entropy is {entropy:.2f} nats a token, "
            f"{entropy / math.log(vocabulary):.0%} of that of uniform noise over its {vocabulary} tokens, and the "
            f"reverse KL to the teacher {kl:.2f} nats a token. It does not know the task yet, and learns little from "
            "its own samples: fine-tune it first (minillm-trl sft, or seqkd on the teacher's completions)."
        )


def _rollouts(args: TrainingArguments) -> Rollouts:
    """How a run with these arguments samples; the default for those that are no MiniLLM's."""
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
    """The newest whole checkpoint of a run up to a step, if there is one; the one that is kept comes first.

    Args:
        output_dir (`Path`): of the run.
        history (`Sequence[Mapping]`): `log_history` of the trainer's state; tells the run's checkpoints from others'.
        well_until (`int`): the step.
    """
    found = _checkpoints(output_dir, history) | _checkpoints(output_dir / HEALTHY, history)
    return found[max(steps)] if (steps := [step for step in found if step <= well_until]) else None


def keep_healthy(output_dir: Path, history: Sequence[Mapping[str, Any]], diagnosis: Diagnosis) -> None:
    """Keep the newest checkpoint in `output_dir/healthy` too, if nothing speaks against it, until a newer one is known
    to be healthy."""
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
    """Whole checkpoints by step, of those that the run with this history has saved: another may have left some."""
    found = {}
    for path in folder.glob("checkpoint-*"):
        number = path.name.removeprefix("checkpoint-")
        if not number.isdigit() or find_damage(path, checksums=False) is not None:
            continue
        theirs = json.loads((path / STATE).read_text(encoding="utf-8"))["log_history"]
        last, ours = (json.dumps(each[-1:], sort_keys=True) for each in (theirs, history[: len(theirs)]))
        if last == ours:
            found[int(number)] = path
    return found
