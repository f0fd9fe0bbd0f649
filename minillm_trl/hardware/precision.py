"""Mixed precision: choosing it, keeping some values in float32, and counting steps that overflow in float16."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import is_torch_bf16_gpu_available

from ..errors import UserError


def choose_precision(args: TrainingArguments) -> None:
    """Set `fp16` and `bf16` if neither is true.

    A precision given to `accelerate launch` wins, since accelerate applies it anyway. Otherwise bfloat16 is chosen on
    CUDA devices that support it (compute capability 8.0), unless `bf16` is False.

    Raises:
        UserError: for `bf16` without a device that supports it, unless `use_cpu` selects the CPU.
    """
    if args.fp16 or args.bf16:
        _check_bf16(args)
        return
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launched in ("fp16", "bf16"):
        args.fp16, args.bf16 = launched == "fp16", launched == "bf16"
    elif args.bf16 is None:
        args.bf16 = not args.use_cpu and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def _check_bf16(args: TrainingArguments) -> None:
    if args.bf16 and not args.use_cpu and not torch.cuda.is_available() and not is_torch_bf16_gpu_available():
        raise UserError(
            "bf16=True: torch finds no GPU. Set use_cpu=True to train in bfloat16 on the CPU, or bf16=False."
        )


def half_precision(accelerator: Accelerator) -> torch.dtype | None:
    """Return the dtype of matrix products under mixed precision; None in float32."""
    return {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision)


def autocast_on(device: torch.device, accelerator: Accelerator) -> AbstractContextManager:
    """Return the autocast of the run for work on `device`, which may be of another type than the one that trains."""
    if device.type == accelerator.device.type:
        return accelerator.autocast()
    dtype = half_precision(accelerator)
    return nullcontext() if dtype is None else torch.autocast(device.type, dtype)


def keep_adapters_in_float32(model: PreTrainedModel) -> None:
    """Undo GRPOTrainer's cast of the adapters of quantised models to bfloat16; leave other models unchanged.

    A V100 has no bfloat16. On every device, its eight bits of precision would lose small updates of a weight.
    """
    if not (getattr(model, "is_loaded_in_4bit", False) or getattr(model, "is_loaded_in_8bit", False)):
        return
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype == torch.bfloat16:
            parameter.data = parameter.data.float()


def fsdp_policy(dtype: torch.dtype) -> MixedPrecisionPolicy:
    """Return a policy that gathers weights in half precision and reduces gradients in float32.

    Accelerate's policy would also cast the outputs of modules: the losses, and the residual stream, which overflows
    float16 in some models.
    """
    return MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32, cast_forward_inputs=False
    )


def configure_wrappers(accelerator: Accelerator) -> None:
    """Configure how FSDP and DDP wrap the trained model; call this before they wrap it.

    In half precision FSDP gets [`fsdp_policy`]. DDP reduces gradients in place; by default it keeps a second copy of
    them, at four bytes per weight.
    """
    plugin, half = getattr(accelerator.state, "fsdp_plugin", None), half_precision(accelerator)
    if plugin is not None and half is not None:
        plugin.mixed_precision_policy = fsdp_policy(half)
    if accelerator.ddp_handler is not None:
        accelerator.ddp_handler.gradient_as_bucket_view = True


def zero_loss_scaler(engine: Any) -> dict[str, Any]:
    """Return the attributes of the loss scaler of a ZeRO optimizer, for reading and writing; empty without a scaler.

    DeepSpeed steps inside the backward pass, and its scaler treats every value that is not finite as an overflow. The
    caller may need to restore the scale afterwards.
    """
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {} if scaler is None else vars(scaler)


class OverflowCounter(TrainerCallback):
    """Count the optimizer steps that were skipped because a gradient overflowed in float16.

    The loss scale adapts by overflowing, so a few skipped steps at the start and an occasional one later are normal.

    Args:
        accelerator ([`~accelerate.Accelerator`]): accelerator of the trainer.
        skipped_otherwise (`Callable`, *optional*): returns whether the step was skipped for another reason, which is
            counted elsewhere.
    """

    def __init__(self, accelerator: Any, skipped_otherwise: Callable[[], bool] = lambda: False):
        self.accelerator = accelerator
        self._skipped_otherwise = skipped_otherwise
        self.skipped_steps = 0
        self._scale = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Continue the count of a resumed run."""
        if self.accelerator.scaler is not None:
            self._scale = self.accelerator.scaler.get_scale()
        logged = [int(entry["fp16/skipped_steps"]) for entry in state.log_history if "fp16/skipped_steps" in entry]
        self.skipped_steps = logged[-1] if logged else 0

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        """Count the step if it was skipped: the scale then has fallen.

        `optimizer_step_was_skipped` does not tell: a fused optimizer skips a step by itself, unseen by accelerate.
        """
        if self.accelerator.scaler is None:  # DeepSpeed
            self.skipped_steps += self.accelerator.optimizer_step_was_skipped and not self._skipped_otherwise()
            return
        before, self._scale = self._scale, self.accelerator.scaler.get_scale()
        self.skipped_steps += self._scale < before

    def metrics(self, engine: Any) -> dict[str, float]:
        """Return `fp16/skipped_steps` and `fp16/loss_scale`, from accelerate's scaler or a DeepSpeed `engine`."""
        scaler = self.accelerator.scaler
        scale = scaler.get_scale() if scaler is not None else getattr(engine.optimizer, "cur_scale", None)
        metrics = {"fp16/skipped_steps": float(self.skipped_steps)}
        return metrics if scale is None else {**metrics, "fp16/loss_scale": float(scale)}
