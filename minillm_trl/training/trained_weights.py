"""Checks of the trained weights: that there are any, and that their precision can hold the updates."""

import logging
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from ..errors import UserError

if TYPE_CHECKING:
    from trl import GRPOTrainer, SFTTrainer

logger = logging.getLogger(__name__)

_SAMPLED = 1 << 20  # weights in the sample
# Names of optimizers whose update of a weight is about the learning rate. Excluded are optimizers that accumulate the
# rounding error, or update a low-rank part.
_UNIT_STEPS = ("adam", "lion", "ademamix")
_OTHER_STEPS = ("anyprecision", "galore", "apollo", "schedule_free")


def stuck_share(weights: Iterable[torch.Tensor], step: float) -> float:
    r"""Return the share of weights that an update of a given size leaves bit for bit as they are.

    A weight $w$ in half precision is stuck if both $w + s$ and $w - s$ round to $w$: in bfloat16 where
    $|w| > 2^8 s$ to $2^9 s$. Weights in higher precision are never stuck. From large models, every n-th weight is
    sampled.

    Args:
        weights (`Iterable[torch.Tensor]`): the tensors that are trained.
        step (`float`): size $s$ of an update; with Adam about the learning rate.

    Returns:
        `float` in [0, 1]; 0 without weights.
    """
    weights = list(weights)
    total = sum(weight.numel() for weight in weights)
    stride = max(1, total // _SAMPLED)
    stuck = 0.0
    for tensor in (weight for weight in weights if weight.dtype.itemsize == 2):
        sample = tensor.detach().flatten()[::stride]
        wide = sample.float()
        same = ((wide + step).to(sample.dtype) == sample) & ((wide - step).to(sample.dtype) == sample)
        stuck += tensor.numel() * same.double().mean().item() if sample.numel() else 0.0
    return stuck / total if total else 0.0


def unit_step(trainer: "GRPOTrainer | SFTTrainer") -> float | None:
    """Return the size of an update at the learning rate; None for optimizers for which it is unknown."""
    if trainer.optimizer is not None:  # the user's own
        name, rates = type(trainer.optimizer).__name__, [group["lr"] for group in trainer.optimizer.param_groups]
    else:
        name, rates = str(getattr(trainer.args.optim, "value", trainer.args.optim)), [trainer.args.learning_rate]
    name = name.lower()
    known = any(step in name for step in _UNIT_STEPS) and not any(step in name for step in _OTHER_STEPS)
    return max(rates) if known else None


def check_trained_weights(trainer: "GRPOTrainer | SFTTrainer") -> None:
    """Check the weights that a trainer will train, after TRL has loaded the student and added its adapter.

    Warn if most of them are in half precision and too large to move at the learning rate, because rounding cancels the
    update. DeepSpeed, and FSDP with mixed precision, keep float32 copies of the weights.

    Raises:
        ValueError: if no weight is trained, or trained weights are in half precision under the gradient scaler of
            fp16.
    """
    student = trainer.model  # not wrapped yet
    assert student is not None  # set by TRL
    trained = {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}
    if not trained:
        adapter = hasattr(student, "peft_config")
        raise UserError(
            f"model: no weight of this {type(student).__name__} is trained (requires_grad is False everywhere). "
            + (
                "Load its adapter with PeftModel.from_pretrained(base, adapter, is_trainable=True)."
                if adapter
                else "Enable training with model.requires_grad_(True), or pass peft_config."
            )
        )
    precision = trainer.accelerator.mixed_precision
    half = [name for name, parameter in trained.items() if parameter.dtype.itemsize == 2]
    if not half or trainer.is_deepspeed_enabled or (trainer.is_fsdp_enabled and precision != "no"):
        return
    if precision == "fp16":
        raise UserError(
            f"fp16=True with trained weights in half precision ({half[0]}): rounding would cancel their updates, and "
            "the gradient scaler rejects them. Load the student in float32 (dtype='float32'), or train an adapter."
        )
    step = unit_step(trainer)
    if step is None or not trainer.accelerator.is_main_process:
        return
    share = stuck_share(trained.values(), step)
    if share > 0.5:
        dtype = str(trained[half[0]].dtype).removeprefix("torch.")
        logger.warning(
            f"{100 * share:.0f} % of the trained weights cannot move: they are in {dtype}, where an update of about "
            f"learning_rate={step:g} is lost in rounding (for example in {half[0]}). Load the student in "
            "float32 (dtype='float32') and set bf16=True, which computes in bfloat16; or train an adapter "
            "(peft_config, --use_peft); or raise the learning rate."
        )
